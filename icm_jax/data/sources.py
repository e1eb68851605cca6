"""Random-access sources of coded examples: the embedded scenes, TFDS data sets, one's own folders.

A source knows its class names and loads example i as {"image": bytes, "label": int,
"mask": bytes, "objects": Objects, "name": str}, with the keys that the data set has.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from icm_jax.data import records
from icm_jax.data.fields import FieldError
from icm_jax.data.images import read_rgb
from icm_jax.errors import IcmError

SPLITS = {"train": "train", "validation": "val"}
"""The two parts of a data set, and their names in folders and lists."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")


class Objects(NamedTuple):
    """What an image shows: boxes float32 [k, 4], (ymin, xmin, ymax, xmax) as fractions of its
    sides; labels int32 [k]; ignored bool [k], a crowd or too difficult: no example to learn from,
    and neither a hit nor a miss in evaluation."""

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples by number.

    Attributes:
      name: for messages. length: number of examples. classes: label names.
      load: number -> {"image": bytes, "name": str, and "label": int, "mask": bytes, "objects":
        Objects if it has them}; the label is None where a labelled data set has none for this
        image. With objects, it is that of the largest which is not ignored.
      mask_classes: names of the class ids in masks.
      mask_ids: {id in the files: class id}, see `images.read_mask`; None: they are the same.
      read: (an image's bytes, name for errors, least height and width) -> uint8 [H, W, 3], as
        `images.read_rgb`.
      codec: path of the codec file that images are coded with, of data set "codes"; else "".
    """

    name: str
    length: int
    classes: tuple[str, ...]
    load: Callable[[int], dict]
    mask_classes: tuple[str, ...] = ()
    mask_ids: Mapping[int, int] | None = None
    read: Callable[[bytes, str, tuple[int, int]], np.ndarray] = read_rgb
    codec: str = ""


def cache_folder() -> pathlib.Path:
    """Where generated data lies: $ICM_JAX_CACHE, else ~/.cache/icm_jax."""
    return pathlib.Path(os.environ.get("ICM_JAX_CACHE", pathlib.Path.home() / ".cache" / "icm_jax"))


def scenes_source(config, split: str) -> Source:
    """The embedded data; fields path ("": the cache) and those of `scenes.ScenesConfig`."""
    from icm_jax.data import scenes

    sizes = {field: value for field, value in config.items() if field != "path"}
    builder = scenes.prepared(config["path"] or cache_folder(), **sizes)
    names = tuple(scenes.CLASSES)
    return from_builder(builder, split, names, ("background", *names))


def codes(config, split: str) -> Source:
    """What `--mode=code` wrote into a folder, field path; see `icm_jax.data.shards`."""
    from icm_jax.data import shards

    return shards.source(config, split)


def keys_of_codes(config) -> tuple[str, ...]:
    """What those examples have beside the image."""
    from icm_jax.data import shards

    return shards.keys(config)


def folder(config, split: str) -> Source:
    """A folder of images by class.

    Either `train.txt` and `val.txt` list `class/file` (and `classes.txt` the names), or there are
    `train/` and `val/` with a folder per class, or folders per class alone, of which every fifth
    image by name hash is kept for validation.
    """
    root = existing(config)
    short = SPLITS[split]
    if (root / f"{short}.txt").is_file():
        entries = [root / line for line in listed_in(root / f"{short}.txt")]
        listed = root / "classes.txt"
        classes = listed_in(listed) if listed.is_file() else _subfolders(root)
    elif (root / "train").is_dir() or (root / "val").is_dir():
        for name in ("train", short):  # the classes are those of train/
            if not (root / name).is_dir():
                raise IcmError(f"{root} has no folder {name}/ beside the other; add it")
        classes = _subfolders(root / "train")
        entries = images_in(root / short)
    else:
        classes = _subfolders(root)
        entries = images_of(root, split)
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted({path.parent.name for path in entries} - set(number))
    if unknown:
        raise IcmError(f"{root}: images in folders that are no class: {', '.join(unknown[:5])}")
    if not entries:
        what = f"class/image, with one of {', '.join(SUFFIXES)}"
        raise IcmError(f"no images for {split} in {root}; expected {what}")

    def load(index):
        path = entries[index]
        return {"image": bytes_of(path), "label": number[path.parent.name], "name": str(path)}

    return Source(str(root), len(entries), tuple(classes), load)


def coco_json(config, split: str) -> Source:
    """COCO format: `images/` beside `train.json` and `val.json`; boxes without an area are none.

    The field `annotations` names other files, "{split}" standing for train or val: "train.json", to
    score on what was trained with.

    Widths, heights and boxes are those of the upright image; see `icm_jax.data.images`.
    """
    root = existing(config)
    file = root / (config["annotations"] or "{split}.json").format(split=SPLITS[split])
    text = bytes_of(file)
    try:
        content = json.loads(text)
        categories = sorted(content["categories"], key=lambda c: c["id"])
        number = {category["id"]: index for index, category in enumerate(categories)}
        images = {image["id"]: image for image in content["images"]}
        found: dict[int, list[tuple]] = {name: [] for name in images}
        for given in content["annotations"]:
            x, y, width, height = given["bbox"]
            across, down = (images[given["image_id"]][side] for side in ("width", "height"))
            box = y / down, x / across, (y + height) / down, (x + width) / across
            kind, crowd = number[given["category_id"]], bool(given.get("iscrowd"))
            if width > 0 and height > 0:
                found[given["image_id"]].append((box, kind, crowd))
        paths = [root / "images" / image["file_name"] for image in images.values()]
        objects = [
            _objects(*zip(*rows, strict=True)) if rows else _objects() for rows in found.values()
        ]
        classes = tuple(category["name"] for category in categories)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise IcmError(f"{file} is not COCO JSON: {type(error).__name__} {error}") from error

    def load(index):
        example = {"image": bytes_of(paths[index]), "name": str(paths[index])}
        return example | {"objects": objects[index], "label": largest(objects[index])}

    return Source(str(file), len(paths), classes, load)


def mask_folder(config, split: str) -> Source:
    """Images and masks (PNG, class ids, 255 to ignore) of equal stems, in two folders.

    Fields:
      images, masks: the folders, relative to the path; subfolders are searched too, and "{split}"
        stands for train or val.
      image_suffix, mask_suffix: what ends the stem of each file and is no part of the name that
        both have: with "_leftImg8bit" and "_gtFine_labelIds", a_leftImg8bit.png and
        a_gtFine_labelIds.png are "a".
      mask_ids: pairs (id in the file, class), if ids are not classes; see `images.read_mask`.

    `train.txt` and `val.txt` list names; they may be absent where `images` has "{split}". Names of
    classes are in `classes.txt`.
    """
    root = existing(config)
    folders = [root / config[kind].format(split=SPLITS[split]) for kind in ("images", "masks")]
    found = {}
    for kind, folder in zip(("image", "mask"), folders, strict=True):
        found[kind] = _named(folder, config[f"{kind}_suffix"])
    listed = root / f"{SPLITS[split]}.txt"
    by_folder = "{split}" in config["images"] and not listed.is_file()
    names = sorted(found["image"]) if by_folder else listed_in(listed)
    if not names:
        raise IcmError(f"no images for {split} in {folders[0]}; expected {', '.join(SUFFIXES)}")
    try:
        ids = {int(given): int(meant) for given, meant in config["mask_ids"]} or None
    except (TypeError, ValueError) as error:
        raise IcmError(
            f"data.mask_ids is a list of pairs (id in the file, class), not {config['mask_ids']!r}"
        ) from error
    classes = tuple(listed_in(root / "classes.txt"))
    strange = [i for i in (ids or {}).values() if i != 255 and not 0 <= i < len(classes)]
    if strange:
        raise IcmError(
            f"data.mask_ids names the class {strange[0]}; classes.txt has {len(classes)}, and 255 "
            "is none"
        )
    hint = "; data.images and data.masks name other folders, data.image_suffix and "
    hint += "data.mask_suffix what ends stems"
    source = _with_masks(str(root), names, found["image"], found["mask"], classes, folders, hint)
    return dataclasses.replace(source, mask_ids=ids)


def _named(folder: pathlib.Path, suffix: str) -> dict[str, pathlib.Path]:
    """{name: file} of the images in a folder and its subfolders whose stems end in `suffix`.

    Raises: IcmError if two have the same name.
    """
    found: dict[str, pathlib.Path] = {}
    for path in images_in(folder):
        if path.stem.endswith(suffix):
            name = path.stem.removesuffix(suffix)
            if found.setdefault(name, path) is not path:
                raise IcmError(f"{found[name]} and {path} have the same name {name!r}; rename one")
    return found


VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
)


def voc_masks(config, split: str) -> Source:
    """PASCAL VOC's own folder, as `VOCdevkit/VOC2012`: JPEGImages, SegmentationClass, ImageSets.

    For the 10,582 images with the masks of Hariharan et al. 2011, `data.masks` names their folder
    ("SegmentationClassAug") and `data.list` their list ("trainaug").
    """
    root = existing(config)
    listed = config["list"] if split == "train" else "val"
    stems = listed_in(root / "ImageSets" / "Segmentation" / f"{listed}.txt")
    folders = root / "JPEGImages", root / config["masks"]
    images, masks = (_named(folder, "") for folder in folders)
    return _with_masks(str(root), stems, images, masks, tuple(VOC_CLASSES.split()), folders)


def _with_masks(name: str, names, images, masks, classes, folders, hint="") -> Source:
    """Images and masks of these names, each {name: file}; `folders` are for errors."""
    for kind, there, folder in zip(("image", "mask"), (images, masks), folders, strict=True):
        missing = [name for name in names if name not in there]
        if missing:
            share = f"{len(missing)} of {len(names)} are missing"
            raise IcmError(f"{folder} has no {kind} {missing[0]!r} ({share}){hint}")

    def load(index):
        path = images[names[index]]
        return {"image": bytes_of(path), "mask": bytes_of(masks[names[index]]), "name": str(path)}

    return Source(name, len(names), (), load, classes)


def tfds_source(name: str) -> Callable:
    """Opens a prepared TFDS data set: array_record files below data.path or TFDS's own folder."""

    def open_source(config, split: str) -> Source:
        from tensorflow_datasets.core import read_only_builder

        path = config["path"] or None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:  # from the files alone: the code that made some of them imports TensorFlow
                builder = read_only_builder.builder_from_files(name, data_dir=path)
                source = from_builder(builder, split, (), ())
            except Exception as error:
                reason = str(error).split("\n")[0]
                raise IcmError(records.unprepared(name, path, reason)) from error
        features: Any = builder.info.features
        named = features["objects"]["label"] if "objects" in features else features["label"]
        return dataclasses.replace(source, classes=tuple(named.names))

    return open_source


def largest(objects: Objects) -> int | None:
    """Label of the largest box that is not ignored; None without one."""
    sides = np.maximum(objects.boxes[:, 2:] - objects.boxes[:, :2], 0)
    areas = np.where(objects.ignored, -1, sides.prod(axis=1))
    return int(objects.labels[np.argmax(areas)]) if (areas >= 0).any() else None


def _objects(boxes=(), labels=(), ignored=()) -> Objects:
    return Objects(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int32),
        np.asarray(ignored, bool),
    )


