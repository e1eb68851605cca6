"""Data on the host: sources of coded images and resumable batches. No JAX here."""

import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from icm_jax.data import coco, geometry, masks, photographs, records, sources, voc, yolo
from icm_jax.data.fields import (
    FLAG,
    NAME,
    SCENES,
    SHARES,
    SIZE,
    Field,
    Table,
    one_of,
    optional,
    several,
    whole,
)
from icm_jax.errors import IcmError

_FORMS = one_of("", "file", *map(str, range(1, 101)))
BATCHES: Table = {
    "canvas": SIZE,
    "boxes": optional(whole()),
    "letterbox": optional(one_of(*geometry.LETTERBOXES)),
    "outlines": optional(whole()),
    "coefficients": optional(_FORMS._replace(expected='"", "file" or a quality from "1" to "100"')),
    "crop": optional(SHARES),
}
"""Fields of a run's data that say what its batches are, whatever the set; see `pipeline`."""
BATCH_FIELDS = tuple(BATCHES)


class Dataset(NamedTuple):
    """A data set that configs can name.

    A run's `data` holds its name, `BATCH_FIELDS` and the set's own fields, no others. The `data` of
    an experiment may hold those of several sets, so that a command can name another one: each run
    takes what its set has (`data_fields`), and a field that is None is not given.

    Attributes:
      keys: what examples have beside the image (label, mask, objects, outlines), or every field of
        the set -> that, where it depends on the files; see `label_keys`.
      open: (every field of the set -> value, split) -> Source.
      fields: the set's own fields and their defaults; a string stays one, whatever is given.
      table: what those that are no strings may be.
      classes, mask_classes: how many there are, where that does not depend on the files.
    """

    keys: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]
    open: Callable[[Mapping[str, Any], str], sources.Source]
    fields: Mapping[str, Any] = {"path": ""}
    classes: int | None = None
    mask_classes: int = 0
    table: Mapping[str, Field] = MappingProxyType({})


_SCENES = {"path": "", "size": 96, "train": 5000, "validation": 800, "seed": 0, "quality": 95}
_MASKS = {"path": "", "images": "images", "masks": "masks", "image_suffix": "", "mask_suffix": ""}
_MASKS |= {"mask_ids": ()}
_VOC = {"path": "", "list": "train", "masks": "SegmentationClass"}
_COCO = {"path": "", "annotations": "", "images": ""}
_TFDS = {"path": "", "builder": "", "image": "image", "mask": "segmentation_mask"}
_TFDS |= {"train_split": "train", "validation_split": "validation"}  # "train" is of scenes
_TFDS |= {"mask_classes": (), "mask_ids": ()}
_XML = {"path": "", "list": "train", "validation_list": "val"}
_FRAMES = {"frames": several(whole(1, 7), least=0)}
_NAMES = {"mask_classes": several(NAME, least=0)}
_STREETS = "cityscapes/semantic_segmentation"
_BOXES, _OUTLINES = ("label", "objects"), ("label", "objects", "outlines")
DATASETS = {
    "scenes": Dataset(("label", "mask", "objects"), records.scenes_source, _SCENES, 12, 13, SCENES),
    "folder": Dataset(("label",), sources.folder),
    "photos": Dataset((), photographs.photos, {"path": "", "whole": False}, 0, 0, {"whole": FLAG}),
    "vimeo90k": Dataset((), photographs.vimeo90k, {"path": "", "frames": ()}, 0, 0, _FRAMES),
    "codes": Dataset(sources.keys_of_codes, sources.codes),
    "coco_json": Dataset(_OUTLINES, coco.coco_json, _COCO),
    "yolo_txt": Dataset(_OUTLINES, yolo.yolo_txt, {"path": "", "names": ""}),
    "voc_boxes": Dataset(_BOXES, voc.voc_boxes, _XML),
    "mask_folder": Dataset(("mask",), masks.mask_folder, _MASKS),
    "voc_masks": Dataset(("mask",), masks.voc_masks, _VOC, 0, 21),
    "cityscapes": Dataset(("mask",), masks.cityscapes, {"path": "", "masks": "gtFine"}, 0, 19),
    "tfds_masks": Dataset(("mask",), records.tfds_masks, _TFDS, table=_NAMES),
}
DATASETS[_STREETS] = Dataset(("mask",), records.tfds_cityscapes, classes=0, mask_classes=19)
for _name, _keys, _classes in (
    ("imagenet2012", ("label",), 1000),
    ("coco/2014", _BOXES, 80),
    ("coco/2017", _BOXES, 80),
    ("voc/2012", _BOXES, 20),
):
    DATASETS[_name] = Dataset(_keys, records.tfds_source(_name), classes=_classes)


def dataset(name: str) -> Dataset:
    """The data set of a name. Raises: IcmError for an unknown one."""
    if name not in DATASETS:
        raise IcmError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def label_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the examples that a run's data fields name have beside the image.

    Raises: IcmError for an unknown name or field, or absent data where it depends on the files.
    """
    found, fields = _own_fields(config)
    return found.keys(fields) if callable(found.keys) else found.keys


def check_fields(name: str, given) -> None:
    """Raises IcmError if one of the names `given` is no field of a data set or its batches."""
    known = ("name", *BATCH_FIELDS, *dataset(name).fields)
    for field in given:
        if field not in known:
            raise IcmError(
                f"the data set {name} has no field data.{field}; it has "
                f"{', '.join(dataset(name).fields)}, and of batches {', '.join(BATCH_FIELDS)}"
            )


def data_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """A run's `data` from an experiment's: without the fields of other sets than `data["name"]`.

    An unknown name is left to `open_source`: its data stay as they are.
    """
    given = {field: value for field, value in data.items() if value is not None}
    if given["name"] not in DATASETS:
        return given
    fields = DATASETS[given["name"]].fields
    return {f: value for f, value in given.items() if f in ("name", *BATCH_FIELDS, *fields)}


def place_of(data: Mapping[str, Any]) -> str:
    """A data set in a few words.

    >>> place_of({"name": "coco_json", "path": "../sets/street", "annotations": "train.json"})
    'street, train.json'
    """
    path = pathlib.PurePath(data.get("path") or data["name"])
    return ", ".join([path.name, *([data["annotations"]] if data.get("annotations") else [])])


def open_source(config: Mapping[str, Any], split: str) -> sources.Source:
    """The source that a run's data fields name; `split` is "train" or "validation".

    Raises: IcmError for an unknown name or field, absent data, or files of another structure.
    """
    if split not in sources.SPLITS:
        raise IcmError(f"no split {split!r}; choose one of {', '.join(sources.SPLITS)}")
    found, fields = _own_fields(config)
    return found.open(fields, split)


def _own_fields(config: Mapping[str, Any]) -> tuple[Dataset, dict[str, Any]]:
    """The data set that fields name, and every field of its own with its value."""
    given = {field: value for field, value in config.items() if value is not None}
    found = dataset(given["name"])
    check_fields(given["name"], given)
    fields = {}
    for field, default in found.fields.items():
        value = given.get(field, default)
        fields[field] = str(value) if isinstance(default, str) else value
    return found, fields
