"""YOLO's text labels: a line for each object, as Darknet reads and as exports have them."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from icm_jax.data import labels
from icm_jax.data.labels import Box, Faults, Frame, Rows, add_object, numbers
from icm_jax.data.outlines import Outline, polygon
from icm_jax.data.sources import (
    SPLITS,
    SUFFIXES,
    Source,
    bytes_of,
    existing,
    images_in,
    images_of,
    largest,
    listed_in,
)
from icm_jax.errors import IcmError, reason

NO_FILE = "images without a text file, taken to show no object"
NO_IMAGE = "images that are listed but not there, left out with their objects"
NO_CLASS = "objects of classes that have no name, left out"
NO_OBJECT = "lines that are no object (a class and 4 numbers, or 3 or more corners), left out"
SCORED = "lines with a sixth number, as predictions have, which is left out"
_WHOLE = Frame(1.0, 1.0)


class Names(NamedTuple):
    """What a names file says. Attributes: classes: names. given: the rest of a data.yaml."""

    classes: tuple[str, ...]
    given: Mapping[str, Any]


def yolo_txt(config, split: str) -> Source:
    """Text labels: `class x y width height`, centres and sides as fractions of the upright image,
    or `class x y x y ...`, the corners of an outline, whose box is the one around it.

    The first of these that is there:
      the images that data.yaml names for the split: folders, or lists;
      `train.txt` and `val.txt`, lists of images;
      images/train and images/val; train/images and val/images (or valid/, test/ for val/);
      images/ alone, of which every fifth by name hash is kept for validation.

    Labels of .../images/a.jpg are in .../labels/a.txt, else beside the image. Names of classes are
    in data.yaml, classes.txt or *.names, in the folder or in labels/, or in the file that the field
    `names` says. What is broken is treated by the rules of docs/labels.md.

    Raises: IcmError for a folder of another form, or of which nothing can be used.
    """
    root = existing(config)
    faults = Faults(f"{root} ({split})")
    names = _names(root, config["names"])
    listed = _images(root, names.given, split)
    if not listed:
        raise IcmError(f"no images for {split} in {root}; expected {', '.join(SUFFIXES)}")
    paths = [path for path in listed if path.is_file() or faults.add(NO_IMAGE, path)]
    files = [_label_file(path) for path in paths]
    if not any(file.is_file() for file in files):
        raise IcmError(
            f"none of the {len(listed)} images for {split} in {root} has labels; those of "
            f"{listed[0]} would be {_label_file(listed[0])}"
        )
    keypoints = "kpt_shape" in names.given
    rows, count = [], 0
    for path, file in zip(paths, files, strict=True):
        lines = _lines(file)
        if lines is None:
            faults.add(NO_FILE, path)
        count += len(lines or ())
        rows.append(_rows(lines or [], len(names.classes), keypoints, faults, file))
    faults.said(rows, count)
    found, places = [labels.objects(some) for some in rows], [*map(labels.places, rows)]

    def outlines(index):
        lines = _lines(files[index]) or []
        return tuple(_outline(lines[place], keypoints) for place in places[index])

    def load(index):
        example = {"image": bytes_of(paths[index]), "name": str(paths[index])}
        example |= {"objects": found[index], "label": largest(found[index])}
        return example | {"outlines": lambda: outlines(index)}

    return Source(faults.name, len(paths), names.classes, load)


def _names(root: pathlib.Path, own: str) -> Names:
    """The classes, and what else a data.yaml says. Raises: IcmError if nothing names them."""
    places = [root / own] if own else [*sorted(root.glob("*.y*ml")), root / "classes.txt"]
    if not own:
        places += [*sorted(root.glob("*.names")), root / "labels" / "classes.txt"]
    for path in places:
        if not own and not path.is_file():
            continue
        if path.suffix not in (".yaml", ".yml"):
            return Names(tuple(listed_in(path)), {})
        given = _yaml(path)
        names = given.get("names")
        if isinstance(names, dict) and all(str(number).isdecimal() for number in names):
            numbered = {int(number): str(name) for number, name in names.items()}
            most = max(numbered, default=-1)
            return Names(tuple(numbered.get(n, f"class {n}") for n in range(most + 1)), given)
        if isinstance(names, list):
            return Names(tuple(map(str, names)), given)
        if own:
            raise IcmError(f"{path} has no list `names`")
    raise IcmError(
        f"{root} has no file with names of classes: data.yaml with `names`, classes.txt or *.names "
        "with a line for each; add one, or set data.names"
    )


def _yaml(path: pathlib.Path) -> dict:
    """A YAML file, of which every value is text: `no` is Norway, and 0 a digit's name."""
    import yaml

    try:
        given = yaml.load(bytes_of(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeError) as error:
        raise IcmError(f"{path} is no YAML: {reason(error)}") from error
    return given if isinstance(given, dict) else {}


def _images(root: pathlib.Path, given: Mapping[str, Any], split: str) -> list[pathlib.Path]:
    """The images of a split, as the first layout has them that is there."""
    short = SPLITS[split]
    entries = given.get(short, given.get("valid", ()) if short == "val" else ())
    base = root / str(given.get("path") or ".")
    found = []
    for entry in [entries] if isinstance(entries, str) else entries:
        inner = entry.lstrip("./")  # exports have ../train/images of a folder that is beside
        tried = (base / entry, root / entry, root / inner)
        found += [path for path in tried if entry and path.exists()][:1]
    if found:
        return [image for path in found for image in _those_of(path, root)]
    if (root / f"{short}.txt").is_file():
        return _those_of(root / f"{short}.txt", root)
    others = {"train": ("train",), "val": ("val", "valid", "test")}[short]
    folders = [root / "images" / name for name in others]
    folders += [root / name / "images" for name in others]
    for folder in folders:
        if folder.is_dir():
            return images_in(folder)
    flat, trained = root / "images", root / "images" / "train"
    if trained.is_dir() or (root / "train" / "images").is_dir():
        raise IcmError(f"{root} has images for training alone; add {folders[0]} or {short}.txt")
    return images_of(flat, split) if flat.is_dir() else []


def _those_of(path: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """Images in a folder, or of a list. They are named from the folder of the list or the root on;
    of a path of another machine, the longest end counts that is below the root."""
    if path.is_dir():
        return images_in(path)
    found = []
    for line in listed_in(path):
        parts = pathlib.PurePosixPath(line.replace("\\", "/")).parts
        tried = [path.parent.joinpath(*parts)]
        tried += [root.joinpath(*parts[start:]) for start in range(len(parts))]
        found.append(next((image for image in tried if image.is_file()), tried[0]))
    return found


def _label_file(image: pathlib.Path) -> pathlib.Path:
    """Where an image's labels are: the last folder `images` of its path is `labels` there."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        there = pathlib.Path(*parts[:last], "labels", *parts[last + 1 :], f"{image.stem}.txt")
        if there.is_file() or not image.with_suffix(".txt").is_file():
            return there
    return image.with_suffix(".txt")


def _lines(file: pathlib.Path) -> list[list[str]] | None:
    """The words of each line that is not empty; None without a file."""
    if not file.is_file():
        return None
    lines = bytes_of(file).decode("utf-8-sig", errors="replace").splitlines()
    return [line.split() for line in lines if line.strip()]


def _corners(words: list[str], keypoints: bool) -> tuple[float, ...] | None:
    """x, y, x, y, ... of an outline; None if a line has none."""
    outlined = len(words) >= 7 and len(words) % 2 == 1 and not keypoints
    return numbers(words[1:], len(words) - 1) if outlined else None


def _outline(words: list[str], keypoints: bool) -> Outline | None:
    found = _corners(words, keypoints)
    if found is None:
        return None
    return Outline((polygon([*zip(found[1::2], found[::2], strict=True)], _WHOLE),))


def _box(words: list[str], keypoints: bool) -> Box | None:
    """The box of a line; None if it is no object."""
    corners = _corners(words, keypoints)
    if corners is not None:
        return min(corners[1::2]), min(corners[::2]), max(corners[1::2]), max(corners[::2])
    found = numbers(words[1:5], 4) if len(words) in (5, 6) or keypoints else None
    if found is None:
        return None
    x, y, width, height = found
    return y - height / 2, x - width / 2, y + height / 2, x + width / 2


def _rows(
    lines: list[list[str]], classes: int, keypoints: bool, faults: Faults, file: pathlib.Path
) -> Rows:
    """The objects of an image."""
    rows: Rows = {}
    for place, words in enumerate(lines):
        where = f"line {place + 1} of {file}"
        label, box = numbers(words[:1], 1), _box(words, keypoints)
        if label is None or box is None or label[0] % 1:
            faults.add(NO_OBJECT, where)
        elif not 0 <= label[0] < classes:
            faults.add(NO_CLASS, f"{where} (class {label[0]:g}; there are {classes})")
        else:
            if len(words) == 6 and not keypoints:
                faults.add(SCORED, where)
            add_object(rows, box, int(label[0]), False, place, faults, where)
    return rows
