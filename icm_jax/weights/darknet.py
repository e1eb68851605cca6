"""Darknet's .weights files: a header, then per convolution, in order, float32 little-endian

    with BatchNorm   bias, scale, mean, variance [C'] each, then the kernel [C', C, k, k]
    linear           bias [C'], then the kernel

The header is three int32 (major, minor, revision) and the number of images seen, 64 bits since
version 0.2, 32 before. Nothing in the file says which network it belongs to: the byte count must be
exact.
"""

import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from icm_jax.errors import IcmError
from icm_jax.files import write_whole
from icm_jax.nets.yolo import Layer

_NORM = (("params", "bias"), ("params", "scale"), ("batch_stats", "mean"), ("batch_stats", "var"))


def read(path: str | os.PathLike, table: tuple[Layer, ...], channels: int = 3) -> dict:
    """Variables of `Part` from a .weights file of the network `table`.

    Args:
      channels: of the image.

    Returns: {"params": ..., "batch_stats": ...}, float32 NumPy arrays. A file of the backbone
    alone (as darknet53.conv.74) gives the backbone's layers.

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
    plan = _plan(table, channels)
    sizes = np.cumsum([sum(math.prod(shape) for *_, shape in tensors) for _, tensors in plan])
    backbone = sum(number < _backbone_end(table) for number, _ in plan)
    allowed = {header + 4 * int(sizes[count - 1]): count for count in (backbone, len(plan))}
    if len(data) not in allowed:
        whole, part = header + 4 * int(sizes[-1]), header + 4 * int(sizes[backbone - 1])
        what = "is truncated" if len(data) < whole else "is longer than that"
        raise IcmError(
            f"{path} has {len(data):,} bytes; this network's weights take {whole:,} (its "
            f"backbone's {part:,}): the file {what}, or belongs to another network or number of "
            "classes"
        )
    values = np.frombuffer(data, "<f4", offset=header)
    variables: dict = {"params": {}, "batch_stats": {}}
    at = 0
    for _, tensors in plan[: allowed[len(data)]]:
        for collection, layer, name, shape in tensors:
            size = math.prod(shape)
            own = values[at : at + size].reshape(shape)
            own = own.transpose(2, 3, 1, 0) if len(shape) == 4 else own
            variables[collection].setdefault(layer, {})[name] = np.array(own, np.float32)
            at += size
    return variables


def write(path: str | os.PathLike, table: tuple[Layer, ...], variables: Mapping, seen: int = 0):
    """Writes what `read` reads; `variables` of all layers of `table`. Raises: IcmError."""
    channels = np.shape(variables["params"]["layer0"]["kernel"])[2]
    parts = [np.array([0, 2, 0], "<i4").tobytes(), np.array([seen], "<u8").tobytes()]
    for _, tensors in _plan(table, channels):
        for collection, layer, name, _ in tensors:
            own = np.asarray(variables[collection][layer][name], "<f4")
            parts.append((own.transpose(3, 2, 0, 1) if own.ndim == 4 else own).tobytes())
    write_whole(path, b"".join(parts))


def _backbone_end(table):
    return max(i for i, layer in enumerate(table) if layer.kind == "shortcut") + 1


def _plan(table, channels):
    """[(layer number, [(collection, name of the layer, name, shape in the file)])]."""
    out, plan = [], []
    for number, layer in enumerate(table):
        before = out[-1] if out else channels
        if layer.kind in ("conv", "linear"):
            kernel = ("params", f"layer{number}", "kernel")
            shape = (layer.features, before, layer.kernel, layer.kernel)
            norms = [(c, f"norm{number}", name, shape[:1]) for c, name in _NORM]
            bias = [("params", f"layer{number}", "bias", shape[:1])]
            plan.append((number, [*(norms if layer.kind == "conv" else bias), (*kernel, shape)]))
            out.append(layer.features)
        elif layer.kind == "route":
            out.append(sum(out[i] for i in layer.inputs))
        else:  # shortcut, upsample, detect
            out.append(before)
    return plan
