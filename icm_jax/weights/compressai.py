"""Checkpoints of CompressAI's image codecs, as variables of `icm_jax.codecs.compressai`.

    g_a.0 .2 .4 .6, g_s.0 .2 .4 .6     convolutions 5×5, GDN between them
    g_a.0 to .6, g_s.0 to .7           of cheng2020-anchor: residual blocks, and one convolution
    h_a.0 .2 .4, h_s.0 .2 .4           of the hyperprior; of cheng2020-anchor, .6 .8 as well
    context_prediction                 5×5, of which the twelve places before the middle count
    entropy_parameters.0 .2 .4         1×1
    entropy_bottleneck                 densities; up to release 1.2.6 with _matrix0 for matrices.0

Names may have a prefix (state_dict., module., ...), which is found by itself. Kernels
[C', C, k, k], of transposed convolutions [C, C', k, k], become [k, k, C, C']; GDN's γ is
transposed, and β and γ are stored under the same root and bound. What comes before a pixel shuffle
has its channels in the order of `ops.depth_to_space`. Tables are left: a frozen codec has its own.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.codecs.codec import Codec
from icm_jax.codecs.compressai import ARCHITECTURES, SERIAL, compressai_codec
from icm_jax.errors import IcmError
from icm_jax.nets import context
from icm_jax.nets.entropy_parameters import sub_pixel
from icm_jax.weights.tensors import Tensor, tensors

_QUANTILES = "entropy_bottleneck.quantiles"
_OLD = re.compile(r"entropy_bottleneck\._(matrix|bias|factor)(\d)$")
_PLURAL = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
_TABLES = re.compile(
    r"(entropy_bottleneck|gaussian_conditional)\.(_offset|_quantized_cdf|_cdf_length|target|"
    r"scale_table|scale_bound|.*lower_bound.*)$|.*_reparam\.(pedestal|lower_bound\.bound)$|"
    r"context_prediction\.mask$"
)
_ATTENTION = re.compile(r"g_a\.\d\.conv_[ab]\.")
"""What tells an architecture that is not read."""


class Checkpoint(NamedTuple):
    """codec: that of the file. variables: of it, float32. architecture: one of `ARCHITECTURES`."""

    codec: Codec
    variables: dict
    architecture: str
    width: int
    channels: int


def read(path: str | os.PathLike, architecture: str | None = None) -> Checkpoint:
    """A checkpoint, its architecture told from its names and shapes.

    Args: architecture: what the file has to be, or None.

    Raises: IcmError if the file cannot be read, is damaged, holds no codec of CompressAI, several,
      one of another architecture, or numbers that are not finite.
    """
    found = _unprefixed(path, tensors(path))
    told, width, channels = _kind(path, found)
    if architecture not in (None, told):
        raise IcmError(
            f"{path} is {told} by its names and shapes, not {architecture}; leave "
            "--architecture out, or give another file"
        )
    codec = compressai_codec(told, width, channels)
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    shapes: Any = jax.eval_shape(lambda: codec.init(jax.random.key(0), image))
    needed: dict = flax.traverse_util.flatten_dict(shapes)
    names = {place: _name(told, place[2:]) for place in needed}
    for name in sorted(names.values()):
        if name not in found:
            raise IcmError(f"{path} lacks {name}, which {told} has; it is not whole")
    spare = {name for name in found if not _TABLES.match(name)} - set(names.values())
    if spare:
        raise IcmError(f"{path} holds {min(spare)}, which {told} has not; it is another network")
    leaves = {
        place: _leaf(path, told, name, found[name], needed[place].shape)
        for place, name in names.items()
    }
    variables = flax.traverse_util.unflatten_dict(leaves)
    return Checkpoint(codec, variables, told, width, channels)


def _unprefixed(path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a file's codec by their names in the newest release."""
    ends = [name.removesuffix(_QUANTILES) for name in found if name.endswith(_QUANTILES)]
    ends = [prefix for prefix in ends if not prefix or prefix.endswith(".")]
    if not ends:
        raise IcmError(
            f"{path} holds no codec of CompressAI: none of its {len(found)} arrays is an "
            f"{_QUANTILES}; expected the weights of {', '.join(ARCHITECTURES)}"
        )
    if len(ends) > 1:
        raise IcmError(f"{path} holds several codecs, under {', '.join(ends)}; save one of them")
    own = {n.removeprefix(ends[0]): v for n, v in found.items() if n.startswith(ends[0])}
    return {_OLD.sub(_renamed, name): tensor for name, tensor in own.items()}


