"""Files of named arrays: .safetensors by NumPy alone, PyTorch's where PyTorch is installed.

A .safetensors file is the length of its header, 64 bits, little-endian; the header, JSON with the
type, the shape and the place of each array; and their bytes. What a file is, is read off its first
bytes, not off its name: PyTorch's are called .pth, .pt, .pth.tar, .bin, .ckpt.

Nothing is read before its shape is known: a file gives no more than its own size.
"""

import importlib
import json
import math
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from icm_jax.errors import IcmError, reason

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16}
_MOST_HEADER = 100_000_000  # bytes; as the format's own library has it
_DEEPEST = 4  # dicts within dicts of a checkpoint
_CONVERT = (
    'python -c "import sys, torch, safetensors.torch as s; '
    "c = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "c = c.get('state_dict', c.get('model', c)); "
    "s.save_file({k: v.clone() for k, v in c.items() if hasattr(v, 'clone')}, sys.argv[2])\" "
    "FROM.pth TO.safetensors"
)


class Tensor(NamedTuple):
    """One array of a file. shape: its sides. read: gives it, float32. Raises IcmError if it does
    not hold real numbers."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All arrays of a file; of nested dicts, as checkpoints are, by their names joined by dots.

    Raises: IcmError if the file cannot be read, is damaged or of another kind, or is PyTorch's and
      PyTorch is not installed.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(9)
    except OSError as error:
        raise IcmError(f"cannot read the weights {path}: {error.strerror or error}") from error
    if first[8:] == b"{":
        return _of_safetensors(pathlib.Path(path))
    if first[:4] == b"PK\x03\x04" or first[:1] == b"\x80":  # a zip file; a pickle
        return _of_torch(pathlib.Path(path), zipped=first[:1] == b"P")
    raise IcmError(
        f"{path} is neither a .safetensors file nor one of PyTorch's; it begins with {first!r}"
    )


def _of_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MOST_HEADER):
            raise IcmError(
                f"{path} is truncated or no .safetensors file: its header would have {length:,} "
                f"bytes, the file has {size:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        told = {name: _told(**entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IcmError(
            f"{path} is damaged: its header is not that of a .safetensors file ({reason(error)})"
        ) from error
    end = max((end for *_, end in told.values()), default=0)
    if 8 + length + end != size:
        what = "truncated" if 8 + length + end > size else "longer than its header says"
        raise IcmError(f"{path} is {what}: {8 + length + end:,} bytes by its header, here {size:,}")
    data = np.memmap(path, np.uint8, "r", 8 + length) if end else np.zeros(0, np.uint8)

    def tensor(name, kind, shape, begin, end):
        def read():
            if kind not in FLOATS:
                raise IcmError(f"{path} holds {name} as {kind}; expected {', '.join(FLOATS)}")
            return data[begin:end].view(FLOATS[kind]).reshape(shape).astype(np.float32)

        return Tensor(shape, read)

    return {name: tensor(name, *entry) for name, entry in told.items()}


def _told(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple:
    """(type, shape, first byte, last byte + 1) of an entry. Raises: ValueError, TypeError."""
    begin, end = data_offsets
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError(f"shape {shape} at {data_offsets}")
    if dtype in FLOATS and math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize != end - begin:
        raise ValueError(f"shape {shape} of {dtype} in {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _of_torch(path: pathlib.Path, zipped: bool) -> dict[str, Tensor]:
    """By `torch.load(weights_only=True)`, which runs no code that a file brings."""
    if zipped:
        _check_zip(path)
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise IcmError(
            f"{path} is a file of PyTorch's, which is not installed: pip install torch; or convert "
            f"it, where PyTorch and safetensors are installed: {_CONVERT}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old files
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:  # torch's own text advises to run the file's code
        raise IcmError(
            f"{path} holds more than weights, or is damaged: torch.load(weights_only=True) refuses "
            "it. Save its state_dict alone, where you trust the file"
        ) from error
    except Exception as error:  # which ones, torch does not say
        raise IcmError(f"{path} cannot be read by PyTorch: {reason(error)}") from error
    found: dict[str, Tensor] = {}
    left: list[tuple[str, int, Any]] = [("", 0, whole)]
    while left:
        name, depth, value = left.pop()
        if isinstance(value, torch.Tensor):
            found[name] = _of_tensor(path, name, value, value.layout == torch.strided)
        elif isinstance(value, dict) and depth < _DEEPEST:
            inner = [(f"{name}.{key}" if name else str(key), v) for key, v in value.items()]
            left += [(key, depth + 1, v) for key, v in reversed(inner)]
    return found


def _check_zip(path: pathlib.Path) -> None:
    """That nothing in it swells. Raises: IcmError."""
    try:
        with zipfile.ZipFile(path) as file:
            total = sum(entry.file_size for entry in file.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise IcmError(f"{path} is truncated or damaged: {reason(error)}") from error
    if total > 2 * path.stat().st_size:  # arrays are stored as they are
        raise IcmError(f"{path} is no file that PyTorch writes: it swells to {total:,} bytes")


def _of_tensor(path, name: str, tensor, dense: bool) -> Tensor:
    def read():
        if not dense or tensor.is_meta or not tensor.is_floating_point():
            raise IcmError(f"{path} holds {name} as {tensor.dtype}; expected real numbers")
        return np.array(tensor.detach().float().numpy())

    return Tensor(tuple(tensor.shape), read)
