"""Outlines of objects: COCO's polygons and run lengths, kept small, as masks when asked for."""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from icm_jax.data.geometry import inside
from icm_jax.data.images import turned, turned_points
from icm_jax.data.labels import Box, Frame, numbers
from icm_jax.errors import IcmError, reason

_FAR = 1.0
"""How many sides beyond its image a corner may lie: pycocotools takes memory by length."""
_MOST = 1 << 28
"""Pixels of a mask; Pillow refuses images of fewer."""

Made = TypeVar("Made")


class Outline(NamedTuple):
    """The shape of an object in its upright image.

    Attributes:
      polygons: float32 [n, 2] each, corners (y, x) as fractions of the sides; their union.
      runs: uint32 [r], lengths of runs of 0, 1, 0, ... down the columns of a mask, in place of
        polygons. size: (height, width) of that mask, (0, 0) without.
    """

    polygons: tuple[np.ndarray, ...] = ()
    runs: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)


Outlines = tuple[Outline | None, ...]
"""Of each object of an image, in the order of its `Objects`; None where the file has none."""


def mask_of(outline: Outline, height: int, width: int) -> np.ndarray:
    """bool [height, width]: where the object is, if its image has these sides.

    Polygons are filled as pycocotools does; of a mask of another size, the nearest pixels count.
    """
    if outline.runs is not None:
        stored = _filled(outline.runs, outline.size)
        rows, columns = (
            (2 * np.arange(side) + 1) * length // (2 * side)
            for side, length in zip((height, width), stored.shape, strict=True)
        )
        return stored[rows[:, None], columns]
    from pycocotools import mask

    sides = np.array([width, height], np.float64)
    corners = [(polygon[:, ::-1] * sides).ravel().tolist() for polygon in outline.polygons]
    tool: Any = mask
    encoded = tool.merge(tool.frPyObjects(corners, height, width))
    # Its own decoder warns with NumPy 2, and leaves what short text lacks as memory has it.
    runs = _decompressed(encoded["counts"].decode())
    return _filled(np.array(runs, np.uint32), (height, width))


def canvas_masks(
    outlines: Sequence[Outline | None],
    canvas: tuple[int, int],
    extent: tuple[int, int, int, int],
    step: int,
) -> dict[str, np.ndarray]:
    """{"box_masks": bool [k, height / step, width / step], "box_outlined": bool [k]} of objects in
    an image that lies in its canvas at (top, left, height, width), as in `pipeline.batches`."""
    first = step // 2
    masks = np.zeros((len(outlines), canvas[0] // step, canvas[1] // step), bool)
    for mask, outline in zip(masks, outlines, strict=True):
        if outline is not None:
            whole = np.zeros(canvas, bool)
            whole[inside(extent)] = mask_of(outline, *extent[2:])
            mask[:] = whole[first::step, first::step]
    outlined = np.array([outline is not None for outline in outlines], bool)
    return {"box_masks": masks, "box_outlined": outlined}


def outline_of(segmentation: Any, frame: Frame) -> Outline | None:
    """The outline that COCO's "segmentation" gives: polygons [[x, y, x, y, ...], ...], one of them
    alone, or {"size", "counts"}, compressed or not; None if it is none of these.

    Polygons of fewer than three corners, or with what is no number, are left out.
    """
    if isinstance(segmentation, dict):
        return _of_runs(segmentation, frame)
    if not isinstance(segmentation, list):
        return None
    single = segmentation and not isinstance(segmentation[0], list)
    polygons = []
    for given in [segmentation] if single else segmentation:
        found = numbers(given, len(given) // 2 * 2) if isinstance(given, list) else None
        if found is not None and len(found) >= 6:
            polygons.append(polygon([*zip(found[1::2], found[::2], strict=True)], frame))
    return Outline(tuple(polygons)) if polygons else None


def polygon(points: Sequence[tuple[float, float]], frame: Frame) -> np.ndarray:
    """float32 [n, 2] of corners (y, x) in a frame, as `Outline` has them; those that are far from
    the image are drawn nearer."""
    corners = [(y / frame.height, x / frame.width) for y, x in points]
    upright = np.array(turned_points(corners, frame.orientation), np.float64)
    return upright.clip(-_FAR, 1 + _FAR).astype(np.float32)


def box_of(segmentation: Any, frame: Frame) -> Box | None:
    """The box around an outline, of COCO's "segmentation"; None without one that has an area."""
    outline = outline_of(segmentation, frame)
    if outline is None:
        return None
    if outline.runs is None:
        corners = np.concatenate(outline.polygons)
        low, high = corners.min(axis=0), corners.max(axis=0)
    else:
        rows, columns = np.nonzero(_filled(outline.runs, outline.size))
        if not len(rows):
            return None
        low = np.array([rows.min(), columns.min()]) / outline.size
        high = np.array([rows.max() + 1, columns.max() + 1]) / outline.size
    (ymin, xmin), (ymax, xmax) = low.tolist(), high.tolist()
    return (ymin, xmin, ymax, xmax) if ymin < ymax and xmin < xmax else None


def _of_runs(given: dict, frame: Frame) -> Outline | None:
    size, counts = numbers(given.get("size"), 2), given.get("counts")
    if size is None:
        return None
    height, width = map(int, size)
    if isinstance(counts, str):
        lengths = _decompressed(counts)
    else:
        lengths = numbers(counts, len(counts)) if isinstance(counts, list) else None
    if not lengths or min(lengths) < 0 or sum(lengths) != height * width or height * width > _MOST:
        return None
    runs = np.array(lengths, np.uint32)
    if frame.orientation > 1:
        upright = turned(_filled(runs, (height, width)), frame.orientation)
        runs, (height, width) = _lengths(upright), upright.shape
    return Outline(runs=runs, size=(height, width))


def _decompressed(text: str) -> list[int] | None:
    """Run lengths of pycocotools' text: groups of 5 bits from the lowest on, bit 5 where more
    follow, differences from the last but one after the third (maskApi.c, rleFrString)."""
    found: list[int] = []
    value = shift = 0
    for letter in text:
        group = ord(letter) - 48
        if not 0 <= group < 64:
            return None
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        value -= (group & 16) and 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    return None if shift else found


def _filled(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [height, width] of run lengths down the columns."""
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(size[::-1]).T


def _lengths(mask: np.ndarray) -> np.ndarray:
    """uint32 run lengths of a mask, the inverse of `_filled`."""
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).astype(np.uint32)


def once(make: Callable[[], Made]) -> Callable[[], Made]:
    """A function that calls another one when it is first called, whatever threads ask."""
    lock, kept = threading.Lock(), []

    def get() -> Made:
        with lock:
            if not kept:
                kept.append(make())
        return kept[0]

    return get


def written(outlines: Outlines) -> bytes:
    """Outlines as a record of a data set holds them, JSON."""
    return json.dumps([outline and _plain(outline) for outline in outlines]).encode()


def _plain(outline: Outline) -> list:
    runs = None if outline.runs is None else outline.runs.tolist()
    return [[corners.ravel().tolist() for corners in outline.polygons], runs, outline.size]


def read_outlines(data: bytes) -> Outlines:
    """The inverse of `written`. Raises: IcmError if it is something else."""
    try:
        return tuple(outline and _from_plain(*outline) for outline in json.loads(data))
    except (TypeError, ValueError) as error:
        raise IcmError(f"the outlines of a record are damaged: {reason(error)}") from error


def _from_plain(polygons, runs, size) -> Outline:
    corners = tuple(np.array(p, np.float32).reshape(-1, 2) for p in polygons)
    return Outline(corners, None if runs is None else np.array(runs, np.uint32), tuple(size))