def _renamed(old: re.Match) -> str:
    return f"entropy_bottleneck.{_PLURAL[old[1]]}.{old[2]}"


def _kind(path, found: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """(architecture, N, M) by names and shapes."""

    def sides(name: str) -> tuple[int, ...]:
        return found[name].shape if name in found else ()

    attention = min((name for name in found if _ATTENTION.match(name)), default=None)
    if attention:
        raise IcmError(
            f"{path} has attention ({attention}), as cheng2020-attn has; of CompressAI's codecs "
            f"these are imported: {', '.join(ARCHITECTURES)}"
        )
    serial = "context_prediction.weight" in found
    if serial and "g_a.0.conv1.weight" in found:
        (width, *_) = sides("g_a.0.conv1.weight") or (0,)
        return SERIAL[1], width, width
    first, last = sides("g_a.0.weight"), sides("g_a.6.weight")
    if len(first) != 4 or len(last) != 4:
        raise IcmError(f"{path} lacks g_a.0.weight or g_a.6.weight, convolutions of all codecs")
    channels, outputs = last[0], sides("h_s.4.weight")[:1]
    if not any(name.startswith(("h_a.", "h_s.")) for name in found):
        return ARCHITECTURES[0], first[0], channels
    if outputs not in ((channels,), (2 * channels,))[serial:]:
        raise IcmError(
            f"{path} has a hyper-synthesis h_s that ends in {list(outputs)} channels for "
            f"{channels} of y; expected one or two for each, as {', '.join(ARCHITECTURES[1:4])} "
            "have"
        )
    number = 3 if serial else 1 if outputs == (channels,) else 2
    return ARCHITECTURES[number], first[0], channels


_STEMS = {"analysis": "g_a", "synthesis": "g_s", "hyper_analysis": "h_a", "hyper_synthesis": "h_s"}
_LEAVES = {"kernel": "weight", "bias": "bias", "beta": "beta", "gamma": "gamma"}


_IN_BLOCKS = {
    "plain": {"Conv_0": "conv1", "Conv_1": "conv2"},
    "down": {"Down_0": "conv1", "Conv_0": "conv2", "GDN_0": "gdn", "Down_1": "skip"},
    "up": {"Up_0": "subpel_conv.0", "Conv_0": "conv", "GDN_0": "igdn", "Up_1": "upsample.0"},
}
"""Layers of the kinds of residual blocks."""
_DEEP = {"Conv_0": 0, "Conv_1": 2, "Down_0": 4, "Conv_2": 6, "Down_1": 8}
"""Of h_a of cheng2020-anchor."""
_PARAMETERS = {"joint_0": "entropy_parameters.0", "joint_1": "entropy_parameters.2"}
_PARAMETERS |= {"joint_2": "entropy_parameters.4", "context": "context_prediction"}


def _name(architecture: str, place: tuple[str, ...]) -> str:
    """CompressAI's name of a parameter below `PART`."""
    network, *rest = place
    residual = architecture == SERIAL[1]
    if network == "median":
        return _QUANTILES
    if network == "prior":
        kind, _, number = rest[0].partition("_")
        return f"entropy_bottleneck.{_PLURAL[kind]}.{number}"
    if network == "parameters":
        node, _, leaf = rest[0].rpartition("_")
        number = int(node[-1]) if node.startswith("hyper") else 0
        shuffled = ".0" * (residual and number % 2)
        return f"{_PARAMETERS.get(node, f'h_s.{2 * number}{shuffled}')}.{_LEAVES[leaf]}"
    if residual:
        return f"{_STEMS[network]}.{_in_residual(network, rest)}.{_LEAVES[rest[-1]]}"
    layer, _, count = rest[0].partition("_")
    number = 2 * int(count) + (layer == "GDN")
    if network == "hyper_analysis" and layer == "Down":
        number += 2
    if network == "hyper_synthesis" and layer == "Conv":
        number = 4
    return f"{_STEMS[network]}.{number}.{_LEAVES[rest[1]]}"


def _in_residual(network: str, layers: list[str]) -> str:
    """Of a layer in a network of cheng2020-anchor, what its name has between stem and leaf."""
    layer, inner = layers[:2]
    if network == "hyper_analysis":
        return f"{_DEEP[layer]}"
    if not layer.startswith("_Residual"):
        return "6" if network == "analysis" else "7.0"
    # Ours are counted in pairs, in analysis the second of each runs first and halves, in synthesis
    # the first runs last and doubles.
    number = int(layer.removeprefix("_Residual_"))
    resamples = number % 2 if network == "analysis" else number % 2 == 0 and number < 6
    kind = ("down" if network == "analysis" else "up") if resamples else "plain"
    return f"{number if number == 6 else number ^ 1}.{_IN_BLOCKS[kind][inner]}"


def _leaf(
    path, architecture: str, name: str, tensor: Tensor, expected: tuple[int, ...]
) -> np.ndarray:
    """An array as the codec takes it."""
    theirs, change = _form(architecture, name, expected)
    if tensor.shape != theirs:
        raise IcmError(f"{path} has {name} of shape {list(tensor.shape)}, expected {list(theirs)}")
    value = tensor.read()
    if not np.isfinite(value).all():
        raise IcmError(f"{path} has numbers in {name} that are not finite")
    return np.ascontiguousarray(change(value), np.float32)


def _form(
    architecture: str, name: str, expected: tuple[int, ...]
) -> tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]:
    """(shape of an array in the file, what makes ours, of the `expected` shape, of it)."""
    if name == _QUANTILES:
        return (*expected, 1, 3), lambda x: x[:, 0, 1]
    if name.endswith(".gamma"):
        return expected, lambda x: x.T
    shuffled = architecture == SERIAL[1] and _SHUFFLED.match(name)
    transposed = architecture != SERIAL[1] and _TRANSPOSED.match(name)
    as_pixels = architecture == SERIAL[0] and transposed and name.startswith("h_s.")
    if len(expected) != 4:
        if as_pixels:
            return (expected[0] // 4,), lambda x: np.tile(x, 4)
        return expected, _unshuffled if shuffled else lambda x: x
    rows, columns, inputs, outputs = expected
    if name == "context_prediction.weight":
        return (outputs, inputs // context.SEEN, 5, 5), _before_the_middle
    if as_pixels:
        return (inputs, outputs // 4, 5, 5), lambda x: sub_pixel(x.transpose(2, 3, 0, 1))
    if transposed:
        return (inputs, outputs, rows, columns), lambda x: x.transpose(2, 3, 0, 1)
    ordered = _unshuffled if shuffled else lambda x: x
    return (outputs, inputs, rows, columns), lambda x: ordered(x).transpose(2, 3, 1, 0)


_TRANSPOSED = re.compile(r"g_s\.|h_s\.[02]\.")
"""Transposed convolutions, but in cheng2020-anchor."""
_SHUFFLED = re.compile(r"g_s\.\d\.(subpel_conv\.0|upsample\.0|0)\.|h_s\.[26]\.0\.")
"""Of cheng2020-anchor, what comes before a pixel shuffle."""


def _unshuffled(x: np.ndarray) -> np.ndarray:
    """Outputs [4 F, ...], a feature's four pixels side by side, in the order of depth to space."""
    return x.reshape(-1, 4, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _before_the_middle(x: np.ndarray) -> np.ndarray:
    """A masked kernel [C', C, 5, 5] as [1, 1, 12 C, C'], of what `context.around` gives."""
    outputs, inputs = x.shape[:2]
    seen = x.reshape(outputs, inputs, -1)[:, :, : context.SEEN]
    return seen.transpose(2, 1, 0).reshape(1, 1, context.SEEN * inputs, outputs)
