"""Random-access sources of coded examples: the embedded scenes, TFDS data sets, one's own folders.

A source knows its class names and loads example i as {"image": bytes, "label": int,
"mask": bytes, "name": str}, with the keys that the data set has.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable

import numpy as np

from icm_jax.data import scenes
from icm_jax.errors import IcmError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples by number.

    Attributes:
      name: for messages. length: number of examples. classes: label names.
      load: number -> {"image": bytes, "name": str, and "label": int and/or "mask": bytes}.
      mask_classes: names of the class ids in masks.
    """

    name: str
    length: int
    classes: tuple[str, ...]
    load: Callable[[int], dict]
    mask_classes: tuple[str, ...] = ()


def cache_folder() -> pathlib.Path:
    """Where generated data lies: $ICM_JAX_CACHE, else ~/.cache/icm_jax."""
    return pathlib.Path(os.environ.get("ICM_JAX_CACHE", pathlib.Path.home() / ".cache" / "icm_jax"))


def scenes_source(config, split: str) -> Source:
    """The embedded data; fields path (default: the cache), size, train, validation, seed."""
    sizes = {k: config[k] for k in ("size", "train", "validation", "seed") if k in config}
    builder = scenes.prepared(config.get("path") or cache_folder(), **sizes)
    names = tuple(scenes.CLASSES)
    return _from_builder(builder, split, names, ("background", *names), lambda e: e["label"])


def folder(config, split: str) -> Source:
    """A folder of images by class.

    Either `train.txt` and `val.txt` list `class/file` (and `classes.txt` the names), or there are
    `train/` and `val/` with a folder per class, or folders per class alone, of which every fifth
    image by name hash is kept for validation.
    """
    root = _existing(config.path, "data.path")
    short = {"train": "train", "validation": "val"}[split]
    if (root / f"{short}.txt").is_file():
        entries = [root / line for line in _lines(root / f"{short}.txt")]
        listed = root / "classes.txt"
        classes = _lines(listed) if listed.is_file() else _subfolders(root)
    elif (root / short).is_dir():
        classes = _subfolders(root / "train")
        entries = _images(root / short)
    else:
        classes = _subfolders(root)
        entries = [path for path in _images(root) if (_digest(path) % 5 == 0) == (split != "train")]
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted({path.parent.name for path in entries} - set(number))
    if unknown:
        raise IcmError(f"{root}: images in folders that are no class: {', '.join(unknown[:5])}")
    if not entries:
        raise IcmError(f"no images for {split} in {root}; expected class/image{SUFFIXES}")

    def load(index):
        path = entries[index]
        return {"image": _read(path), "label": number[path.parent.name], "name": str(path)}

    return Source(str(root), len(entries), tuple(classes), load)


def coco_json(config, split: str) -> Source:
    """COCO format: `images/` beside `train.json` and `val.json`.

    The label of an image is the category of its largest box; images without a box are left out.
    """
    root = _existing(config.path, "data.path")
    file = root / {"train": "train.json", "validation": "val.json"}[split]
    try:
        content = json.loads(_read(file))
        categories = sorted(content["categories"], key=lambda c: c["id"])
        number = {category["id"]: index for index, category in enumerate(categories)}
        largest: dict[int, tuple[float, int]] = {}
        for box in content["annotations"]:
            area = box["bbox"][2] * box["bbox"][3]
            if area > largest.get(box["image_id"], (-1.0, 0))[0]:
                largest[box["image_id"]] = (area, number[box["category_id"]])
        images = [image for image in content["images"] if image["id"] in largest]
        paths = [root / "images" / image["file_name"] for image in images]
        labels = [largest[image["id"]][1] for image in images]
        classes = tuple(category["name"] for category in categories)
    except (KeyError, TypeError, ValueError) as error:
        raise IcmError(f"{file} is not COCO JSON: {type(error).__name__} {error}") from error

    def load(index):
        return {"image": _read(paths[index]), "label": labels[index], "name": str(paths[index])}

    return Source(str(file), len(images), classes, load)


def mask_folder(config, split: str) -> Source:
    """`images/` and `masks/*.png` (class ids, 255 to ignore), listed by stem in train.txt, val.txt.

    `data.images` names another folder for the images, relative to the path.
    """
    root = _existing(config.path, "data.path")
    stems = _lines(root / {"train": "train.txt", "validation": "val.txt"}[split])
    folder_of_images = root / config.get("images", "images")
    paths = {path.stem: path for path in _images(folder_of_images)}
    missing = [stem for stem in stems if stem not in paths]
    if missing:
        raise IcmError(
            f"{folder_of_images} has no image {missing[0]!r} ({len(missing)} of {len(stems)} are "
            "missing); data.images names another folder"
        )
    names = tuple(_lines(root / "classes.txt"))

    def load(index):
        stem = stems[index]
        mask = _read(root / "masks" / f"{stem}.png")
        return {"image": _read(paths[stem]), "mask": mask, "name": str(paths[stem])}

    return Source(str(root), len(stems), (), load, names)


def tfds_source(name: str, label: Callable[[dict], int]) -> Callable:
    """Opens a prepared TFDS data set: array_record files below data.path or TFDS's own folder."""

    def open_source(config, split: str) -> Source:
        import tensorflow_datasets as tfds

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                builder = tfds.builder(name, data_dir=config.get("path") or None)
                prepared = builder.data_path.exists()
            except Exception as error:
                raise IcmError(_prepare(name, config, str(error))) from error
        if not prepared:
            raise IcmError(_prepare(name, config, f"nothing at {builder.data_path}"))
        features = builder.info.features
        objects = features.get("objects")
        names = (features["label"] if objects is None else objects["label"]).names
        return _from_builder(builder, split, tuple(names), (), label)

    return open_source


def largest_object(example: dict) -> int:
    """Label of the largest box of a TFDS detection example; 0 where there is none."""
    boxes, labels = (np.asarray(example["objects"][key]) for key in ("bbox", "label"))
    if not len(labels):
        return 0
    boxes = boxes.reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return int(labels[int(np.argmax(areas))])


def _from_builder(builder, split, classes, mask_classes, label) -> Source:
    import tensorflow_datasets as tfds

    skip = tfds.decode.SkipDecoding()
    decoders = {key: skip for key in ("image", "mask") if key in builder.info.features}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:
        raise IcmError(_prepare(builder.name, {}, f"split {split}: {error}")) from error

    def load(index):
        example = data[index]
        loaded = {"image": example["image"], "label": int(label(example))}
        loaded["name"] = f"{builder.name} {split} {index}"
        if mask_classes:
            loaded["mask"] = example["mask"]
        return loaded

    return Source(builder.name, len(data), classes, load, mask_classes)


def _prepare(name: str, config, reason: str) -> str:
    place = f", data_dir={config.get('path')!r}" if config.get("path") else ""
    return (
        f"the TFDS data set {name} is not prepared ({reason}). Prepare it once where there is a "
        f'network: python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{place})'
        ".download_and_prepare(file_format='array_record')\", then set --config.data.path to its "
        "data_dir"
    )


def _existing(path: str, field: str) -> pathlib.Path:
    if not path:
        raise IcmError(f"{field} is empty; set it to the folder of the images")
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise IcmError(f"{field}: no folder {root}")
    return root


def _lines(path: pathlib.Path) -> list[str]:
    return [line.strip() for line in _read(path).decode().splitlines() if line.strip()]


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IcmError(f"cannot read {path}: {error.strerror or error}") from error


def _subfolders(root: pathlib.Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _images(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)


def _digest(path: pathlib.Path) -> int:
    return int.from_bytes(hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest()[:8])
