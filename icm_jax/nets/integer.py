"""Small networks of convolutions that have one defined result on every machine.

What a decoder derives from decoded latents has to be what the encoder derived, to the last bit;
floating point does not give that across devices, batch sizes or compilers (Ballé, Johnston and
Minnen 2019, "Integer networks for data compression with latent-variable models"). Here weights and
activations are int8, products are summed in int32, and sums are re-scaled by integer multiply and
shift:

    acc = Σ w · x + b                                 |acc| <= bound < 2^31, from the actual weights
    a   = (acc + 2^(s1-1)) >> s1                      |a| < 2^15
    y   = clip((a · m + 2^(s2-1)) >> s2, low, high)   1 <= m < 2^15, and where a < 0 in a layer
                                                      with leaky ReLU, round(0.01 · m) for m

Integer addition is associative, so no order of summation, tiling or fusion can change a result.

A network is a literal list of `Node`, in the order of computation; the last is its output. Names
that no node has are the network's inputs: multiples of 1/16, held as

    x = clip((16 · value + 2^(s-1)) >> s, -127, 127)  s = 4, whole numbers, where nothing is stored

`quantise` makes the integers from float weights and the ranges seen on sample inputs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.errors import IcmError

LEVELS = 127
FRACTIONS = 16
"""Inputs are multiples of 1/16, as decoded latents are: a symbol and a mean."""
SLOPE = 0.01
"""Of leaky ReLU below zero."""
WHOLE = 4
"""Shift of an input that is kept in whole numbers."""
_ROOM = 15  # bits of a and of m
_FARTHEST = 1 << 14  # inputs beyond are taken for this
_TAPS = 1 << 10
"""So many products of two numbers of 8 bits have no sum beyond 2^24, to which float32 counts."""
_SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)
"""Of the largest activation: what the largest integer may stand for."""


class Node(NamedTuple):
    """One convolution with stride 1 and zeros around.

    Attributes:
      name: of its result, and of its weights and integers.
      inputs: names of inputs of the network or of nodes before; they are cropped to the least of
        their heights and widths and concatenated.
      activation: "relu", "leaky_relu" or, linear, "".
      up: depth to space after it: [h, w, 4F] -> [2h, 2w, F].
      features: channels before depth to space, where weights are to be initialised.
      side: of the kernel, odd.
    """

    name: str
    inputs: tuple[str, ...]
    activation: str = ""
    up: bool = False
    features: int = 0
    side: int = 3


class Weights(NamedTuple):
    """Of a node in floats: kernel [k, k, C, F], bias [F]."""

    kernel: np.ndarray
    bias: np.ndarray


class Range(NamedTuple):
    """Of an output channel: the integers it is kept in, and the value of one step."""

    low: int
    high: int
    step: float


def input_names(nodes: Sequence[Node]) -> list[str]:
    """Of a network, in the order in which its nodes name them.

    >>> input_names([Node("a", ("z",)), Node("b", ("a", "y"))])
    ['z', 'y']
    """
    names = {node.name for node in nodes}
    return list(dict.fromkeys(n for node in nodes for n in node.inputs if n not in names))


def run_float(
    nodes: Sequence[Node], weights: Mapping[str, Weights], inputs: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The float network on inputs [N, h, w, C]: the outputs of all nodes by name, float32, before
    depth to space."""
    values, outputs = dict(inputs), {}
    for node in nodes:
        layer = weights[node.name]
        x = jax.lax.conv_general_dilated(
            _gathered(values, node).astype(jnp.float32),
            jnp.asarray(layer.kernel, jnp.float32),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ) + jnp.asarray(layer.bias, jnp.float32).reshape(1, 1, 1, -1)
        if node.activation:
            x = jax.nn.relu(x) if node.activation == "relu" else jax.nn.leaky_relu(x, SLOPE)
        outputs[node.name] = x
        values[node.name] = ops.depth_to_space(x) if node.up else x
    return outputs


