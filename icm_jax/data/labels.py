"""Labels of objects as people's files have them: what is broken is counted and said once.

Boxes are (ymin, xmin, ymax, xmax) and points (y, x), as fractions of an image's sides. The rules,
which hold for COCO's JSON (`coco`), VOC's XML (`voc`) and YOLO's text (`yolo`) alike: what can be
understood is used, what cannot is left out alone, and every kind of fault is one line on stderr
with its count and the first example.
"""

import collections
import functools
import math
import pathlib
import sys
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from icm_jax.data.images import Header, header, turned_points
from icm_jax.data.sources import Objects, objects_of
from icm_jax.errors import IcmError, reason

Box = tuple[float, float, float, float]
Rows = dict[tuple[Box, int, bool], int]
"""Of an image: (box, label, ignored) of each object, in order -> its place in the file."""
_ROUNDING = 0.01
"""What of a side a box may overhang before that is worth a word."""

BEYOND = "boxes that overhang their image, clipped"
OUTSIDE = "boxes of which nothing lies in their image, left out"
MIRRORED = "boxes drawn from another corner, with sides below 0, taken as drawn"
REPEATED = "objects listed twice, with the same class and box, taken once"
NO_BOX = "objects without a box that has an area, left out"
MISSING = "images that are not there, left out with their objects"
NO_SIZE = "images whose sizes are not given, read from the files"
UNREADABLE = "images whose sizes are not given and whose files cannot be read, left out"
OTHER_SIZE = "images whose files have another shape than the sizes given, those of the files used"
TURNED = (
    "images that EXIF turns, but whose objects are given as the pixels are stored; turned with them"
)


class Faults:
    """What is wrong with the labels of a file or folder, by kind."""

    def __init__(self, name: str | pathlib.Path):
        self.name = str(name)
        self._count: collections.Counter[str] = collections.Counter()
        self._first: dict[str, object] = {}

    def add(self, kind: str, example: object) -> None:
        """One more of a kind; the first example is kept."""
        self._count[kind] += 1
        self._first.setdefault(kind, example)

    def lines(self) -> list[str]:
        """A line for each kind."""
        found = self._count.items()
        return [f"{self.name}: {kind}: {n}, first {self._first[kind]}" for kind, n in found]

    def said(self, rows: Iterable[Rows], given: int) -> None:
        """Says each line, once in a process.

        Args: rows: what could be used. given: how many objects the labels have.

        Raises: IcmError if there are objects, but none of use.
        """
        if given and not any(rows):
            lost = "; ".join(line.removeprefix(f"{self.name}: ") for line in self.lines())
            raise IcmError(f"{self.name}: none of its {given} objects can be used: {lost}")
        for line in self.lines():
            _say(line)


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def numbers(given: object, count: int) -> tuple[float, ...] | None:
    """So many finite numbers, of a list of numbers or text; else None.

    >>> numbers([1, "2.5"], 2), numbers([1, float("nan")], 2), numbers("12", 2)
    ((1.0, 2.5), None, None)
    """
    if not isinstance(given, list | tuple) or len(given) != count:
        return None
    try:
        found = tuple(map(float, given))
    except (TypeError, ValueError, OverflowError):
        return None
    return found if all(map(math.isfinite, found)) else None


def add_object(
    rows: Rows, box: Box, label: int, ignored: bool, place: int, faults: Faults, where: object
) -> None:
    """An object of an image, its box clipped; none if nothing is left, or it is there already.

    Args: place: its number in the file. where: an example for `faults`.
    """
    ymin, xmin, ymax, xmax = box
    if ymin > ymax or xmin > xmax:
        faults.add(MIRRORED, where)
        ymin, ymax, xmin, xmax = min(ymin, ymax), max(ymin, ymax), min(xmin, xmax), max(xmin, xmax)
    clipped = max(ymin, 0.0), max(xmin, 0.0), min(ymax, 1.0), min(xmax, 1.0)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        faults.add(OUTSIDE if ymin < ymax and xmin < xmax else NO_BOX, where)
        return
    if max(-ymin, -xmin, ymax - 1, xmax - 1) > _ROUNDING:
        faults.add(BEYOND, where)
    if (clipped, label, ignored) in rows:
        faults.add(REPEATED, where)
    rows.setdefault((clipped, label, ignored), place)


