"""Random-access sources of coded examples, and what all that read folders share.

A source knows its class names and loads example i as {"image": bytes, "label": int,
"mask": bytes, "objects": Objects, "name": str}, with the keys that the data set has.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

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
        image. With objects, it is that of the largest which is not ignored. "outlines" is a
        function, which gives those of the objects (`outlines.Outlines`): reading them takes time.
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


def largest(objects: Objects) -> int | None:
    """Label of the largest box that is not ignored; None without one."""
    sides = np.maximum(objects.boxes[:, 2:] - objects.boxes[:, :2], 0)
    areas = np.where(objects.ignored, -1, sides.prod(axis=1))
    return int(objects.labels[np.argmax(areas)]) if (areas >= 0).any() else None


def objects_of(boxes=(), labels=(), ignored=()) -> Objects:
    """Objects from lists."""
    return Objects(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int32),
        np.asarray(ignored, bool),
    )


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


def named(folder: pathlib.Path, suffix: str) -> dict[str, pathlib.Path]:
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
