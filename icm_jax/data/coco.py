"""COCO's JSON as annotation tools export it, with the rules for what is broken in it."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from icm_jax.data import labels
from icm_jax.data.labels import Box, Faults, Frame, Rows, add_object, identity, numbers, turned_box
from icm_jax.data.outlines import Outlines, box_of, once, outline_of
from icm_jax.data.sources import SPLITS, Source, bytes_of, existing, largest
from icm_jax.errors import IcmError

NO_IMAGE = "annotations of images that are not listed, left out"
NO_CATEGORY = "annotations of categories that are not declared, left out"
FROM_OUTLINE = "annotations without a box that has an area, that around their outline taken"
AS_TEXT = "boxes with numbers written as text, read as numbers"
AS_SHARES = "boxes given as fractions of their image's sides, as all are, read as such"
NO_NAME = "images without an id or a file name, left out"
TWICE = "images listed several times, taken once, with the objects of all"
TWO_FILES = "images of one id and different files, left out, for objects of either may be meant"
SAME_CATEGORY = "categories declared several times, by id or name, the first taken"
_NO_FRAME = Frame(0.0, 0.0)


@dataclasses.dataclass
class _Picture:
    """An image that is listed: its file, what the list says of its sides, and its objects. Its
    frame has no sides where it cannot be used."""

    path: pathlib.Path
    size: tuple[float, float] | None
    frame: Frame = _NO_FRAME
    rows: Rows = dataclasses.field(default_factory=dict)


def coco_json(config, split: str) -> Source:
    """COCO format: `images/` beside `train.json` and `val.json`.

    Fields, in which "{split}" stands for train or val:
      annotations: other files: "annotations/instances_{split}2017.json"; "train.json", to score on
        what was trained with.
      images: other folders: "{split}2017".

    Boxes are those of the upright image (`icm_jax.data.images`). Outlines, polygons and run
    lengths, are read when they are first asked for. What is broken is treated by the rules of
    docs/labels.md.

    Raises: IcmError for a file that is not COCO's, or of which nothing can be used.
    """
    root, short = existing(config), SPLITS[split]
    file = root / (config["annotations"] or "{split}.json").format(split=short)
    folders = root / (config["images"] or "images").format(split=short), root, file.parent
    content, faults = _read(file), Faults(file)
    classes, number = _categories(content["categories"], faults)
    listed = _listed(content["images"], folders, faults)
    pictures = _framed(listed, faults)
    if not pictures:
        lost = "; ".join(faults.lines()) or "its list of images is empty"
        raise IcmError(f"{file} has no image of use ({lost}); data.images is their folder")
    given = content["annotations"]
    _place(given, listed, number, faults)
    faults.said([picture.rows for picture in pictures], len(given))
    paths = [picture.path for picture in pictures]
    found = [labels.objects(picture.rows) for picture in pictures]
    places = [(picture.frame, labels.places(picture.rows)) for picture in pictures]
    outlines = once(lambda: _outlines(file, places))

    def load(index):
        path, objects = paths[index], found[index]
        example = {"image": bytes_of(path), "name": str(path), "objects": objects}
        return example | {"label": largest(objects), "outlines": lambda: outlines()[index]}

    return Source(str(file), len(paths), classes, load)


def _read(file: pathlib.Path) -> dict[str, list]:
    """The content of a file. Raises: IcmError if it has not what COCO's has."""
    text = bytes_of(file)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise IcmError(f"{file} is not COCO JSON, nor any: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise IcmError(f"{file} is not COCO JSON: it has no list of {key}")
    return content


def _categories(given: list, faults: Faults) -> tuple[tuple[str, ...], dict[Hashable, int]]:
    """Names of classes, by their ids, and {id: class}."""
    named: dict[Hashable, str] = {}
    for place, category in enumerate(given):
        category = category if isinstance(category, dict) else {}
        own = identity(category.get("id"))
        if own is None or own in named:
            faults.add(SAME_CATEGORY, f"category {place} ({category.get('name')}, id {own})")
        else:
            named[own] = str(category.get("name", own))
    ordered = sorted(named, key=lambda i: (not str(i).isdecimal(), len(str(i)), str(i)))
    classes: dict[str, int] = {}
    for own in ordered:
        if named[own] in classes:
            faults.add(SAME_CATEGORY, f"id {own} ({named[own]})")
        classes.setdefault(named[own], len(classes))
    return tuple(classes), {own: classes[name] for own, name in named.items()}


def _listed(given: list, folders: Sequence[pathlib.Path], faults: Faults) -> dict:
    """{id: its picture}; None of one that cannot be used. Ids of one file have one picture."""
    found: dict[Hashable, _Picture | None] = {}
    names: dict[Hashable, str] = {}
    of_file: dict[str, _Picture] = {}
    finder = _finder(folders, [image for image in given if isinstance(image, dict)])
    for place, image in enumerate(given):
        image = image if isinstance(image, dict) else {}
        own, name = identity(image.get("id")), _name(image)
        if own is None or not name:
            faults.add(NO_NAME, f"image {place}")
            continue
        if own in found and names[own] != name:
            faults.add(TWO_FILES, f"{name} (id {own}, as {names[own]})")
            found[own] = None
            continue
        sides = numbers([image.get("height"), image.get("width")], 2)
        size = (sides[0], sides[1]) if sides and min(sides) > 0 else None
        if name in of_file:
            faults.add(TWICE, f"{name} (id {own})")
        else:
            of_file[name] = _Picture(finder(name), size)
        names[own] = name
        found.setdefault(own, of_file[name])
    return found


def _finder(folders: Sequence[pathlib.Path], listed: list) -> Callable[[str], pathlib.Path]:
    """Where the file of a name is: below the first folder that has it. Exports have whole paths of
    other machines, and addresses: then the end of the name alone counts, if no other has it."""
    there: dict[str, set[str]] = {}
    ends = collections.Counter(os.path.basename(name) for name in {*map(_name, listed)})

    def has(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in there[folder]

    def find(name: str) -> pathlib.Path:
        end = os.path.basename(name)
        tries = [name, end] if ends[end] == 1 else [name]
        paths = [os.path.join(folder, there) for there in tries for folder in folders]
        return pathlib.Path(next((path for path in paths if has(path)), paths[0]))

    return find


def _name(image: dict) -> str:
    """An image's file; the address where LVIS has nothing else. "" without one."""
    name = image.get("file_name") or image.get("coco_url")
    return name.replace("\\", "/") if isinstance(name, str) else ""


def _framed(listed: dict, faults: Faults) -> list[_Picture]:
    """The pictures that can be used, with their frames, in the order of the list."""
    unique = {id(picture): picture for picture in listed.values() if picture is not None}
    pictures = list(unique.values())
    sizes = [picture.size for picture in pictures]
    found = labels.frames([picture.path for picture in pictures], sizes, faults)
    for picture, frame in zip(pictures, found, strict=True):
        picture.frame = frame or picture.frame
    return [picture for picture in pictures if picture.frame.height]


def _place(given: list, listed: dict, number: dict[Hashable, int], faults: Faults) -> None:
    """Adds every annotation that can be used to its picture."""
    shares = _all_shares(given)
    if shares:
        faults.add(AS_SHARES, "annotation 0")
    for place, annotation in enumerate(given):
        annotation = annotation if isinstance(annotation, dict) else {}
        image = identity(annotation.get("image_id"))
        where = f"annotation {place} (id {annotation.get('id')}, image {image})"
        if image not in listed:
            faults.add(NO_IMAGE, where)
            continue
        picture = listed[image]
        if picture is None or not picture.frame.height:
            continue  # left out with its image, which has been counted
        label = number.get(identity(annotation.get("category_id")))
        if label is None:
            faults.add(NO_CATEGORY, f"{where}, category {annotation.get('category_id')}")
            continue
        frame = _shared(picture.frame) if shares else picture.frame
        box = _box(annotation, frame, faults, where)
        if box is not None:
            ignored = _flag(annotation.get("iscrowd")) or _flag(annotation.get("ignore"))
            add_object(picture.rows, box, label, ignored, place, faults, where)


def _box(annotation: dict, frame: Frame, faults: Faults, where: str) -> Box | None:
    """The box of an annotation, or that around its outline; None without either."""
    found = numbers(annotation.get("bbox"), 4)
    if found is not None and found[2] and found[3]:
        if any(isinstance(side, str) for side in annotation["bbox"]):
            faults.add(AS_TEXT, where)
        x, y, width, height = found
        down, across = frame.height, frame.width
        box = y / down, x / across, (y + height) / down, (x + width) / across
        return turned_box(box, frame.orientation)
    box = box_of(annotation.get("segmentation"), frame)
    faults.add(labels.NO_BOX if box is None else FROM_OUTLINE, where)
    return box


def _all_shares(given: list) -> bool:
    """Whether every box is one of fractions of the sides, as Azure exports them."""
    boxes = (numbers(a.get("bbox"), 4) for a in given if isinstance(a, dict))
    seen = False
    for box in boxes:
        if box is not None and (min(box) < 0 or max(box) > 1):
            return False
        seen = seen or (box is not None and any(side % 1 for side in box))
    return seen


def _shared(frame: Frame) -> Frame:
    return Frame(1.0, 1.0, frame.orientation)


def _flag(given: object) -> bool:
    """Whether a flag is set, as a number or as text."""
    return bool(given) and str(given).strip().lower() not in ("0", "0.0", "false", "no")


def _outlines(file: pathlib.Path, places: Sequence[tuple[Frame, np.ndarray]]) -> list[Outlines]:
    """Those of each picture's objects, read from the file again: they are many times larger than
    all else that it has.

    Args: places: of each picture, its frame and the places of its objects in the file.
    """
    given = _read(file)["annotations"]
    shares = _all_shares(given)
    found = []
    for frame, own in places:
        frame = _shared(frame) if shares else frame
        found.append(tuple(outline_of(given[n].get("segmentation"), frame) for n in own))
    return found
