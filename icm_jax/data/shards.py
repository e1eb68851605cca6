"""`codes`: a data set as coded images and labels, in the record files of TFDS.

A folder holds

    codes.json                             what was coded with which codec; counts of its splits
    codec.icmc                             the codec file, by which images are decoded
    train-00003-of-00016.array_record      examples in the order of the data set
    dataset_info.json, features.json, ...  by which TFDS reads the splits that are whole

An example has "image" (an .icm file), "name" and, where the data set has them, "label" (-1: none),
"mask" (the file as it was), "objects" ("bbox", float32 [k, 4] as in `sources.Objects`, "label",
"is_crowd") and "outlines" (JSON, `outlines.written`). `icm_jax.engine.codes` writes it and decodes
its images.
"""

import dataclasses
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from icm_jax.data import records, sources
from icm_jax.data.outlines import written
from icm_jax.errors import IcmError, reason
from icm_jax.files import beside, read_json

ABOUT = "codes.json"
CODEC = "codec.icmc"
VERSION = "1.0.0"
_NAME = "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}"
AGAIN = "--mode=code with the same settings writes it anew"
_ABOUT_KEYS = {"codec", "quality", "data", "keys", "classes", "mask_classes", "mask_ids", "splits"}
_AT_ONCE = 64  # records that are read together


def _tfds() -> Any:
    """TFDS; only where there are codes it is needed, and imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds
        import tensorflow_datasets.core.dataset_info
        import tensorflow_datasets.core.example_serializer
        import tensorflow_datasets.core.naming
        import tensorflow_datasets.core.read_only_builder
        import tensorflow_datasets.core.splits
    return tfds


def features_of(keys: Iterable[str], classes: Iterable[str]) -> Any:
    """What an example holds, in TFDS's terms: its `FeaturesDict`.

    Args: keys: what it has beside the image, as `icm_jax.data.Dataset.keys`.
    """
    features = _tfds().features
    label, data = features.ClassLabel(names=list(classes)), features.Scalar(np.object_)
    objects = {
        "bbox": features.Tensor(shape=(4,), dtype=np.float32),  # that of TFDS refuses overhang
        "label": label,
        "is_crowd": features.Scalar(np.bool_),
    }
    known = {"label": label, "mask": data, "objects": features.Sequence(objects), "outlines": data}
    return features.FeaturesDict({"image": data, "name": data} | {k: known[k] for k in keys})


def record(features: Any, loaded: Mapping[str, Any]) -> bytes:
    """An example, as `sources.Source.load` gives it, as bytes that depend on nothing else."""
    example = {key: loaded[key] for key in features}
    example["name"] = example["name"].encode()
    if "label" in features and example["label"] is None:
        example["label"] = -1
    if "objects" in features:
        boxes, labels, ignored = example["objects"]
        example["objects"] = {"bbox": boxes, "label": labels, "is_crowd": ignored}
    if "outlines" in features:
        example["outlines"] = written(example["outlines"]())
    layout: Any = features.get_serialized_info()
    serializer = _tfds().core.example_serializer.ExampleSerializer(layout)
    encoded = serializer.get_tf_example(features.encode_example(example))
    return encoded.SerializeToString(deterministic=True)


def span(length: int, shard: int, count: int) -> range:
    """Numbers of the examples in one of `count` shards of a split."""
    return range(length * shard // count, length * (shard + 1) // count)


def shard_path(folder: pathlib.Path, split: str, shard: int, count: int) -> pathlib.Path:
    """The file of a shard: SPLIT-00003-of-00016.array_record."""
    return folder / f"{split}-{shard:05d}-of-{count:05d}.array_record"


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Writes a shard, whole or not at all.

    Raises: IcmError if it cannot be written.
    """
    with beside(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for data in records:
                writer.write(data)
            writer.close()
        except (RuntimeError, ValueError) as error:  # as of a full disk; the reason comes first
            why = str(error).split(";")[0]
            raise OSError(f"{why}; the same command goes on from there") from error


def read_shard(path: pathlib.Path, features: Any) -> Iterator[dict]:
    """The examples of a shard, as TFDS gives them.

    Raises: IcmError if it is damaged.
    """
    try:
        reader = ArrayRecordReader(str(path))
        for start in range(0, reader.num_records(), _AT_ONCE):
            stop = min(start + _AT_ONCE, reader.num_records())
            for data in reader.read(start, stop):
                example: Any = features.deserialize_example_np(data)
                yield example
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        why = reason(error).split(";")[0]
        raise IcmError(f"{path.name} is no whole record file ({why})") from error


def write_info(
    folder: pathlib.Path,
    features: Any,
    whole: Mapping[str, Mapping[str, int]],
) -> None:
    """Writes what TFDS needs to read the folder.

    Args: whole: split -> its "images", "shards" and "bytes", of those that are there.
    """
    tfds = _tfds()
    place = tfds.core.Path(folder)
    names = dict(dataset_name="codes", filetype_suffix="array_record")
    template = tfds.core.naming.ShardedFileTemplate(data_dir=place, template=_NAME, **names)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="codes", version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=__doc__)
    info.set_file_format("array_record")
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[
                len(span(size["images"], n, size["shards"])) for n in range(size["shards"])
            ],
            num_bytes=size["bytes"],
            filename_template=template.replace(split=name),
        )
        for name, size in whole.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)


def about(folder: pathlib.Path) -> dict | None:
    """What codes.json says; None where there is none.

    Raises: IcmError if it cannot be read.
    """
    path = folder / ABOUT
    if not path.is_file():
        return None
    remedy = f"put back a copy, or remove the file, and {AGAIN}"
    found = read_json(path, dict, remedy)
    if not found.keys() >= _ABOUT_KEYS or not isinstance(found["splits"], dict):
        raise IcmError(f"{path} is damaged: it lacks what a folder of codes has; {remedy}")
    return found


def keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the examples have beside the image. Raises: IcmError if the folder holds no codes."""
    return tuple(_about(sources.existing(config))["keys"])


def source(config: Mapping[str, Any], split: str) -> sources.Source:
    """A split of a folder that `python -m icm_jax.main --mode=code` wrote; field path.

    Its images are .icm files; `icm_jax.engine.codes.open_source` gives a source that decodes them.
    """
    root = sources.existing(config)
    found = _about(root)
    if "bytes" not in found["splits"].get(split, {}):
        whole = [name for name, facts in found["splits"].items() if "bytes" in facts]
        raise IcmError(
            f"{root} has no whole codes of the split {split!r} (it has "
            f"{', '.join(whole) or 'none yet'}); --mode=code with the same settings goes on"
        )
    names = tuple(found["classes"]), tuple(found["mask_classes"])
    remedy = f"remove the file, and {AGAIN}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            builder = _tfds().core.read_only_builder.builder_from_directory(root)
            opened = records.from_builder(builder, split, *names, remedy)
    except Exception as error:  # those of TFDS have no common base
        raise IcmError(
            f"cannot read what TFDS knows of {root}, dataset_info.json and features.json "
            f"({reason(error)}); {AGAIN}"
        ) from error
    ids = found["mask_ids"] and {given: meant for given, meant in found["mask_ids"]}
    return dataclasses.replace(opened, name=str(root), mask_ids=ids, codec=str(root / CODEC))


def _about(root: pathlib.Path) -> dict:
    found = about(root)
    if found is None:
        raise IcmError(f"{root} has no {ABOUT}: no data set was coded to it with --mode=code")
    return found
