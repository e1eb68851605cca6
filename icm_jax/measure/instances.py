"""Average precision of masks of objects, COCO's, in pixels of the images themselves.

A mask that a network gives lies in its box; it is pasted into the image at its own size and
compared with the object's outline there (He et al. 2017, section 3.1). What the network sees is a
reduced image on a canvas, and no part of this.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icm_jax.data import pipeline
from icm_jax.data.images import header
from icm_jax.data.outlines import Outlines, mask_of
from icm_jax.data.sources import Source
from icm_jax.measure.precision import CocoPrecision, average_precision
from icm_jax.measure.scores import Score

THERE = 0.5
"""Least probability of a pixel of a mask."""


def paste(mask: np.ndarray, box: Sequence[float], height: int, width: int) -> np.ndarray:
    """bool [height, width]: a mask of probabilities, float [s, s], in its box in an image.

    A pixel's middle takes what is interpolated between the middles of the mask's elements, outside
    of which there is 0.

    Args: box: (ymin, xmin, ymax, xmax) in pixels of the image; it may reach beyond it.
    """
    whole, spans, shares = np.zeros((height, width), bool), [], []
    for start, end, side, count in zip(box[:2], box[2:], (height, width), mask.shape, strict=True):
        first, last = max(int(np.floor(start)), 0), min(int(np.ceil(end)), side)
        at = (np.arange(first, last) + 0.5 - start) * count / max(end - start, 1e-6) - 0.5
        shares.append(np.maximum(1 - np.abs(at[:, None] - np.arange(count)), 0))
        spans.append(slice(first, max(first, last)))
    whole[spans[0], spans[1]] = shares[0] @ mask @ shares[1].T >= THERE
    return whole


def own_truth(source: Source, batch: dict, masks: bool) -> dict[str, Any]:
    """What the objects of a batch are in their own images, for scores: {"own_sides": int [N, 2]}
    and of masks also "areas": float [N, B], in pixels, and "own_masks": of each image, of each
    object, pycocotools' run lengths, or None without an outline. Rows that are not valid have 0.

    Args: batch: of `pipeline.in_order`, with boxes. masks: whether the source has outlines.
    """
    rows, count = batch["boxes"].shape[:2]
    sides, areas = np.zeros((rows, 2), int), np.zeros((rows, count))
    found: list[list[dict | None]] = [[None] * count for _ in range(rows)]
    for row in np.flatnonzero(batch["valid"]):
        loaded = source.load(int(batch["number"][row]))
        read = header(loaded["image"])
        if read is None:  # an .icm file
            sides[row] = source.read(loaded["image"], loaded["name"], (0, 0)).shape[:2]
        else:
            sides[row] = read.upright
        objects = loaded["objects"]
        corners = objects.boxes * np.tile(sides[row], 2)
        outlines: Outlines = loaded["outlines"]() if masks else (None,) * len(corners)
        for place, number in enumerate(pipeline.largest_first(objects, count)):
            areas[row, place] = (corners[number, 2:] - corners[number, :2]).prod()
            if (outline := outlines[number]) is not None:
                mask = mask_of(outline, *map(int, sides[row]))
                areas[row, place] = mask.sum()
                found[row][place] = encoded(mask)
    given: dict[str, Any] = {"own_sides": sides}
    return given | {"areas": areas, "own_masks": found} if masks else given


def encoded(mask: np.ndarray) -> dict:
    """pycocotools' run lengths of a mask, bool [H, W]."""
    from pycocotools import mask as tool

    encoder: Any = tool
    return encoder.encode(np.asfortranarray(mask, np.uint8))


class MaskPrecision(CocoPrecision):
    """COCO's mean average precision of masks.

    Predictions have also "masks" [N, D, s, s], probabilities in their boxes, and batches what
    `own_truth` gives. An object without an outline is neither a hit nor a miss, where its box is.
    """

    kind = "segm"

    def update(self, predicted, batch):
        for row in np.flatnonzero(batch["valid"]):
            height, width = map(int, batch["own_sides"][row])
            sides = height, width
            self._sides.append(sides)
            corner, scale = self._place(batch, row, sides)
            for i in np.flatnonzero(batch["box_valid"][row] | batch["box_ignored"][row]):
                label, mask = int(batch["box_labels"][row, i]), batch["own_masks"][row][i]
                ignored = bool(batch["box_ignored"][row, i]) or mask is None
                if mask is None:
                    box = (batch["boxes"][row, i] - corner) * scale
                    mask = encoded(_inside(box, sides))
                self._truth.append((self.examples, label, mask, ignored))
            for i in np.flatnonzero(predicted["valid"][row]):
                box = (predicted["boxes"][row, i] - corner) * scale
                mask = encoded(paste(predicted["masks"][row, i], box, *sides))
                label, score = int(predicted["labels"][row, i]), float(predicted["scores"][row, i])
                self._found.append((self.examples, label, mask, score))
            self.examples += 1

    def _place(self, batch, row, sides) -> tuple[np.ndarray, np.ndarray]:
        """What takes boxes from fractions of the canvas to pixels of the image: less the first,
        times the second, float64 [4] each."""
        start, size = batch["extent"][row].reshape(2, 2) / np.array(batch["image"].shape[1:3])
        return np.tile(start, 2), np.tile(sides / size, 2)

    def _annotations(self):
        from pycocotools import mask as tool

        areas: Any = tool

        def annotation(image, label, mask, **more):
            about = {"image_id": image + 1, "category_id": label, "segmentation": mask}
            return about | {"area": float(areas.area(mask)), "iscrowd": 0} | more

        truth = [annotation(*row[:3], iscrowd=int(row[3])) for row in self._truth]
        return truth, [annotation(*row[:3], score=row[3]) for row in self._found]


def _inside(box: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """bool [*sides], whether a pixel's middle is in a box, float [4]."""
    rows, columns = (np.arange(side) + 0.5 for side in sides)
    down, across = (rows >= box[0]) & (rows < box[2]), (columns >= box[1]) & (columns < box[3])
    return down[:, None] & across[None]


class InstancePrecision(Score):
    """Average precision of boxes by a protocol, and COCO's of masks: mask_map50 and mask_map."""

    def __init__(self, protocol: str, classes: Sequence[str]):
        self.boxes = average_precision(protocol, classes)
        self.masks = MaskPrecision(classes)

    def update(self, predicted, batch):
        self.boxes.update(predicted, batch)
        self.masks.update(predicted, batch)
        self.examples = self.boxes.examples

    def add(self, other):
        self.boxes.add(other.boxes)
        self.masks.add(other.masks)
        self.examples = self.boxes.examples

    def result(self):
        return _named(self.masks.result()) | self.boxes.result()

    def by_class(self):
        return self.boxes.by_class()

    def parts(self):
        return self.boxes.parts() | _named(self.masks.parts())

    def resampled(self, counts):
        return self.boxes.resampled(counts) | _named(self.masks.resampled(counts))


def _named(scores: Mapping[Any, Any]) -> dict[str, Any]:
    return {f"mask_{name}": value for name, value in scores.items() if name != "examples"}