def quantise(
    nodes: Sequence[Node],
    weights: Mapping[str, Weights],
    inputs: Mapping[str, np.ndarray],
    last: Sequence[Range],
) -> dict[str, dict[str, np.ndarray]]:
    """Post-training conversion of a float network.

    Each channel of an input and of an activation gets a scale, chosen among a few as the one of
    least error on what is seen; weights one per output channel.

    Args:
      inputs: samples by name, float [N, h, w, C].
      last: the range of each output channel [F].

    Returns: {name of a node, or of an input that is not kept in whole numbers: NumPy arrays by
      name}, what `run` takes.

    Raises: IcmError if a weight is not finite, or so large that sums could leave int32.
    """
    arrays, steps, kept = {}, {}, {}
    for name in input_names(nodes):
        value = np.asarray(inputs[name], np.float32)
        channels = np.moveaxis(value, -1, 0)
        shift = np.array([_input_shift(channel) for channel in channels], np.int32)
        if (shift != WHOLE).any():
            arrays[name] = {"shift": shift}
        step = 2.0**shift / FRACTIONS
        kept[name] = jnp.asarray(np.clip(np.rint(value / step), -LEVELS, LEVELS) * step, np.float32)
        steps[name] = step
    outputs = run_float(nodes, weights, kept)
    for node in nodes:
        ranges = list(last)
        whole = _whole(weights[node.name], np.concatenate([steps[name] for name in node.inputs]))
        if node is not nodes[-1]:
            low = 0 if node.activation == "relu" else -LEVELS
            found = ops.depth_to_space(outputs[node.name]) if node.up else outputs[node.name]
            repeats = 4 if node.up else 1  # depth to space takes channels from four
            channels = zip(np.moveaxis(np.asarray(found), -1, 0), whole.least(repeats), strict=True)
            steps[node.name] = np.array([max(_activation_step(x), least) for x, least in channels])
            ranges = [Range(low, LEVELS, step) for step in np.tile(steps[node.name], repeats)]
        arrays[node.name] = _converted(node, whole, ranges)
    return arrays


class _Whole(NamedTuple):
    """Integers of a node: kernel, bias and s1 as above, and what a unit of a stands for [F]."""

    kernel: np.ndarray
    bias: np.ndarray
    first: np.ndarray
    unit: np.ndarray

    def least(self, repeats: int) -> np.ndarray:
        """The least steps of activations that m can be of, for channels that are as good as 0."""
        return self.unit.reshape(repeats, -1).max(axis=0) / (2.0 ** (_ROOM - 1) - 1)


def _whole(weights: Weights, input_step: np.ndarray) -> _Whole:
    """Of a node; `input_step` [C] is the value of a step of each of its inputs."""
    kernel, bias = (np.asarray(value, np.float64) for value in weights)
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        raise IcmError("a network with weights that are not finite cannot be frozen; retrain")
    # What differs between the inputs' scales goes into the weights.
    largest = float(input_step.max())
    kernel = kernel * (input_step / largest).reshape(1, 1, -1, 1)
    step = np.abs(kernel).max(axis=(0, 1, 2)) / LEVELS
    # A channel whose weights are tiny beside its bias would overflow the bias' integer.
    step = np.maximum(step, np.abs(bias) / largest / 2**29).clip(min=1e-12)
    integers = np.rint(kernel / step).astype(np.int8)
    offset = np.rint(bias / (step * largest)).astype(np.int64)
    bound = LEVELS * np.abs(integers.astype(np.int64)).sum(axis=(0, 1, 2)) + np.abs(offset)
    if bound.max() >= 2**30:
        raise IcmError("the sums of an integer network could leave 32 bits; use fewer channels")
    first = np.maximum(np.ceil(np.log2(bound + 1)).astype(np.int64) - _ROOM, 0)
    return _Whole(integers, offset, first, step * largest * 2.0**first)


