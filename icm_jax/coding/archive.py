"""Codec files as archives, and what their model.json says: all of it without JAX.

Nothing is believed before it is checked: sizes are read off the headers of the arrays, and no array
is read that is not asked for.
"""

import contextlib
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from icm_jax.coding.container import Header
from icm_jax.errors import IcmError

BOXED = pathlib.Path(__file__).parent.parent / "models" / "photo.icmc"
"""The model in the package; models/photo.md is its card."""
VERSION = 1
MAGIC = b"PK"
"""How an .icmc file begins; an .icm file begins otherwise."""
ABOUT = "model.json"
MAX_ABOUT = 1 << 20
"""Bytes of model.json; the table of a detector takes some kilobytes."""
MAX_ARRAYS = 1 << 13
MAX_BYTES = 1 << 30
"""Of all arrays: a file can claim gigabytes in a few kilobytes; more is refused before memory is
taken."""
TYPES = ("float16", "float32", "int8", "int32", "uint8")
_PIECE = 1 << 18  # bytes that are inflated at a time


class Stored(NamedTuple):
    """An array that is not read yet: what its header says, and how to read it, once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Archive(NamedTuple):
    """An open codec file: what model.json says, and the other arrays by name."""

    about: dict
    arrays: Mapping[str, Stored]


def packaged(header: Header) -> pathlib.Path:
    """Of the models in the package the one that wrote a file with this header, or else the newest.
    Earlier ones lie beside it, with their fingerprints in their names."""
    earlier = BOXED.with_name(f"{BOXED.stem}-{header.fingerprint.hex()}{BOXED.suffix}")
    return earlier if earlier.is_file() else BOXED


def describe(path: str | os.PathLike) -> dict:
    """What `model.json` of a codec file says: version, codec, fingerprint, licence, description,
    and detector if it has one.

    Raises: IcmError if the file is missing, damaged, not a codec, or of another version.
    """
    return read(path, lambda archive: archive.about)


def read(path: str | os.PathLike, take: Callable[[Archive], Any]) -> Any:
    """What `take` makes of the open archive.

    Raises: IcmError if the file is missing, damaged, not a codec, of another version, or larger
      than `MAX_BYTES`; and for whatever `take` raises.
    """
    if path == BOXED and not BOXED.exists():
        raise IcmError(
            "this copy of icm_jax has no model in the package; train one with "
            "configs/hyperprior.py and give its codec.icmc"
        )
    try:
        with open(path, "rb") as file, contextlib.ExitStack() as members:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("no archive")
            with zipfile.ZipFile(file) as archive:
                return take(_opened(archive, members))
    except OSError as error:
        raise IcmError(f"cannot read the codec {path}: {error.strerror or error}") from error
    except IcmError as error:
        raise IcmError(f"{path}: {error}") from error
    except Exception as error:  # the errors of zipfile, zlib, JSON and NumPy have no common base
        reason = f"{path} is not a readable codec file: truncated, damaged or of other origin"
        raise IcmError(f"{reason} ({str(error)[:200] or type(error).__name__})") from error


def _opened(archive: zipfile.ZipFile, members: contextlib.ExitStack) -> Archive:
    """Raises: IcmError for what no codec file of this version holds."""
    entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    if ABOUT not in entries:
        raise ValueError(f"no {ABOUT}")
    stored = _member(archive, ABOUT, entries.pop(ABOUT), members)
    if math.prod(stored.shape) > MAX_ABOUT:
        raise IcmError(f"its {ABOUT} has {math.prod(stored.shape)} bytes; at most {MAX_ABOUT}")
    about = _about(stored.read().tobytes())
    if len(entries) > MAX_ARRAYS:
        raise IcmError(f"it holds {len(entries)} arrays; at most {MAX_ARRAYS} are read")
    arrays = {name: _member(archive, name, entry, members) for name, entry in entries.items()}
    total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    if total > MAX_BYTES:
        raise IcmError(
            f"its arrays take {total} bytes; at most {MAX_BYTES} are read: raise "
            "icm_jax.coding.archive.MAX_BYTES if the model is really so large"
        )
    return Archive(about, arrays)


def _about(text: bytes) -> dict:
    """model.json; of another version than this one's nothing but the version is looked at."""
    facts = json.loads(text, parse_constant=lambda name: _refuse(f"{ABOUT} holds {name}"))
    if not isinstance(facts, dict) or not isinstance(facts.get("version"), int):
        raise IcmError(f"its {ABOUT} does not say of which version it is")
    if facts["version"] != VERSION:
        raise IcmError(
            f"a codec file of version {facts['version']}, this icm_jax reads version {VERSION}; "
            "use the release that wrote it, or freeze the trained model again"
        )
    match facts:
        case {"codec": [str(), [*items]], "fingerprint": str()} if all(
            isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in items
        ):
            return facts
    raise IcmError(f"its {ABOUT} lacks a codec or a fingerprint")


def _refuse(reason: str):
    raise IcmError(reason)


def _member(archive: zipfile.ZipFile, name: str, entry, members: contextlib.ExitStack) -> Stored:
    """An array of the archive; only its header is read."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise IcmError(f"{name} is compressed by another method than deflation")
    member: Any = members.enter_context(archive.open(entry))
    if np.lib.format.read_magic(member) != (1, 0):  # later ones are for headers of megabytes
        raise IcmError(f"{name} is an array of another version than 1.0")
    shape, turned, dtype = np.lib.format.read_array_header_1_0(member)
    if (
        dtype.name not in TYPES
        or not dtype.isnative
        or not all(0 <= side < 1 << 31 for side in shape)
    ):
        raise IcmError(f"{name} is {dtype.str[:40]}, of rank {len(shape)}; no codec has such")

    def read() -> np.ndarray:
        array = np.empty(shape[::-1] if turned else shape, dtype)
        content: Any = array.reshape(-1).view(np.uint8)
        for begin in range(0, len(content), _PIECE):
            piece = content[begin : begin + _PIECE]
            if member.readinto(piece) != len(piece):
                raise IcmError(f"{name} ends early")
        return array.T if turned else array

    return Stored(shape, dtype, read)
