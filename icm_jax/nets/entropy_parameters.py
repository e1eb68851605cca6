"""Networks that tell how latents are distributed: decoded latents -> scale index, and mean.

    z -> HyperSynthesis -> of each element of y (Ballé et al. 2018; with mean, Minnen et al. 2018)
    z -> ScaleSynthesis -> the same with transposed convolutions, and the scale itself
    any latents -> EntropyParameters -> of each element of a latent

In floats for training; as `icm_jax.nets.integer` takes them, weights go both ways.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.nets import integer
from icm_jax.nets.layers import TransposedUp, Up

TOP_INDEX = 63


class HyperSynthesis(ops.Module):
    """ẑ -> real-valued scale index of each element of y (64 scales, 0.11 to 256), and its mean.

    Attributes:
      channels: inner width. latent_channels: C of y.
      mean: also give a mean (Minnen et al. 2018): 2C channels, indexes first.
    """

    channels: int
    latent_channels: int
    mean: bool = False

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = nn.relu(Up(self.channels)(z))
        x = nn.relu(Up(self.channels)(x))
        init = nn.initializers.variance_scaling(0.1 / _REACH**2, "fan_in", "truncated_normal")
        x = nn.Conv(self.latent_channels * (1 + self.mean), (3, 3), kernel_init=init)(x)
        reach, first = _affine(x.shape[-1], self.latent_channels)
        return x * reach.reshape(1, 1, 1, -1) + first.reshape(1, 1, 1, -1)


# Adaptive optimisers move each weight by about the learning rate. Indexes have a long way to go, so
# what the last layer says of them is multiplied.
_REACH = 64.0


def _affine(count: int, indexes: int) -> tuple[np.ndarray, np.ndarray]:
    """(factor, offset) of the last layer's outputs: `indexes` indexes, then means.

    Index 18 is a scale of about one: a new codec starts neither starved nor flooded.
    """
    is_index = np.arange(count) < indexes
    return np.where(is_index, _REACH, 1.0).astype(np.float32), 18.0 * is_index.astype(np.float32)


HYPER_SYNTHESIS = (
    integer.Node("layer_0", ("z",), "relu", up=True),
    integer.Node("layer_1", ("layer_0",), "relu", up=True),
    integer.Node("layer_2", ("layer_1",)),
)
"""`HyperSynthesis` as `integer` takes it."""
MEAN_STEPS = integer.FRACTIONS  # per unit of a mean, in integers


def hyper_synthesis_weights(params, indexes: int) -> dict[str, integer.Weights]:
    """A trained `HyperSynthesis` as the weights of `HYPER_SYNTHESIS`.

    Args: indexes: how many of its outputs are scale indexes; means follow.
    """
    convolutions = params["Up_0"]["Conv_0"], params["Up_1"]["Conv_0"], params["Conv_0"]
    return _with_affine(HYPER_SYNTHESIS, convolutions, indexes)


def hyper_synthesis_params(weights: Mapping[str, integer.Weights], indexes: int) -> dict:
    """The parameters that `hyper_synthesis_weights` makes these weights of."""
    up_0, up_1, last = _without_affine(HYPER_SYNTHESIS, weights, indexes)
    return {"Up_0": {"Conv_0": up_0}, "Up_1": {"Conv_0": up_1}, "Conv_0": last}


def _with_affine(nodes, convolutions, indexes: int) -> dict[str, integer.Weights]:
    """Weights of nodes, what `_affine` does to the outputs in those of the last."""
    weights = {
        node.name: integer.Weights(layer["kernel"], layer["bias"])
        for node, layer in zip(nodes, convolutions, strict=True)
    }
    name, last = nodes[-1].name, weights[nodes[-1].name]
    reach, first = _affine(len(last.bias), indexes)
    kernel = reach.reshape(1, 1, 1, -1) * last.kernel
    weights[name] = integer.Weights(kernel, reach * last.bias + first)
    return weights


def _without_affine(nodes, weights, indexes: int) -> list[dict[str, np.ndarray]]:
    """The convolutions of `_with_affine`, from what it gives."""
    reach, first = _affine(len(weights[nodes[-1].name].bias), indexes)
    last = weights[nodes[-1].name]
    last = last._replace(kernel=last.kernel / reach, bias=(last.bias - first) / reach)
    return [layer._asdict() for layer in (*(weights[node.name] for node in nodes[:-1]), last)]


class ScaleSynthesis(ops.Module):
    """ẑ -> scale of each element of y, and its mean: the layers of the papers themselves (Ballé et
    al. 2018, figure 4; Minnen et al. 2018, table 1), two transposed convolutions and one.

    Attributes:
      widths: of the transposed ones. latent_channels: C of y.
      mean: also give a mean: 2C channels, scales first, and leaky ReLU; else ReLU.
    """

    widths: tuple[int, int]
    latent_channels: int
    mean: bool = False

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        activation = nn.leaky_relu if self.mean else nn.relu
        for width in self.widths:
            z = activation(TransposedUp(width, 5)(z))
        count = self.latent_channels
        first = np.repeat([1.0, 0.0], [count, count * self.mean])  # a new codec's scales
        init = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        bias = lambda *_: jnp.asarray(first, jnp.float32)  # noqa: E731
        return nn.Conv(len(first), (3, 3), kernel_init=init, bias_init=bias)(z)


def scale_synthesis_nodes(mean: bool) -> tuple[integer.Node, ...]:
    """A `ScaleSynthesis` as `integer` takes it."""
    activation = "leaky_relu" if mean else "relu"
    return (
        integer.Node("layer_0", ("z",), activation, up=True),
        integer.Node("layer_1", ("layer_0",), activation, up=True),
        integer.Node("layer_2", ("layer_1",)),
    )


_SCALE_LAYERS = ("TransposedUp_0", "TransposedUp_1", "Conv_0")


def scale_synthesis_weights(params) -> dict[str, integer.Weights]:
    """A trained `ScaleSynthesis` as the weights of `scale_synthesis_nodes`."""
    *ups, last = (params[name] for name in _SCALE_LAYERS)
    weights = [integer.Weights(sub_pixel(up["kernel"]), np.tile(up["bias"], 4)) for up in ups]
    weights.append(integer.Weights(last["kernel"], last["bias"]))
    return {f"layer_{number}": layer for number, layer in enumerate(weights)}


def scale_synthesis_params(weights: Mapping[str, integer.Weights]) -> dict:
    """The parameters that `scale_synthesis_weights` makes these weights of."""
    found = {}
    for number, name in enumerate(_SCALE_LAYERS):
        kernel, bias = weights[f"layer_{number}"]
        if number < 2:
            kernel, bias = transposed(kernel), bias.reshape(4, -1).mean(axis=0)
        found[name] = dict(kernel=kernel, bias=bias)
    return found


def sub_pixel(kernel: np.ndarray) -> np.ndarray:
    """The kernel [3, 3, C, 4F] that, before depth to space, does what [5, 5, C, F] of a
    `TransposedUp` does: element r of a pair of rows sees row t of the 3 by place r + 4 - 2t."""
    _, _, channels, features = kernel.shape
    padded = np.pad(np.asarray(kernel), ((0, 1), (0, 1), (0, 0), (0, 0)))
    pairs = padded.reshape(3, 2, 3, 2, channels, features)[::-1, :, ::-1]
    return pairs.transpose(0, 2, 4, 1, 3, 5).reshape(3, 3, channels, 4 * features)


def transposed(kernel: np.ndarray) -> np.ndarray:
    """What `sub_pixel` takes back."""
    _, _, channels, features = kernel.shape
    pairs = np.asarray(kernel).reshape(3, 3, channels, 2, 2, features // 4)
    padded = pairs.transpose(0, 3, 1, 4, 2, 5)[::-1, :, ::-1].reshape(6, 6, channels, -1)
    return padded[:5, :5]


def approximate(
    nodes: Sequence[integer.Node],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    channels: Mapping[str, int],
    last: np.ndarray,
) -> dict[str, integer.Weights]:
    """The float network that `arrays`, of `integer.quantise`, stand for, but for rounding and
    clipping, to go on learning. A unit of its activations is 16 integers.

    Args: channels: of each input. last: what an integer of each output channel [F] stands for.
    """
    weights, steps = {}, {}
    for name in integer.input_names(nodes):
        shift = arrays[name]["shift"] if name in arrays else integer.WHOLE
        steps[name] = np.broadcast_to(2.0 ** np.asarray(shift) / integer.FRACTIONS, channels[name])
    for node in nodes:
        layer = {name: np.asarray(value, np.float64) for name, value in arrays[node.name].items()}
        step = (
            np.asarray(last)
            if node is nodes[-1]
            else np.full(layer["bias"].shape, 1 / integer.FRACTIONS)
        )
        unit = step * layer["multiplier"] * 2.0 ** -(layer["first"] + layer["second"])
        of_inputs = np.concatenate([steps[name] for name in node.inputs]).reshape(1, 1, -1, 1)
        both = layer["kernel"] * unit / of_inputs, layer["bias"] * unit
        weights[node.name] = integer.Weights(*(value.astype(np.float32) for value in both))
        steps[node.name] = step[: len(step) // 4] if node.up else step
    return weights


class EntropyParameters(ops.Module):
    """Decoded latents -> scale index, and mean, of each element of y, by a network of any shape.

    As `HyperSynthesis`, of which it is the general form: a context model concatenates what the
    hyperprior says with what is decoded of y.

    Attributes:
      nodes: the network; the last gives latent_channels features, or twice as many with `mean`.
      latent_channels: C of y. mean: also give a mean.
    """

    nodes: tuple[integer.Node, ...]
    latent_channels: int
    mean: bool = False

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array]) -> jax.Array:
        """float [N, h, w, C] by the names of inputs -> float32 [N, h', w', C or 2C]."""
        values: dict[str, Any] = dict(inputs)
        convolutions = []
        for node in self.nodes:
            channels = sum(values[name].shape[-1] for name in node.inputs)
            factor = 0.1 / _REACH**2 if node is self.nodes[-1] else 1.0
            init = nn.initializers.variance_scaling(factor, "fan_in", "truncated_normal")
            shape = (node.side, node.side, channels, node.features)
            kernel = self.param(f"{node.name}_kernel", init, shape)
            bias = self.param(f"{node.name}_bias", nn.initializers.zeros, (node.features,))
            convolutions.append(dict(kernel=kernel, bias=bias))
            features = node.features // 4 if node.up else node.features
            values[node.name] = jax.ShapeDtypeStruct((1, 1, 1, features), jnp.float32)
        weights = _with_affine(self.nodes, convolutions, self.latent_channels)
        return integer.run_float(self.nodes, weights, inputs)[self.nodes[-1].name]

    def weights(self, params) -> dict[str, integer.Weights]:
        """Trained parameters as `integer.quantise` takes them."""
        convolutions = [
            {kind: params[f"{node.name}_{kind}"] for kind in ("kernel", "bias")}
            for node in self.nodes
        ]
        return _with_affine(self.nodes, convolutions, self.latent_channels)

    def params(self, weights: Mapping[str, integer.Weights]) -> dict:
        """The parameters that `weights` gives these of."""
        layers = _without_affine(self.nodes, weights, self.latent_channels)
        return {
            f"{node.name}_{kind}": value
            for node, layer in zip(self.nodes, layers, strict=True)
            for kind, value in layer.items()
        }