def from_builder(
    builder: Any,
    split: str,
    classes: tuple[str, ...],
    mask_classes: tuple[str, ...],
    remedy: str = records.PREPARE,
) -> Source:
    """A split of a TFDS builder whose files are there; an example's label of -1 is none."""
    import tensorflow_datasets as tfds

    skip, features = tfds.decode.SkipDecoding(), builder.info.features
    decoders = {key: skip for key in ("image", "mask") if key in features}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = builder.as_data_source(split=split, decoders=decoders)

    def load(index):
        example = data[index]
        loaded = {"image": example["image"], "name": f"{builder.name} {split} {index}"}
        if "objects" in features:
            given = example["objects"]
            flags = given.get("is_crowd", given.get("is_difficult", np.zeros(len(given["label"]))))
            loaded["objects"] = _objects(given["bbox"], given["label"], flags)
            loaded["label"] = largest(loaded["objects"])
        if "label" in features:
            loaded["label"] = int(example["label"]) if example["label"] >= 0 else None
        if "mask" in features:
            loaded["mask"] = example["mask"]
        if "name" in features:
            loaded["name"] = example["name"].decode()
        return loaded

    load = records.guarded(load, builder, split, remedy)
    return Source(builder.name, len(data), classes, load, mask_classes)


def existing(config: Mapping[str, Any]) -> pathlib.Path:
    """The folder `config["path"]`. Raises: IcmError if there is none."""
    path = config["path"]
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        told = f"is {path}, which is no folder" if path else "is empty; set it to the data's folder"
        raise FieldError(("data", "path"), path, told)
    return root