def _converted(node: Node, whole: _Whole, ranges: list[Range]) -> dict:
    """What `run` takes of one node."""
    ratio = whole.unit / np.array([r.step for r in ranges])
    second = np.clip(np.floor(_ROOM - np.log2(ratio)) - 1, 1, 30).astype(np.int64)
    multiplier = np.rint(ratio * 2.0**second).astype(np.int64)
    if (multiplier >= 1 << _ROOM).any():
        raise IcmError("a network has weights too large to be frozen; retrain")
    found = {
        "kernel": whole.kernel,
        "bias": whole.bias.astype(np.int32),
        "first": whole.first.astype(np.int32),
        "multiplier": multiplier.astype(np.int32),
        "second": second.astype(np.int32),
        "low": np.array([r.low for r in ranges], np.int32),
        "high": np.array([r.high for r in ranges], np.int32),
    }
    if node.activation == "leaky_relu":
        found["negative"] = np.rint(SLOPE * multiplier).astype(np.int32)
    elif node.activation == "relu":
        found["low"] = np.maximum(found["low"], 0)
    return found


def _input_shift(value: np.ndarray) -> int:
    """s of the step 2^s/16 that represents the values seen with least squared error, whole numbers
    at a tie."""

    def error(shift):
        step = 2.0**shift / FRACTIONS
        kept = np.clip(np.rint(value / step), -LEVELS, LEVELS) * step
        return float(np.square(kept - value, dtype=np.float64).mean())

    return min((WHOLE, *(s for s in range(10) if s != WHOLE)), key=error)


def _activation_step(output: np.ndarray) -> float:
    """The step of an 8-bit channel [N, h, w] that represents the values seen with least error.

    Samples are of all qualities, and activations grow with them; so that the least are heard, the
    squared error of each sample counts by the root of its power.
    """
    top = float(np.abs(output).max(initial=0.0))
    if top <= 0:
        return 1.0 / LEVELS
    power = np.square(output, dtype=np.float64).mean(axis=(1, 2))
    weight = 1.0 / np.sqrt(power + 1e-3 * power.mean())

    def error(step):
        kept = np.rint(output / step).clip(-LEVELS, LEVELS) * step
        return float((np.square(kept - output).mean(axis=(1, 2)) * weight).mean())

    return min((top * share / LEVELS for share in _SHARES), key=error)


