"""Data sets as codes: coded once, with one codec file, and read back as images.

Which shard holds which examples, and every byte of it, depends on the data, the codec file, the
quality and the number of shards alone: not on how many processes code, nor on what was there.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from icm_jax import data
from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.coding import archive, container
from icm_jax.data import shards
from icm_jax.data.images import read_image
from icm_jax.data.sources import Source
from icm_jax.engine import sharding
from icm_jax.engine.run import changes
from icm_jax.errors import IcmError
from icm_jax.files import Room, cores, in_threads, write_json, write_whole

PER_SHARD = 1000
LEAST_SHARDS = 16
"""If nobody says how many: so many examples a shard, but so many shards, for the processes."""


def open_source(config: Mapping[str, Any], split: str) -> Source:
    """As `icm_jax.data.open_source`; of coded data sets images are decoded when they are read.

    Raises: IcmError as there, or for a codec file that cannot be read.
    """
    source = data.open_source(config, split)
    if not source.codec:
        return source
    frozen = _decoder(source.codec)

    def read(coded: bytes, name: str, smallest: tuple[int, int] = (0, 0)) -> np.ndarray:
        del smallest
        try:
            image = frozen.decompress(coded)
        except IcmError as error:
            raise IcmError(f"{name}: {error}") from error
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    return dataclasses.replace(source, read=read)


@functools.lru_cache(1)
def _decoder(path: str) -> FrozenCodec:
    try:
        return model_file.load(path, CODECS)
    except IcmError as error:
        raise IcmError(f"{error}; {shards.AGAIN}") from error


class Coding(NamedTuple):
    """A split that is to be coded: where to, from what, with what, and into how many shards."""

    folder: pathlib.Path
    split: str
    source: Source
    features: Any
    root: str
    frozen: FrozenCodec
    quality: float | None
    count: int

    def span(self, shard: int) -> range:
        """Numbers of the examples in a shard."""
        return shards.span(self.source.length, shard, self.count)

    def path(self, shard: int) -> pathlib.Path:
        """Its file."""
        return shards.shard_path(self.folder, self.split, shard, self.count)


def write(
    config: Mapping[str, Any],
    split: str,
    folder: pathlib.Path,
    *,
    codec: str | os.PathLike | None = None,
    quality: float | None = None,
    count: int | None = None,
) -> dict:
    """Codes a split of a data set into the shards that `folder` lacks, each image at its own size.

    Each process codes its share of the shards; the first one then writes what has been coded to
    codes.json.

    Args:
      config: data fields of an experiment or a run.
      codec: path of an .icmc file; None is the model in the package.
      quality: as of `FrozenCodec.compress`. count: of shards; None: by the number of examples.

    Returns: {"images", "shards", "bytes" (of .icm files), "pixels", "bits_per_pixel"} of the split.

    Raises: IcmError for data or a codec that cannot be read (an image is named), a folder of other
      codes, a damaged shard, or one that cannot be written.
    """
    if config["name"] == "codes":
        raise IcmError("the data set codes is coded already; name the one that it was made from")
    given = data.data_fields(config)
    source = data.open_source(given, split)
    codec = archive.BOXED if codec is None else codec
    frozen = model_file.load(codec, CODECS)
    if quality is None and frozen.codec.qualities:
        quality = bitstream.DEFAULT_QUALITY
    bitstream.quality_steps(frozen.codec, quality)
    count = count or max(-(-source.length // PER_SHARD), min(LEAST_SHARDS, source.length))
    if not 0 < count <= source.length:
        raise IcmError(f"{source.length} examples of {split} do not fill {count} shards")
    fields = {name: value for name, value in given.items() if name not in data.BATCH_FIELDS}
    keys = data.label_keys(fields)
    features = shards.features_of(keys, source.classes)
    settings = {
        "codec": frozen.fingerprint.hex(),
        "quality": quality,
        "data": fields,
        "keys": keys,
        "classes": source.classes,
        "mask_classes": source.mask_classes,
        "mask_ids": source.mask_ids and list(source.mask_ids.items()),
    }
    first = jax.process_index() == 0
    claim(folder, settings, split, {"images": source.length, "shards": count}, writes=first)
    own, content = folder / shards.CODEC, pathlib.Path(codec).read_bytes()
    if first and not (own.is_file() and own.read_bytes() == content):
        write_whole(own, content)
    sharding.as_first(True)  # nobody codes before that is written
    root = str(pathlib.Path(fields.get("path") or "").expanduser())
    return _finish(Coding(folder, split, source, features, root, frozen, quality, count))


def claim(folder: pathlib.Path, settings: dict, split: str, sizes: dict, *, writes: bool) -> None:
    """Checks that a folder's codes are of these settings and the split of this size; what it does
    not know yet is added to its codes.json, if this process `writes`.

    Raises: IcmError if they are of others.
    """
    given = json.loads(json.dumps(settings | sizes))
    about = shards.about(folder) or settings | {"splits": {}}
    there = given | about | about["splits"].get(split, {})
    changed = changes(json.loads(json.dumps({name: there[name] for name in given})), given)
    if changed:
        raise IcmError(
            f"{folder} holds codes of other settings ({'; '.join(changed.values())}); choose "
            "another --workdir or remove that folder"
        )
    if split not in about["splits"] and writes:
        write_json(folder / shards.ABOUT, about | {"splits": about["splits"] | {split: sizes}})


def _finish(coding: Coding) -> dict:
    """Codes the missing shards of this process's share, counts all, and writes what they hold."""
    folder, split = coding.folder, coding.split
    mine = sharding.share(coding.count)
    missing = [shard for shard in mine if not coding.path(shard).is_file()]
    total = sum(len(coding.span(shard)) for shard in missing)
    numbers = (number for shard in missing for number in coding.span(shard))
    hidden = jax.process_index() > 0 or not missing
    with (
        tqdm.tqdm(total=total, desc=f"coding {split}", unit="image", disable=hidden) as bar,
        contextlib.closing(in_threads(_recorder(coding), numbers, cores())) as results,
    ):
        for shard in missing:
            records = []
            for _, found in itertools.islice(results, len(coding.span(shard))):
                if isinstance(found, IcmError):
                    raise found
                records.append(found)
                bar.update()
            shards.write_shard(coding.path(shard), records)
    counted = sharding.gathered({shard: _counts(coding, shard) for shard in mine})
    sizes, pixels = zip(*counted, strict=True)
    facts = {"images": coding.source.length, "shards": coding.count, "bytes": sum(sizes)}
    facts |= {"pixels": sum(pixels), "bits_per_pixel": 8 * sum(sizes) / sum(pixels)}
    if jax.process_index() == 0:
        about = shards.about(folder) or {}
        splits = about["splits"] | {split: facts}
        whole = {name: found for name, found in splits.items() if "bytes" in found}
        shards.write_info(folder, coding.features, whole)
        write_json(folder / shards.ABOUT, about | {"splits": splits})
    sharding.as_first(True)
    return facts


