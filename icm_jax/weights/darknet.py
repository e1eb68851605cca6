"""Darknet's .weights files: a header, then per convolution, in order, float32 little-endian

    with BatchNorm   bias, scale, mean, variance [C'] each, then the kernel [C', C, k, k]
    without          bias [C'], then the kernel

The header is three int32 (major, minor, revision) and the number of images seen, 64 bits since
version 0.2, 32 before. Nothing in the file says which network it belongs to: the byte count must be
exact.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from icm_jax.errors import IcmError
from icm_jax.files import write_whole

_NORM = (("params", "bias"), ("params", "scale"), ("batch_stats", "mean"), ("batch_stats", "var"))


def detector(path: str | os.PathLike, shapes: Mapping[str, Any]) -> dict:
    """A reader (see `icm_jax.weights`) of the networks under `detector`.

    Raises: IcmError as `read`, or if the task has no detector.
    """
    if "detector" not in shapes["params"]:
        raise IcmError(
            f"{path}: Darknet's weights are those of detectors; this task has "
            f"{', '.join(shapes['params'])}"
        )
    trees = read(
        path, {name: tree["detector"] for name, tree in shapes.items() if "detector" in tree}
    )
    return {collection: {"detector": tree} for collection, tree in trees.items()}


def read(path: str | os.PathLike, shapes: Mapping[str, Any], whole: bool = False) -> dict:
    """Variables of a detector from a .weights file.

    Args:
      shapes: {"params": ..., "batch_stats": ...} of the whole `icm_jax.nets.detector.Part`, arrays
        or their shapes.
      whole: whether the file must have all of them.

    Returns: the same, float32 NumPy arrays. If it need not be whole, a file may end with any layer
    before the first without BatchNorm (as darknet53.conv.74, a backbone alone, does); it gives the
    layers that it has.

    Raises: IcmError if the file is missing, not Darknet's, or holds another number of weights.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise IcmError(f"cannot read the weights {path}: {error.strerror or error}") from error
    version = np.frombuffer(data[:12].ljust(12, b"\xff"), "<i4")
    if not (0 <= version[0] < 10 and 0 <= version[1] < 100 and version[2] >= 0):
        raise IcmError(f"{path} is not a Darknet .weights file: its header is no version number")
    header = 20 if version[0] * 10 + version[1] >= 2 else 16
    plan = _plan(shapes)
    sizes = [sum(math.prod(shape) for *_, shape in tensors) for tensors in plan]
    ends = [header + 4 * total for total in itertools.accumulate(sizes)]
    normalised = itertools.takewhile(lambda tensors: len(tensors) > 2, plan)
    allowed = [*(() if whole else ends[: len(list(normalised))]), ends[-1]]
    if len(data) not in allowed:
        what = "is truncated" if len(data) < ends[-1] else "is longer than that"
        raise IcmError(
            f"{path} has {len(data):,} bytes; this network's weights take {ends[-1]:,}: the file "
            f"{what}, or belongs to another network or number of classes"
        )
    values = np.frombuffer(data, "<f4", offset=header)
    variables: dict = {"params": {}, "batch_stats": {}}
    at = 0
    for collection, layer, name, shape in itertools.chain(*plan[: ends.index(len(data)) + 1]):
        size = math.prod(shape)
        leaf = values[at : at + size].reshape(shape)
        leaf = leaf.transpose(2, 3, 1, 0) if len(shape) == 4 else leaf
        variables[collection].setdefault(layer, {})[name] = np.array(leaf, np.float32)
        at += size
    return variables


def write(path: str | os.PathLike, variables: Mapping[str, Any], seen: int = 0) -> None:
    """Writes what `read` reads; `variables` of a whole detector. Raises: IcmError."""
    parts = [np.array([0, 2, 0], "<i4").tobytes(), np.array([seen], "<u8").tobytes()]
    for collection, layer, name, _ in itertools.chain(*_plan(variables)):
        leaf = np.asarray(variables[collection][layer][name], "<f4")
        parts.append((leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf).tobytes())
    write_whole(path, b"".join(parts))


def _plan(shapes: Mapping[str, Any]) -> list[list[tuple]]:
    """Per convolution [(collection, name of the layer, name, shape in the file)]."""
    params = shapes["params"]
    numbers = sorted(int(name[5:]) for name in params if name.startswith("layer"))
    plan = []
    for number in numbers:
        rows, columns, before, features = params[f"layer{number}"]["kernel"].shape
        kernel = ("params", f"layer{number}", "kernel", (features, before, rows, columns))
        norms = [(c, f"norm{number}", name, (features,)) for c, name in _NORM]
        bias = [("params", f"layer{number}", "bias", (features,))]
        plan.append([*(norms if f"norm{number}" in params else bias), kernel])
    return plan
