"""ResNets of PyTorch: torchvision's names, and those of MoCo v2 and others who use its networks.

    conv1, bn1, layer1                      head: stem, stem_bn, layer1
    layer2, layer3, layer4                  tail
    fc                                      classifier
    fc.0, fc.2 of a contrastive network     projector

Names may have a prefix (module.encoder_q., backbone., state_dict.module., ...), which is found by
itself; of MoCo's two networks the one that was trained, encoder_q, is taken. Kernels [C', C, k, k]
become [k, k, C, C']. Their BatchNorm adds 1e-5 to the variance, as ours does, and they see
(x / 255 - mean) / std of ImageNet, as `icm_jax.ops.normalise` has it. A bottleneck has its stride
in the 3×3 there ("ResNet v1.5"): `stride_in_1x1=False`.
"""

import collections
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from icm_jax.errors import IcmError
from icm_jax.nets.resnet import STAGES
from icm_jax.weights.tensors import Tensor, tensors

_FIRST = "layer1.0.conv1.weight"
_TRAINED = ("encoder_q", "base_encoder")
"""Of two networks of which one follows the other (MoCo, MoCo v3), the one that was trained."""
_LAYERS = {"stem": "conv1", "stem_bn": "bn1", "shortcut_conv": "downsample.0"}
_LAYERS |= {"shortcut_bn": "downsample.1", "Dense_0": "fc.0", "Dense_1": "fc.2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TRUNK, _HEADS = ("head", "tail"), ("projector", "classifier")


class Kind(NamedTuple):
    """block: "basic" or "bottleneck". depths: {layer: its blocks}. width: of layer 1."""

    block: str
    depths: dict[int, int]
    width: int

    def __str__(self) -> str:
        whole = tuple(self.depths.get(number, 0) for number in range(1, 5))
        names = [f"variant {n}, " for n, row in STAGES.items() if row == (self.block, whole)]
        blocks = "-".join(str(depth) for depth in self.depths.values())
        layers = f"{self.block} blocks {blocks} in layers {'-'.join(map(str, self.depths))}"
        return f"{''.join(names)}width {self.width} ({layers})"


def backbone(path: str | os.PathLike, shapes: Mapping[str, Any]) -> dict:
    """A reader (see `icm_jax.weights`) of head and tail, which a file must have whole, and of the
    classifier and the projector, where it has them in the task's shapes. What is left of the file
    is named on standard error.

    Raises: IcmError if the file cannot be read, holds no ResNet, several, or another than the task
      has, or if a number is not finite or a variance negative.
    """
    trees = {c: shapes.get(c, {}) for c in ("params", "batch_stats")}
    if not set(_TRUNK) & set(trees["params"]):
        there = ", ".join(trees["params"])
        raise IcmError(f"{path} is for the head and the tail of a ResNet; this task has {there}")
    own: dict = flax.traverse_util.flatten_dict(
        {c: {k: v for k, v in t.items() if k in _TRUNK + _HEADS} for c, t in trees.items()}
    )
    found = tensors(path)
    prefix = _prefix(path, found)
    _check_kind(path, found, prefix, own)
    taken = {*_TRUNK, *_fitting_heads(found, prefix, own)}
    names = {place: prefix + _name(place) for place in own if place[1] in taken}
    lacking = [name for name in names.values() if name not in found]
    if lacking:
        raise IcmError(f"{path} lacks {_some(lacking)}, which this task's ResNet has")
    leaves = {place: _leaf(path, name, found[name], own[place]) for place, name in names.items()}
    if jax.process_index() == 0:
        left = _groups(found.keys() - names.values(), prefix)
        told = f"; left there: {', '.join(left)}" if left else ""
        print(f"{path}: {len(leaves)} arrays {_called(prefix)}taken{told}", file=sys.stderr)
    return flax.traverse_util.unflatten_dict(leaves)


def _prefix(path, found: Mapping[str, Tensor]) -> str:
    """What stands before the names of a file's ResNet. Raises: IcmError for none or several."""
    prefixes = sorted(
        name.removesuffix(_FIRST) for name in found if ("." + name).endswith("." + _FIRST)
    )
    if len(prefixes) > 1:
        trained = [p for p in prefixes if _last(p) in _TRAINED]
        prefixes = trained if len(trained) == 1 else prefixes
    if not prefixes:
        there = _some(sorted(found)) if found else "no arrays"
        raise IcmError(
            f"{path} has {there}, and no {_FIRST}: it is no ResNet under torchvision's names"
        )
    if len(prefixes) > 1:
        several = ", ".join(repr(p) for p in prefixes[:4])
        raise IcmError(f"{path} holds {len(prefixes)} ResNets: {several}; keep one of them in it")
    return prefixes[0]


def _check_kind(path, found: Mapping[str, Tensor], prefix: str, own: Mapping) -> None:
    """That the file's ResNet has the blocks and the width of the task's. Raises: IcmError."""
    pattern = re.compile(re.escape(prefix) + r"layer([1-4])\.(\d{1,3})\.")
    blocks = {match.groups() for match in map(pattern.match, found) if match}
    there = collections.Counter(int(layer) for layer, _ in blocks)
    stem = found.get(prefix + "conv1.weight", found[prefix + _FIRST])
    block = "bottleneck" if prefix + "layer1.0.conv3.weight" in found else "basic"
    kind = Kind(block, dict(sorted(there.items())), stem.shape[0] if stem.shape else 0)
    layers = {place[2:4] for place in own if place[2].startswith("layer")}
    here = collections.Counter(int(layer.removeprefix("layer")) for layer, _ in layers)
    block = "bottleneck" if any("conv3" in place for place in own) else "basic"
    first = min(here)
    part = "head" if first == 1 else "tail"
    inner = own["params", part, f"layer{first}", "block0", "conv1", "kernel"].shape[-1]
    asked = Kind(block, dict(sorted(here.items())), inner // 2 ** (first - 1))
    same = {layer: kind.depths.get(layer, 0) for layer in asked.depths} == asked.depths
    if not same or (kind.block, kind.width) != (asked.block, asked.width):
        raise IcmError(f"{path} is a ResNet of {kind}; this task has {asked}")


def _fitting_heads(found: Mapping[str, Tensor], prefix: str, own: Mapping) -> set[str]:
    """The heads that a file has whole and in the task's shapes. The last layer of a contrastive
    network is no classifier, even where it has as many outputs (MoCo v1's)."""
    fits = {place[1] for place in own} & set(_HEADS)
    fits -= {"classifier"} if _last(prefix) in _TRAINED else set()
    for place, shape in own.items():
        tensor = found.get(prefix + _name(place))
        if tensor is None or tensor.shape != _turned(shape.shape):
            fits.discard(place[1])
    return fits


def _leaf(path, name: str, tensor: Tensor, expected: Any) -> np.ndarray:
    """One array in our layout. Raises: IcmError."""
    if tensor.shape != _turned(expected.shape):
        raise IcmError(
            f"{path} has {name} of shape {tensor.shape}; this task's ResNet has "
            f"{_turned(expected.shape)}"
        )
    array = tensor.read()
    if not np.isfinite(array).all() or (name.endswith("running_var") and (array < 0).any()):
        raise IcmError(f"{path} is damaged: {name} has values that cannot be")
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file of what has `shape` here."""
    return tuple(shape[axis] for axis in (3, 2, 0, 1)) if len(shape) == 4 else shape[::-1]


def _name(place: tuple[str, ...]) -> str:
    """The name in a file, behind its prefix, of (collection, part, layers ..., leaf)."""
    *layers, leaf = place[2:]
    names = [_LAYERS.get(layer, layer.removeprefix("block")) for layer in layers] or ["fc"]
    return ".".join([*names, _LEAVES.get(leaf, leaf)])


def _groups(names: Iterable[str], prefix: str) -> list[str]:
    """Names by the first of their parts that is not the prefix's, with counts: "fc (2)"."""
    counts: collections.Counter = collections.Counter()
    begin = prefix.split(".")[:-1]
    for name in names:
        parts = name.split(".")
        if parts[-1] == "num_batches_tracked":  # nothing uses it
            continue
        same = (i for i, (a, b) in enumerate(zip(parts, begin, strict=False)) if a != b)
        counts[".".join(parts[: next(same, len(begin)) + 1])] += 1
    return [f"{name} ({count})" for name, count in sorted(counts.items())]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def _called(prefix: str) -> str:
    return f"under {prefix} " if prefix else ""


def _last(prefix: str) -> str:
    return prefix.rstrip(".").rpartition(".")[2]
