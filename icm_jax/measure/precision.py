"""Average precision of boxes by the protocols of COCO and of PASCAL VOC.

    coco       pycocotools: map (mean over IoU 0.5 to 0.95) and map50 (at IoU 0.5), precision
               interpolated at 101 recalls, 100 boxes per image, all sizes
    voc2007    IoU 0.5, precision interpolated at 11 recalls (Everingham et al. 2010, section 4.2)
    voc2010    IoU 0.5, area below the monotone curve, as in VOC's development kits from 2010 on

The protocols differ in more than the mean. In VOC's each box goes to the object that it overlaps
most, and is a false alarm if a surer one has that already, while COCO gives it the best of those
that are left. Objects that are ignored are VOC's `difficult` ones, which a box must overlap by a
half as well; COCO's are crowds, of which a box may be a small part.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from icm_jax.errors import IcmError
from icm_jax.measure.scores import Score
from icm_jax.tasks.detection import PROTOCOLS

AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's sizes of objects, in pixels of their own images."""
OVERLAP = 0.5
"""VOC's least intersection over union of a hit."""
_AT_ONCE = 1 << 20
"""Detections times draws times overlaps, of which average precisions are drawn together."""
UNIT = (1000.0, 1000.0)
"""Sides that images are given which tell none: COCO passes over boxes of less than a pixel."""
EVERY = {"all": (0, 1e10)}
_RECALLS = np.arange(11) / 10  # of VOC 2007; 3 / 10 is then the recall of 3 of 10 objects