def _recorder(coding: Coding):
    """number -> the record of an example."""
    room = Room()

    def record(number: int) -> bytes:
        loaded = coding.source.load(number)
        name = loaded["name"]
        image = read_image(loaded["image"], name)
        with room.taken(image.shape[0] * image.shape[1]):
            try:
                coded = coding.frozen.compress(image, coding.quality)
            except IcmError as error:
                raise IcmError(f"{name}: {error}") from error
        path = pathlib.PurePath(name)
        if coding.root and path.is_relative_to(coding.root):
            name = path.relative_to(coding.root).as_posix()
        return shards.record(coding.features, loaded | {"image": coded, "name": name})

    return record


def _counts(coding: Coding, shard: int) -> tuple[int, int]:
    """(bytes of .icm files, pixels) of a shard.

    Raises: IcmError if it is damaged, or not of this codec.
    """
    path, images, size, pixels = coding.path(shard), 0, 0, 0
    try:
        for example in shards.read_shard(path, coding.features):
            header = container.unpack(example["image"]).header
            if header.fingerprint != coding.frozen.fingerprint:
                raise IcmError(f"{example['name'].decode()} is of model {header.fingerprint.hex()}")
            images, size = images + 1, size + len(example["image"])
            pixels += header.shape[0] * header.shape[1]
        if images != len(coding.span(shard)):
            raise IcmError(f"it has {images} examples instead of {len(coding.span(shard))}")
    except IcmError as error:
        raise IcmError(
            f"{path}: {error}; remove the file, the same command codes it anew"
        ) from error
    return size, pixels
