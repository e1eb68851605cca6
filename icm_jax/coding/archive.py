"""Codec files as archives, and what their model.json says: all of it without JAX."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from icm_jax.coding.container import Header
from icm_jax.errors import IcmError

BOXED = pathlib.Path(__file__).parent.parent / "models" / "photo.icmc"
"""The model in the package; models/photo.md is its card."""
VERSION = 1
MAGIC = b"PK"
"""How an .icmc file begins; an .icm file begins otherwise."""


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
    return read(path, lambda file: None)[0]


def read(path: str | os.PathLike, take: Callable[[Any], Any]) -> tuple[dict, Any]:
    """(model.json, what `take` makes of the open archive).

    Raises: IcmError if the file is missing, damaged, not a codec, or of another version.
    """
    if path == BOXED and not BOXED.exists():
        raise IcmError(
            "this copy of icm_jax has no model in the package; train one with "
            "configs/hyperprior.py and give its codec.icmc"
        )
    try:
        with open(path, "rb") as stored:
            if stored.read(len(MAGIC)) != MAGIC:  # NumPy would speak of pickles
                raise ValueError("no archive")
            stored.seek(0)
            with np.load(stored, allow_pickle=False) as file:
                facts = about(file)
                if facts["version"] == VERSION:
                    return facts, take(file)
    except OSError as error:
        raise IcmError(f"cannot read the codec {path}: {error.strerror or error}") from error
    except Exception as error:  # the errors of zipfile, zlib, JSON and NumPy have no common base
        reason = f"{path} is not a readable codec file: truncated, damaged or of other origin"
        raise IcmError(f"{reason} ({error})") from error
    raise IcmError(
        f"{path} is a codec file of version {facts['version']}, this icm_jax reads version "
        f"{VERSION}; use the release that wrote it, or freeze the trained model again"
    )


def about(file) -> dict:
    """model.json of an open archive."""
    return json.loads(file["model.json"].tobytes())