def run(
    nodes: Sequence[Node],
    arrays: Mapping[str, Mapping],
    inputs: Mapping[str, jax.Array],
    bounds: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
    """Executes a network on multiples of 1/16 [N, h, w, C] of any dtype -> int32 [N, h', w', F].

    Args:
      arrays: what `quantise` returned.
      bounds: where the inputs are windows of larger ones: what of each, int32 [N, 4], is of them
        and not beyond their border; see `ops.within`. As far from a window's edge as `reach` says,
        the result is that of the whole.
    """
    values = {name: _held(inputs[name], arrays.get(name)) for name in input_names(nodes)}
    bounds = dict(bounds or {})
    for node in nodes:
        layer = arrays[node.name]
        x = _gathered(values, node)
        if bounds:
            bounds[node.name] = _common([bounds[name] for name in node.inputs])
            x = ops.clear_outside(x, bounds[node.name])
        x = _rescaled(_convolved(x, layer["kernel"]), layer)
        if node.up:
            x = ops.depth_to_space(x)
            bounds |= {node.name: 2 * bounds[node.name]} if bounds else {}
        values[node.name] = x if node is nodes[-1] else x.astype(jnp.int8)
    return values[nodes[-1].name]


def _common(bounds: list[jax.Array]) -> jax.Array:
    """What all of some bounds, int32 [N, 4], have in common."""
    every = jnp.stack(bounds)
    ends = jnp.array([False, True, False, True]).reshape(1, 4)
    return jnp.where(ends, every.min(axis=0), every.max(axis=0))


class Reach(NamedTuple):
    """What of its inputs a network looks at.

    Attributes:
      factors: (input, elements of the output, a side, per element of it) for each input.
      halo: how far it looks, in elements of the output; a multiple of all factors.
    """

    factors: tuple[tuple[str, int], ...]
    halo: int


def reach(nodes: Sequence[Node]) -> Reach:
    """How far a network looks, by its nodes' kernels and doublings."""
    far, factor = {nodes[-1].name: 0}, {nodes[-1].name: 1}
    for node in reversed(nodes):
        doubling = 2 if node.up else 1
        own = -(-far.get(node.name, 0) // doubling) + node.side // 2
        for name in node.inputs:
            far[name] = max(far.get(name, 0), own)
            factor[name] = doubling * factor[node.name]
    names = input_names(nodes)
    unit = math.lcm(*(factor[name] for name in names))
    halo = max(far[name] * factor[name] for name in names)
    return Reach(tuple((name, factor[name]) for name in names), -(-halo // unit) * unit)


def _held(x: jax.Array, of_input: Mapping | None) -> jax.Array:
    """An input as int8."""
    if of_input is None:
        return jnp.clip(x, -LEVELS, LEVELS).astype(jnp.int8)
    limited = jnp.clip(jnp.asarray(x, jnp.float32), -_FARTHEST, _FARTHEST)
    sixteenths = (limited * FRACTIONS).astype(jnp.int32)
    shift = of_input["shift"].reshape(1, 1, 1, -1)  # one for all, in older files
    return jnp.clip(_shifted(sixteenths, shift), -LEVELS, LEVELS).astype(jnp.int8)


def _gathered(values: Mapping[str, jax.Array], node: Node) -> jax.Array:
    """The inputs of a node, cropped alike and concatenated."""
    inputs = [values[name] for name in node.inputs]
    height, width = (min(x.shape[axis] for x in inputs) for axis in (1, 2))
    return jnp.concatenate([x[:, :height, :width] for x in inputs], axis=-1)


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """int8 [N, h, w, C] * int8 [k, k, C, F] -> int32 [N, h, w, F], zeros around.

    On CPUs in float32, which holds the sums exactly: before JAX 0.10, XLA takes fifty to eighty
    times as long for integers. Accelerators may multiply floats in fewer bits.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_convolutions, default=_matrix_products)


def _convolutions(x, kernel):
    """By so many channels at a time that no sum of products can leave what float32 counts in."""
    side, _, channels, _ = kernel.shape
    count = -(-channels // (_TAPS // side**2))
    bounds = [channels * n // count for n in range(count + 1)]
    parts = [
        jax.lax.conv_general_dilated(
            x[..., begin:end].astype(jnp.float32),
            kernel[:, :, begin:end].astype(jnp.float32),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        ).astype(jnp.int32)
        for begin, end in itertools.pairwise(bounds)
    ]
    return sum(parts[1:], parts[0])


def _matrix_products(x, kernel):
    _, h, w, _ = x.shape
    side = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), *[(side // 2, side // 2)] * 2, (0, 0)))
    taps = [
        jax.lax.dot_general(
            x[:, row : row + h, column : column + w],
            kernel[row, column],
            (((3,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        for row in range(side)
        for column in range(side)
    ]
    return sum(taps[1:], taps[0])


def _rescaled(acc: jax.Array, layer: Mapping) -> jax.Array:
    row = {name: value.reshape(1, 1, 1, -1) for name, value in layer.items() if name != "kernel"}
    a = _shifted(acc + row["bias"], row["first"])
    multiplier = row["multiplier"]
    if "negative" in row:
        multiplier = jnp.where(a < 0, row["negative"], multiplier)
    y = _shifted(a * multiplier, row["second"])
    return jnp.clip(y, row["low"], row["high"])


def _shifted(x: jax.Array, bits: jax.Array) -> jax.Array:
    """x / 2^bits, rounded to nearest, halves up; bits may be 0."""
    half = jnp.where(bits > 0, jnp.left_shift(1, jnp.maximum(bits - 1, 0)), 0)
    return jnp.right_shift(x + half, bits)