def objects(rows: Rows) -> Objects:
    """The objects of an image."""
    return objects_of(*zip(*rows, strict=True)) if rows else objects_of()


def places(rows: Rows) -> np.ndarray:
    """int32 [k]: where the objects of an image are in its file."""
    return np.fromiter(rows.values(), np.int32, len(rows))


def turned_box(box: Box, orientation: int) -> Box:
    """A box of the pixels as stored on the upright image."""
    if orientation == 1:
        return box
    (y, x), (v, u) = turned_points([box[:2], box[2:]], orientation)
    return min(y, v), min(x, u), max(y, v), max(x, u)


class Frame(NamedTuple):
    """In which picture the coordinates of an image's labels lie.

    Attributes: height, width: its sides. orientation: EXIF's, by which it is to be turned.
    """

    height: float
    width: float
    orientation: int = 1


def headers(paths: Sequence[pathlib.Path]) -> list[Header | OSError | None]:
    """What the beginning of each file says; None of one that is no image."""

    def read(path):
        try:
            return header(path)
        except OSError as error:
            return error
        except ValueError as error:  # a name that no file can have
            return FileNotFoundError(error)

    with ThreadPoolExecutor() as threads:
        return list(threads.map(read, paths, chunksize=64))


def frames(
    paths: Sequence[pathlib.Path], sizes: Sequence[tuple[float, float] | None], faults: Faults
) -> list[Frame | None]:
    """The frame of each image's labels; None of images that cannot be used.

    Sizes that are given name it: those of the upright image, or of the pixels as they are stored,
    or either at another scale. Where both are the same (a square, a picture upside down), it is
    as in most of the other turned images.

    Args: sizes: (height, width) as the labels have them, None where they have none.
    """
    files = headers(paths)
    found: list[Frame | None] = []
    unclear: list[tuple[int, tuple[float, float] | None, Header]] = []
    stored = 0
    for number, (path, size, file) in enumerate(zip(paths, sizes, files, strict=True)):
        found.append(None)
        if isinstance(file, FileNotFoundError | NotADirectoryError):
            faults.add(MISSING, path)
        elif not isinstance(file, Header):  # what is wrong with it is said when it is read
            if size is None:
                faults.add(UNREADABLE, f"{path} ({reason(file)})" if file else path)
            found[number] = size and Frame(*size)
        else:
            if size is None:
                faults.add(NO_SIZE, path)
            frame = _frame(size, file)
            if frame is None:
                unclear.append((number, size, file))
            else:
                if size is not None and not _similar(size, frame[:2]):
                    faults.add(OTHER_SIZE, f"{path} ({size[1]:g} x {size[0]:g})")
                stored += 0 if file.orientation == 1 else 1 if frame.orientation > 1 else -1
            found[number] = frame
    for number, size, file in unclear:
        if stored > 0:
            found[number] = Frame(*(size or (file.height, file.width)), file.orientation)
        else:
            found[number] = Frame(*(size or file.upright))
    for path, frame in zip(paths, found, strict=True):
        if frame is not None and frame.orientation > 1:
            faults.add(TURNED, path)
    return found


def _frame(size: tuple[float, float] | None, file: Header) -> Frame | None:
    """The frame of these sizes; None where they do not tell."""
    as_stored: tuple[float, float] = file.height, file.width
    if file.orientation == 1:
        return Frame(*(size if size and _similar(size, as_stored) else as_stored))
    if size is None or as_stored == file.upright:
        return None
    fits = [size == side for side in (file.upright, as_stored)]
    fits = fits if any(fits) else [_similar(size, side) for side in (file.upright, as_stored)]
    if all(fits):
        return None
    if fits[1]:
        return Frame(*size, file.orientation)
    return Frame(*(size if fits[0] else file.upright))


def _similar(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two (height, width) are of one shape, as far as rounded sides tell."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= 2 * max(*one, *other)


def identity(given: object) -> Hashable:
    """An id that is the same as a number and as text.

    >>> identity(7) == identity("7") == identity(7.0), identity("a.jpg"), identity(None)
    (True, 'a.jpg', None)
    """
    if given is None or isinstance(given, list | dict):
        return None
    if isinstance(given, float) and given.is_integer():
        return str(int(given))
    return str(given).strip()
