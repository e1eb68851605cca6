"""Checkpoints of CompressAI's image codecs, as variables of `icm_jax.codecs.compressai`.

    g_a.0 .2 .4 .6, g_s.0 .2 .4 .6     convolutions 5×5, GDN between them
    h_a.0 .2 .4, h_s.0 .2 .4           of the hyperprior
    entropy_bottleneck                 densities; up to release 1.2.6 with _matrix0 for matrices.0

Names may have a prefix (state_dict., module., ...), which is found by itself. Kernels
[C', C, k, k], of transposed convolutions [C, C', k, k], become [k, k, C, C']; GDN's γ is
transposed, and β and γ are stored under the same root and bound. Tables are left: a frozen codec
has its own.
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
from icm_jax.codecs.compressai import ARCHITECTURES, compressai_codec
from icm_jax.errors import IcmError
from icm_jax.weights.tensors import Tensor, tensors

_QUANTILES = "entropy_bottleneck.quantiles"
_OLD = re.compile(r"entropy_bottleneck\._(matrix|bias|factor)(\d)$")
_PLURAL = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
_TABLES = re.compile(
    r"(entropy_bottleneck|gaussian_conditional)\.(_offset|_quantized_cdf|_cdf_length|target|"
    r"scale_table|scale_bound|.*lower_bound.*)$|.*_reparam\.(pedestal|lower_bound\.bound)$"
)
_SERIAL = {
    "context_prediction.weight": "a context model in raster order, whose elements wait for one "
    "another",
    "g_a.0.conv1.weight": "residual blocks",
    "g_a.0.conv.0.weight": "attention",
}
"""What tells an architecture that is not read, and what it has."""


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
    names = {place: _name(place[2:]) for place in needed}
    for name in sorted(names.values()):
        if name not in found:
            raise IcmError(f"{path} lacks {name}, which {told} has; it is not whole")
    spare = {name for name in found if not _TABLES.match(name)} - set(names.values())
    if spare:
        raise IcmError(f"{path} holds {min(spare)}, which {told} has not; it is another network")
    leaves = {
        place: _leaf(path, name, found[name], needed[place].shape) for place, name in names.items()
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

    for name, what in _SERIAL.items():
        if name in found:
            raise IcmError(
                f"{path} has {what} ({name}), as mbt2018 and the codecs of cheng2020 have; of "
                f"CompressAI's codecs those without are imported: {', '.join(ARCHITECTURES)}"
            )
    first, last = sides("g_a.0.weight"), sides("g_a.6.weight")
    if len(first) != 4 or len(last) != 4:
        raise IcmError(f"{path} lacks g_a.0.weight or g_a.6.weight, convolutions of all codecs")
    channels, outputs = last[0], sides("h_s.4.weight")[:1]
    if not any(name.startswith(("h_a.", "h_s.")) for name in found):
        return ARCHITECTURES[0], first[0], channels
    if outputs not in ((channels,), (2 * channels,)):
        raise IcmError(
            f"{path} has a hyper-synthesis h_s that ends in {list(outputs)} channels for "
            f"{channels} of y; expected one or two for each, as {' and '.join(ARCHITECTURES[1:])} "
            "have"
        )
    return ARCHITECTURES[1 if outputs == (channels,) else 2], first[0], channels


_STEMS = {"analysis": "g_a", "synthesis": "g_s", "hyper_analysis": "h_a", "hyper_synthesis": "h_s"}
_LEAVES = {"kernel": "weight", "bias": "bias", "beta": "beta", "gamma": "gamma"}


def _name(place: tuple[str, ...]) -> str:
    """CompressAI's name of a parameter below `PART`."""
    network, *rest = place
    if network == "median":
        return _QUANTILES
    if network == "prior":
        kind, _, number = rest[0].partition("_")
        return f"entropy_bottleneck.{_PLURAL[kind]}.{number}"
    layer, _, count = rest[0].partition("_")
    number = 2 * int(count) + (layer == "GDN")
    if network == "hyper_analysis" and layer == "Down":
        number += 2
    if network == "hyper_synthesis" and layer == "Conv":
        number = 4
    return f"{_STEMS[network]}.{number}.{_LEAVES[rest[1]]}"


def _leaf(path, name: str, tensor: Tensor, expected: tuple[int, ...]) -> np.ndarray:
    """An array as the codec takes it."""
    transposed = name.startswith("g_s.") or name in ("h_s.0.weight", "h_s.2.weight")
    change: Callable[[np.ndarray], np.ndarray] = lambda x: x  # noqa: E731
    theirs = expected
    if name == _QUANTILES:
        theirs, change = (*expected, 1, 3), lambda x: x[:, 0, 1]
    elif name.endswith(".gamma"):
        change = lambda x: x.T  # noqa: E731
    elif len(expected) == 4:
        rows, columns, inputs, outputs = expected
        theirs = (inputs, outputs) if transposed else (outputs, inputs)
        theirs, order = (*theirs, rows, columns), (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
        change = lambda x: x.transpose(order)  # noqa: E731
    if tensor.shape != theirs:
        raise IcmError(f"{path} has {name} of shape {list(tensor.shape)}, expected {list(theirs)}")
    value = tensor.read()
    if not np.isfinite(value).all():
        raise IcmError(f"{path} has numbers in {name} that are not finite")
    return np.ascontiguousarray(change(value), np.float32)
