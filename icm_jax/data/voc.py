"""PASCAL VOC's boxes: XML files as its devkit and labelling tools write them."""

import collections
import pathlib
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

from icm_jax.data import labels
from icm_jax.data.labels import Faults, Frame, Rows, add_object, numbers, turned_box
from icm_jax.data.masks import VOC_CLASSES
from icm_jax.data.sources import Source, bytes_of, existing, images_of, largest, listed_in, named
from icm_jax.errors import IcmError

NO_FILE = "images without an XML file, left out"
NO_XML = "images whose XML file is none, left out"
NO_CLASS = "objects of classes that are not listed, left out"


def voc_boxes(config, split: str) -> Source:
    """PASCAL VOC's own folder, as `VOCdevkit/VOC2012`, or one of its form: Annotations, JPEGImages
    and lists in ImageSets/Main.

    Fields:
      list, validation_list: those of the splits, "train" and "val"; of VOC2007, "trainval" and
        "test".

    Without ImageSets/Main every fifth image by name hash is kept for validation. Classes are those
    of `classes.txt`, or VOC's 20, or, where XML files name others, all that they name, by the
    alphabet. Pixels are counted from 1 and boxes hold both their ends, as the devkit has it.
    Difficult objects are ignored. What is broken is treated by the rules of docs/labels.md.

    Raises: IcmError for a folder of another form, or of which nothing can be used.
    """
    root = existing(config)
    faults, places = Faults(root), root / "Annotations"
    files = sorted(places.glob("*.xml")) if places.is_dir() else []
    if not files:
        raise IcmError(f"{places} has no XML files; data.path is the folder that Annotations is in")
    lists, images = root / "ImageSets" / "Main", root / "JPEGImages"
    if lists.is_dir():
        chosen = config["list" if split == "train" else "validation_list"]
        lines = listed_in(lists / f"{chosen}.txt")  # of a class's list, a flag follows the stem
    else:
        lines = [path.stem for path in images_of(images, split)]
    with ThreadPoolExecutor() as threads:
        trees = dict(zip((file.stem for file in files), threads.map(_tree, files), strict=True))
    classes = _classes(root, trees)
    there, pairs = named(images, ""), []
    for stem in dict.fromkeys(line if line in trees else line.split()[0] for line in lines):
        path, tree = there.get(stem, images / f"{stem}.jpg"), trees.get(stem)
        if tree is None:
            faults.add(NO_XML if stem in trees else NO_FILE, path)
        else:
            pairs.append((path, tree))
    sizes = [_size(tree) for _, tree in pairs]
    frames = labels.frames([path for path, _ in pairs], sizes, faults)
    kept = [(*pair, frame) for pair, frame in zip(pairs, frames, strict=True) if frame is not None]
    if not kept:
        lost = "; ".join(faults.lines()) or "its list is empty"
        raise IcmError(f"{root} has no image for {split} that can be used ({lost})")
    number = {name: index for index, name in enumerate(classes)}
    rows = [_rows(tree, frame, number, faults, f"{path.stem}.xml") for path, tree, frame in kept]
    faults.said(rows, sum(len(tree.findall("object")) for _, tree, _ in kept))
    paths, found = [path for path, *_ in kept], [labels.objects(some) for some in rows]

    def load(index):
        example = {"image": bytes_of(paths[index]), "name": str(paths[index])}
        return example | {"objects": found[index], "label": largest(found[index])}

    return Source(str(root), len(paths), classes, load)


def _tree(file: pathlib.Path) -> ElementTree.Element | None:
    """The root of an XML file; None if it is none."""
    try:
        return ElementTree.fromstring(bytes_of(file))
    except (ElementTree.ParseError, LookupError, ValueError):  # also of an unknown encoding
        return None


def _classes(root: pathlib.Path, trees: dict) -> tuple[str, ...]:
    if (root / "classes.txt").is_file():
        return tuple(listed_in(root / "classes.txt"))
    objects = (o for tree in trees.values() if tree is not None for o in tree.iterfind("object"))
    found = collections.Counter(_text(o, "name") for o in objects)
    names = sorted(name for name in found if name)
    usual = tuple(VOC_CLASSES.split()[1:])
    return usual if set(names) <= set(usual) else tuple(names)


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _size(tree: ElementTree.Element) -> tuple[float, float] | None:
    """(height, width); None where it is not given, or as 0."""
    found = numbers([_text(tree, "size/height"), _text(tree, "size/width")], 2)
    return (found[0], found[1]) if found and min(found) > 0 else None


def _rows(
    tree: ElementTree.Element, frame: Frame, number: dict[str, int], faults: Faults, where: str
) -> Rows:
    """The objects of an image; an object's parts, as heads and hands, are none."""
    rows: Rows = {}
    for place, given in enumerate(tree.iterfind("object")):
        name = _text(given, "name")
        example = f"object {place} ({name}) of {where}"
        ends = [_text(given, f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        found = numbers(ends, 4)
        if name not in number:
            faults.add(NO_CLASS, example)
        elif found is None:
            faults.add(labels.NO_BOX, example)
        else:
            x, y, right, bottom = found
            x, right, y, bottom = min(x, right), max(x, right), min(y, bottom), max(y, bottom)
            sides = frame.height, frame.width
            box = (y - 1) / sides[0], (x - 1) / sides[1], bottom / sides[0], right / sides[1]
            ignored = _text(given, "difficult") not in ("", "0")
            turned = turned_box(box, frame.orientation)
            add_object(rows, turned, number[name], ignored, place, faults, example)
    return rows