def average_precision(protocol: str, classes: Sequence[str]) -> Score:
    """The score of a protocol. Raises: IcmError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise IcmError(f"no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    return CocoPrecision(classes) if protocol == "coco" else VocPrecision(classes, protocol)


class BoxScore(Score):
    """What both protocols see.

    Predictions: "boxes" [N, D, 4], "scores", "labels", "valid" [N, D]; batches: "boxes" [N, B, 4],
    "box_labels", "box_valid", "box_ignored" [N, B], "image" and its "extent", and if objects are to
    be told apart by size "own_sides" [N, 2], height and width of the images themselves, and, where
    an object's area is not its box's, "areas" [N, B] in their pixels. What is predicted ends with
    the picture, as in Darknet's own evaluation: truth does. Overlaps do not depend on the unit of
    length. Boxes are continuous: VOC's corners are pixels that belong to the object, so the pixel
    that its development kit adds to a width is part of the box here.

    Args: classes: their names.

    Raises: IcmError (`result`, `by_class`, `resampled`) if no image has a box.
    """

    def __init__(self, classes: Sequence[str]):
        self._classes = tuple(classes)
        self._truth: list[tuple] = []  # image from 0 on, label, box, ignored
        self._found: list[tuple] = []  # image, label, box, score
        self._areas: list[float | None] = []  # of `_truth`
        self._sides: list[tuple | None] = []  # of each image
        self._units: list[tuple] = []  # pixels that the canvas would have at the image's own size

    def update(self, predicted, batch):
        for row in np.flatnonzero(batch["valid"]):
            start, size = batch["extent"][row].reshape(2, 2) / np.array(batch["image"].shape[1:3])
            low, high = np.tile(start, 2), np.tile(start + size, 2)
            sides = tuple(map(int, batch["own_sides"][row])) if "own_sides" in batch else None
            self._sides.append(sides)
            self._units.append(tuple(sides / size) if sides else UNIT)
            for i in np.flatnonzero(batch["box_valid"][row] | batch["box_ignored"][row]):
                ignored = bool(batch["box_ignored"][row, i])
                label, box = batch["box_labels"][row, i], batch["boxes"][row, i]
                self._truth.append((self.examples, int(label), box, ignored))
                self._areas.append(float(batch["areas"][row, i]) if "areas" in batch else None)
            for i in np.flatnonzero(predicted["valid"][row]):
                label, box = predicted["labels"][row, i], predicted["boxes"][row, i]
                box = np.clip(box, low, high)
                score = float(predicted["scores"][row, i])
                self._found.append((self.examples, int(label), box, score))
            self.examples += 1

    def add(self, other):
        self._truth += [(self.examples + row[0], *row[1:]) for row in other._truth]
        self._found += [(self.examples + row[0], *row[1:]) for row in other._found]
        self._areas += other._areas
        self._sides += other._sides
        self._units += other._units
        self.examples += other.examples

    def require_boxes(self) -> None:
        if not any(not ignored for *_, ignored in self._truth):
            raise IcmError("no box to find in the validation split; average precision needs some")


class VocPrecision(BoxScore):
    """Mean average precision by the protocol "voc2007" or "voc2010", which is its name."""

    def __init__(self, classes: Sequence[str], protocol: str):
        super().__init__(classes)
        self._protocol = protocol

    def result(self):
        value = float(np.mean([*self.by_class().values()]))
        return {self._protocol: value, "examples": self.examples}

    def by_class(self):
        once = np.ones((1, self.examples), np.uint16)
        values = np.concatenate(self._of_classes(once))[:, 0]
        named = zip(self._classes, values, strict=True)
        return {name: float(value) for name, value in named if not np.isnan(value)}

    def resampled(self, counts):
        return {self._protocol: _mean_of_classes(self._of_classes(counts))[0]}

    def _of_classes(self, counts) -> list[np.ndarray]:
        """Of each class the precision in each draw, float64 [1, draws]."""
        self.require_boxes()
        rows: list[dict[int, dict]] = [{} for _ in self._classes]
        empty = np.zeros((0, 4))
        truth, found = _gathered(self._truth), _gathered(self._found)
        for label, image in sorted({*truth, *found}):
            boxes, difficult = truth.get((label, image), (empty, np.zeros(0)))
            given = found.get((label, image), (empty, np.zeros(0)))
            rows[label][image] = _matched(boxes, difficult.astype(bool), *given)
        measure = _at_recalls if self._protocol == "voc2007" else _area
        return [_over_draws([*of.items()], counts, measure) for of in rows]


def _gathered(rows: list[tuple]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """{(label, image): (boxes float64 [n, 4], the last column [n])}."""
    found: dict[tuple[int, int], list] = {}
    for image, label, box, last in rows:
        found.setdefault((label, image), []).append((box, last))
    return {
        key: (np.array([box for box, _ in of], float), np.array([last for _, last in of], float))
        for key, of in found.items()
    }


def _matched(boxes, difficult, found, scores) -> dict:
    """What is right of the boxes found of a class on an image, as COCOeval says it.

    Args: boxes: float64 [n, 4] of the objects; difficult: bool [n]. found: [d, 4]; scores: [d].
    """
    order = np.argsort(-scores, kind="stable")
    right, passed = np.zeros((2, 1, len(found)), bool)
    taken = np.zeros(len(boxes), bool)
    overlaps = _overlaps(found[order], boxes)
    for row, overlap in enumerate(overlaps if len(boxes) else ()):
        best = int(np.argmax(overlap))
        if overlap[best] < OVERLAP:
            continue
        passed[0, row] = difficult[best]
        right[0, row] = not difficult[best] and not taken[best]
        taken[best] = True
    given = {"dtScores": scores[order], "dtMatches": right, "dtIgnore": passed}
    return given | {"gtIgnore": difficult}


def _overlaps(found: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union, float64 [d, n]."""
    low = np.maximum(found[:, None, :2], boxes[None, :, :2])
    high = np.minimum(found[:, None, 2:], boxes[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    area, other = ((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (found, boxes))
    return shared / np.maximum(area[:, None] + other[None] - shared, 1e-300)


class CocoPrecision(BoxScore):
    """COCO's mean average precision of boxes: map50 and map. Ignored boxes are its crowds."""

    kind: Any = "bbox"
    """As pycocotools names what is compared."""

    def result(self):
        precision = self._precision()
        mean = lambda p: float(p[p > -1].mean())  # noqa: E731
        return {"map50": mean(precision[0]), "map": mean(precision), "examples": self.examples}

    def by_class(self):
        of_classes = self._precision()[0].mean(axis=(0, 2, 3))
        named = zip(self._classes, of_classes, strict=True)
        return {name: float(value) for name, value in named if value > -1}

    def by_size(self) -> dict[str, float]:
        """map of objects of each size in `AREAS`, without those that none has; {} where it is not
        known how large images are."""
        if None in self._sides:
            return {}
        precision = self._precision(AREAS)
        parts = zip(AREAS, (precision[..., place, 0] for place in range(len(AREAS))), strict=True)
        return {name: float(p[p > -1].mean()) for name, p in parts if (p > -1).any()}

    def parts(self):
        return super().parts() | {"by_size": self.by_size()}

    def resampled(self, counts):
        # COCOeval's, with each image's detections as often as the draw takes it.
        scoring = self._compared()
        recalls = scoring.params.recThrs

        def measure(right, wrong, positives):
            precision = _interpolated(right, wrong, positives, recalls)
            return np.stack([precision.mean(axis=(1, 2)), precision[:, 0].mean(axis=1)])

        of_classes = []
        for start in range(0, len(scoring.evalImgs), self.examples):
            rows = enumerate(scoring.evalImgs[start : start + self.examples])
            there = [(image, row) for image, row in rows if row is not None]
            of_classes.append(_over_draws(there, counts, measure, 2))
        return dict(zip(("map", "map50"), _mean_of_classes(of_classes), strict=True))

    def _precision(self, areas: Mapping[str, tuple] = EVERY) -> np.ndarray:
        """[IoU, recall, class, area, 1], -1 of classes without a box."""
        scoring = self._compared(areas)
        with _silence():
            scoring.accumulate()
        return scoring.eval["precision"]

    def _annotations(self) -> tuple[list[dict], list[dict]]:
        """What is there and what is found, as COCO's files have it."""

        def annotation(image, label, box, **more):
            return _annotation(image, label, box, self._units[image]) | more

        truth = [annotation(*row[:3], iscrowd=int(row[3])) for row in self._truth]
        for row, area in zip(truth, self._areas, strict=True):
            row["area"] = row["area"] if area is None else area
        return truth, [annotation(*row[:3], score=row[3]) for row in self._found]

    def _compared(self, areas: Mapping[str, tuple] = EVERY) -> Any:
        """COCOeval that has matched what is found with what is there. Raises: as the class."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        self.require_boxes()
        truth, found = self._annotations()
        sides = [sides or UNIT for sides in self._sides]
        with _silence():
            given, predicted = COCO(), COCO()
            for coco, rows in ((given, truth), (predicted, found)):
                dataset: Any = {
                    "images": [
                        {"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sides, 1)
                    ],
                    "categories": [{"id": k} for k in range(len(self._classes))],
                    "annotations": [dict(row, id=n) for n, row in enumerate(rows, 1)],
                }
                coco.dataset = dataset
                coco.createIndex()
            scoring: Any = COCOeval(given, predicted, self.kind)
            scoring.params.areaRng = [[*limits] for limits in areas.values()]
            scoring.params.areaRngLbl = [*areas]
            scoring.params.maxDets = [100]
            scoring.evaluate()
        return scoring


def _over_draws(
    rows: list[tuple[int, dict]], counts: np.ndarray, measure: Callable, measures: int = 1
) -> np.ndarray:
    """What `measure` gives of a class in each draw: float64 [measures, draws], NaN where a draw has
    no object of it.

    Args:
      rows: (image, what COCOeval says of it, for each IoU). counts: [draws, images].
      measure: (right, wrong, both float64 [draws, IoUs, detections], how many there are up to each
        detection, the surest first; objects [draws]) -> [measures, draws].
    """
    values = np.full((measures, len(counts)), np.nan)
    objects = np.array([(row["gtIgnore"] == 0).sum() for _, row in rows], np.int64)
    positives = counts[:, [image for image, _ in rows]] @ objects
    drawn = np.flatnonzero(positives)
    if not len(drawn):
        return values
    scores = np.concatenate([row["dtScores"] for _, row in rows])
    order = np.argsort(-scores, kind="mergesort")
    image = np.concatenate([np.full(len(row["dtScores"]), i) for i, row in rows]).astype(int)
    matched, ignored = (
        np.concatenate([row[key] for _, row in rows], axis=1)[:, order].astype(bool)
        for key in ("dtMatches", "dtIgnore")
    )
    every = max(1, _AT_ONCE // max(1, matched.size))
    for first in range(0, len(drawn), every):
        some = drawn[first : first + every]
        taken = counts[some][:, image[order]][:, None]  # [draws, 1, detections]
        right = np.cumsum(taken * (matched & ~ignored), axis=2, dtype=float)
        wrong = np.cumsum(taken * (~matched & ~ignored), axis=2, dtype=float)
        values[:, some] = measure(right, wrong, positives[some])
    return values


def _mean_of_classes(values: list[np.ndarray]) -> np.ndarray:
    """Means over the classes that have any, NaN where none has: of [measures, draws] each."""
    whole = np.stack(values)
    known = ~np.isnan(whole)
    with np.errstate(invalid="ignore"):
        return np.where(known, whole, 0).sum(axis=0) / known.sum(axis=0)


def _monotone(right, wrong) -> np.ndarray:
    """The best precision from each detection on: [draws, IoUs, detections]."""
    precision = right / (right + wrong + np.spacing(1))
    return np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]


def _interpolated(right, wrong, positives, recalls) -> np.ndarray:
    """The best precision at each recall or beyond: float64 [draws, IoUs, recalls]."""
    best = _monotone(right, wrong)
    best = np.concatenate([best, np.zeros((*best.shape[:2], 1))], axis=2)
    found = right / positives[:, None, None]
    at = [[np.searchsorted(row, recalls) for row in several] for several in found]
    return np.take_along_axis(best, np.array(at), axis=2)


def _at_recalls(right, wrong, positives) -> np.ndarray:
    """VOC 2007's: the mean over eleven recalls, [1, draws]."""
    return _interpolated(right, wrong, positives, _RECALLS).mean(axis=2).T


def _area(right, wrong, positives) -> np.ndarray:
    """VOC 2010's: each step of the recall times the best precision from there on, [1, draws]."""
    steps = np.diff(right, axis=2, prepend=0.0) / positives[:, None, None]
    return (steps * _monotone(right, wrong)).sum(axis=2).T


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what pycocotools prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _annotation(image: int, label: int, box, unit: Sequence[float]) -> dict:
    """A row as COCO has it; `unit`: pixels of a box of the whole canvas, (height, width)."""
    top, left, bottom, right = (
        float(side) * u for side, u in zip(box, (*unit, *unit), strict=True)
    )
    height, width = max(bottom - top, 0.0), max(right - left, 0.0)
    area = height * width
    sides = [left, top, width, height]
    return {"image_id": image + 1, "category_id": label, "bbox": sides, "area": area, "iscrowd": 0}
