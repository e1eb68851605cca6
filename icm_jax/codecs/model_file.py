"""Frozen codecs as files: weights, integer tables, configuration and terms of use in one .icmc.

An .icmc file is a NumPy .npz archive without pickled objects: `model.json` (UTF-8 bytes: version,
configuration, fingerprint, licence, description), `variables/...` and `tables/...`. Weights that
half precision holds exactly are stored in it, and come back as float32.
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from icm_jax.codecs import needs
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.codecs.codec import Codec, tupled
from icm_jax.codecs.scalable import upgraded
from icm_jax.coding import archive
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError
from icm_jax.files import write_whole


def save(
    path: str | os.PathLike,
    frozen: FrozenCodec,
    *,
    licence: str = "",
    description: str = "",
    detector: Mapping | None = None,
) -> None:
    """Writes a frozen codec to one file, whole or not at all.

    Args:
      licence: the terms under which the file may be used.
      description: what it was trained on and for; both are shown by `icm info`.
      detector: of a codec with a detector, what turns its outputs into boxes: "classes" (names),
        "anchor_scale", "overlap" and "limit" (fields of `icm_jax.tasks.detection`).

    Raises: IcmError if the file cannot be written; one that was there is kept.
    """
    write_whole(path, packed(frozen, licence=licence, description=description, detector=detector))


def packed(
    frozen: FrozenCodec,
    *,
    licence: str = "",
    description: str = "",
    detector: Mapping | None = None,
) -> bytes:
    """The bytes that `save` writes."""
    flat: dict = flax.traverse_util.flatten_dict(frozen.variables, sep="/")
    arrays: dict[str, Any] = {f"variables/{key}": _narrowed(value) for key, value in flat.items()}
    for name, tables in frozen.tables.items():
        arrays[f"tables/{name}/cdf"], arrays[f"tables/{name}/offsets"] = tables.cdf, tables.offsets
    about = {
        "version": archive.VERSION,
        "codec": frozen.codec.config,
        "fingerprint": frozen.fingerprint.hex(),
        "licence": licence,
        "description": description,
    } | ({"detector": dict(detector)} if detector else {})
    arrays[archive.ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    stored = io.BytesIO()
    np.savez_compressed(stored, **arrays)
    return stored.getvalue()


def load(path: str | os.PathLike | None, builders: Mapping[str, Callable]) -> FrozenCodec:
    """Reads what `save` wrote; `builders` is `icm_jax.codecs.CODECS`.

    Args: path: None is the model in the package.

    Raises: IcmError as `archive.read`, for a codec without a builder or with arguments that it does
      not take, or if an array is not what the codec needs. Nothing in the file is executed.
    """
    return archive.read(archive.BOXED if path is None else path, lambda f: _frozen(f, builders))


def _frozen(file: archive.Archive, builders: Mapping[str, Callable]) -> FrozenCodec:
    name = file.about["codec"][0]
    if name not in builders:
        raise IcmError(
            f"it holds a codec {name[:40]!r}, here are {', '.join(builders)}; put its builder "
            "among them first: icm_jax.codecs.CODECS"
        )
    codec = _codec(file.about["codec"], builders)
    needs.require(codec, file.arrays)
    weights = {
        tuple(key.split("/")[1:]): _widened(array.read())
        for key, array in file.arrays.items()
        if key.startswith("variables/")
    }
    tables = {}
    for segment in codec.segments:
        cdf, offsets = (file.arrays[f"tables/{segment.name}/{key}"] for key in ("cdf", "offsets"))
        tables[segment.name] = Tables(cdf.read(), offsets.read())
    frozen = FrozenCodec(codec, flax.traverse_util.unflatten_dict(weights), tables)
    if frozen.fingerprint.hex() != file.about["fingerprint"]:
        raise IcmError("it is damaged: its content does not match its fingerprint")
    return frozen


def _codec(config, builders) -> Codec:
    name, items = config
    fields = dict(items)
    if name == "scalable":
        fields = upgraded(fields)
    # The fingerprint is over the arguments as they were written.
    return builders[name](**fields)._replace(config=(name, tupled(items)))


def rebuilt(config, variables, tables: Mapping[str, Tables]) -> FrozenCodec:
    """What was pickled, in the process that reads it."""
    from icm_jax.codecs import CODECS

    return FrozenCodec(_codec(config, CODECS), variables, tables)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """Half precision where it loses nothing."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array