def listed_in(path: pathlib.Path) -> list[str]:
    """Lines of a list that are not empty. Raises: IcmError if it cannot be read."""
    try:
        lines = bytes_of(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise IcmError(f"{path} is not UTF-8 text: {error}; save it as such") from error
    return [line.strip() for line in lines if line.strip()]


def bytes_of(path: pathlib.Path) -> bytes:
    """A file's content. Raises: IcmError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise IcmError(f"cannot read {path}: {error.strerror or error}") from error


def _subfolders(root: pathlib.Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def images_in(root: pathlib.Path) -> list[pathlib.Path]:
    """Files of images in a folder and its subfolders, by name, those that are hidden left out."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(p for p in found if not any(n[0] == "." for n in p.relative_to(root).parts))


def images_of(root: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Those of `images_in` that are of a split: every fifth by name hash is for validation.

    Raises: IcmError if there are some, but none for the split.
    """
    there = images_in(root)
    found = [path for path in there if (_digest(path) % 5 == 0) == (split != "train")]
    if there and not found:
        raise IcmError(
            f"none of the {len(there)} images in {root} is for {split}: hashes of names "
            "choose about every fifth for validation; add images, or train.txt and val.txt"
        )
    return found


def _digest(path: pathlib.Path) -> int:
    return int.from_bytes(hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest()[:8])
