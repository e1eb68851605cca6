"""A stack of 3×3 convolutions that has one defined result on every machine.

What a decoder derives from side information has to be what the encoder derived, to the last bit;
floating point does not give that across devices, batch sizes or compilers (Ballé, Johnston and
Minnen 2019, "Integer networks for data compression with latent-variable models"). Here weights and
activations are int8, products are summed in int32 by `lax.dot_general`, and sums are re-scaled by
integer multiply and shift:

    acc = Σ w · x + b                                 |acc| <= bound < 2^31, from the actual weights
    a   = (acc + 2^(s1-1)) >> s1                      |a| < 2^15
    y   = clip((a · m + 2^(s2-1)) >> s2, low, high)   1 <= m < 2^15

Integer addition is associative, so no order of summation, tiling or fusion can change a result.
`quantise` makes a stack from float weights and the ranges seen on sample inputs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.errors import IcmError

LEVELS = 127
_ROOM = 15  # bits of a and of m


class FloatLayer(NamedTuple):
    """One layer before conversion: conv3×3, then ReLU, then depth to space, as the flags say.

    Attributes:
      kernel: float [3, 3, C, F]. bias: float [F].
      relu: clip at zero; the result is an 8-bit activation of the next layer.
      up: depth to space after it: [h, w, 4F'] -> [2h, 2w, F'].
    """

    kernel: np.ndarray
    bias: np.ndarray
    relu: bool
    up: bool


class Range(NamedTuple):
    """Of an output channel: the integers it is kept in, and the value of one step."""

    low: int
    high: int
    step: float


def run_float(layers: Sequence[FloatLayer], x: np.ndarray) -> list[np.ndarray]:
    """The float stack on x [N, h, w, C]: the outputs of all layers, float32, for calibration."""
    outputs, x = [], jnp.asarray(x, jnp.float32)
    for layer in layers:
        x = jax.lax.conv_general_dilated(
            x,
            jnp.asarray(layer.kernel, jnp.float32),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ) + jnp.asarray(layer.bias, jnp.float32).reshape(1, 1, 1, -1)
        x = jax.nn.relu(x) if layer.relu else x
        outputs.append(np.asarray(x))
        x = ops.depth_to_space(x) if layer.up else x
    return outputs


def quantise(layers: Sequence[FloatLayer], x: np.ndarray, last: Sequence[Range]) -> dict[str, dict]:
    """Post-training conversion of a float stack.

    Activations get one scale per layer, chosen among shares of the largest value seen as the one
    of least squared error; weights one scale per output channel.

    Args:
      layers: the float stack; all but the last have `relu`.
      x: whole numbers [N, h, w, C], sample inputs; inputs are clipped to -127 ... 127.
      last: the range of each output channel [F].

    Returns: {"layer_0": NumPy arrays by name, ...}, what `run` takes.

    Raises: IcmError if a weight is not finite, or so large that sums could leave int32.
    """
    stack, input_step = {}, 1.0
    seen = run_float(layers, np.clip(x, -LEVELS, LEVELS))
    for number, (layer, output) in enumerate(zip(layers, seen, strict=True)):
        kernel, bias = (np.asarray(v, np.float64) for v in (layer.kernel, layer.bias))
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise IcmError("a hyper-synthesis with weights that are not finite cannot be frozen")
        final = number == len(layers) - 1
        features = len(bias)
        if final:
            ranges = list(last)
        else:
            ranges = [Range(0, LEVELS, _activation_step(output))] * features
        step = np.abs(kernel).max(axis=(0, 1, 2)) / LEVELS
        # A channel whose weights are tiny beside its bias would overflow the bias' integer.
        step = np.maximum(step, np.abs(bias) / input_step / 2**29).clip(min=1e-12)
        weights = np.rint(kernel / step).astype(np.int8)
        offset = np.rint(bias / (step * input_step)).astype(np.int64)
        bound = LEVELS * np.abs(weights.astype(np.int64)).sum(axis=(0, 1, 2)) + np.abs(offset)
        if bound.max() >= 2**30:
            raise IcmError("the sums of a hyper-synthesis could leave 32 bits; use fewer channels")
        first = np.maximum(np.ceil(np.log2(bound + 1)).astype(np.int64) - _ROOM, 0)
        output_step = np.array([r.step for r in ranges])
        ratio = step * input_step / output_step * 2.0**first
        second = np.clip(np.floor(_ROOM - np.log2(ratio)) - 1, 1, 30).astype(np.int64)
        multiplier = np.rint(ratio * 2.0**second).astype(np.int64)
        if (multiplier >= 1 << _ROOM).any():
            raise IcmError("a hyper-synthesis has weights too large to be frozen; retrain")
        stack[f"layer_{number}"] = {
            "kernel": weights,
            "bias": offset.astype(np.int32),
            "first": first.astype(np.int32),
            "multiplier": multiplier.astype(np.int32),
            "second": second.astype(np.int32),
            "low": np.array([r.low for r in ranges], np.int32),
            "high": np.array([r.high for r in ranges], np.int32),
        }
        input_step = float(output_step[0])
    return stack


def _activation_step(output: np.ndarray) -> float:
    """The step of an 8-bit activation that represents the values seen with least squared error."""
    top = float(output.max(initial=0.0))
    if top <= 0:
        return 1.0 / LEVELS
    candidates = [top * share / LEVELS for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)]

    def error(step):
        return float(np.square(np.rint(output / step).clip(0, LEVELS) * step - output).mean())

    return min(candidates, key=error)


def run(stack: Mapping[str, dict], x: jax.Array, ups: Sequence[bool]) -> jax.Array:
    """Executes a stack: whole numbers [N, h, w, C] of any dtype -> int32 [N, h', w', F].

    Args:
      ups: per layer, whether depth to space follows it.
    """
    x = jnp.clip(x, -LEVELS, LEVELS)
    for number, up in enumerate(ups):
        layer = stack[f"layer_{number}"]
        x = _rescaled(_convolved(x.astype(jnp.int8), layer["kernel"]), layer)
        x = ops.depth_to_space(x) if up else x
    return x


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """int8 [N, h, w, C] * int8 [3, 3, C, F] -> int32 [N, h, w, F], zeros around."""
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        jax.lax.dot_general(
            x[:, row : row + h, column : column + w],
            kernel[row, column],
            (((3,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        for row in range(3)
        for column in range(3)
    ]
    return sum(taps[1:], taps[0])


def _rescaled(acc: jax.Array, layer: dict) -> jax.Array:
    row = {name: value.reshape(1, 1, 1, -1) for name, value in layer.items() if name != "kernel"}
    a = _shifted(acc + row["bias"], row["first"])
    y = _shifted(a * row["multiplier"], row["second"])
    return jnp.clip(y, row["low"], row["high"])


def _shifted(x: jax.Array, bits: jax.Array) -> jax.Array:
    """x / 2^bits, rounded to nearest, halves up; bits may be 0."""
    half = jnp.where(bits > 0, jnp.left_shift(1, jnp.maximum(bits - 1, 0)), 0)
    return jnp.right_shift(x + half, bits)
