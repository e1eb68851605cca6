"""Task scores as sums over examples: any batching gives the same result."""

import abc
import contextlib
import os
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from icm_jax.errors import IcmError

IGNORE = 255
_AT_ONCE = 1 << 20
"""Detections times draws times overlaps, of which average precisions are drawn together."""


class Score(abc.ABC):
    """Adds up batches. `update` takes predictions and the batch they belong to, both NumPy; `add`
    takes over what another of its kind has added up."""

    @abc.abstractmethod
    def update(self, predicted: dict, batch: dict) -> None:
        """Adds the rows of a batch that are valid (bool [N])."""

    @abc.abstractmethod
    def add(self, other: Self) -> None:
        """Adds all that was added to the other, which goes on as it is."""

    @abc.abstractmethod
    def result(self) -> dict[str, float]:
        """The scores over everything added."""

    def resampled(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Scores over the images of each draw, float64 [draws], NaN where they show nothing that
        counts; of scores that keep no more than sums none.

        Args: counts: whole numbers [draws, images], see `icm_jax.measure.draws`.
        """
        del counts
        return {}


class Accuracy(Score):
    """top1 and top5 of "logits" [N, K] against "label" [N]; ties count against the model.

    >>> score = Accuracy()
    >>> score.update({"logits": [[2, 1], [3, 3]]}, {"label": [0, 1], "valid": [True, True]})
    >>> score.result()
    {'top1': 0.5, 'top5': 1.0, 'examples': 2}
    """

    def __init__(self):
        self._sums = np.zeros(3, np.int64)  # right at 1, right at 5, examples

    def update(self, predicted, batch):
        logits = np.asarray(predicted["logits"], np.float32)[batch["valid"]]
        labels = np.asarray(batch["label"])[batch["valid"]]
        right = logits[np.arange(len(labels)), labels][:, None]
        rank = (logits >= right).sum(axis=1)  # 1 for the best
        whole = np.isfinite(logits).all(axis=1)  # comparisons with NaN would flatter the rank
        self._sums += [(whole & (rank <= 1)).sum(), (whole & (rank <= 5)).sum(), len(labels)]

    def add(self, other):
        self._sums += other._sums

    def result(self):
        first, fifth, count = self._sums
        return {
            "top1": float(first / max(count, 1)),
            "top5": float(fifth / max(count, 1)),
            "examples": int(count),
        }


class MeanIoU(Score):
    """Mean intersection over union of "segments" [N, H, W] against "mask", 255 ignored.

    Classes that appear neither in predictions nor in masks do not count.

    Raises: IcmError (`update`) for an id outside 0 ... classes - 1.
    """

    def __init__(self, classes: int):
        self._confusion = np.zeros((classes, classes), np.int64)  # [true, predicted]
        self._examples = 0

    def update(self, predicted, batch):
        classes = len(self._confusion)
        segments = np.asarray(predicted["segments"])[batch["valid"]]
        masks = np.asarray(batch["mask"])[batch["valid"]].astype(np.int64)
        known = masks != IGNORE
        for name, ids in (("mask", masks[known]), ("prediction", segments[known])):
            if ids.size and not 0 <= ids.min() <= ids.max() < classes:
                raise IcmError(
                    f"a {name} has class ids {ids.min()} to {ids.max()}; expected 0 to "
                    f"{classes - 1} (or {IGNORE} in masks, which is ignored): check the classes"
                )
        pairs = masks[known] * classes + segments[known]
        self._confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        self._examples += len(masks)

    def add(self, other):
        self._confusion += other._confusion
        self._examples += other._examples

    def result(self):
        confusion, examples = self._confusion, self._examples
        hits = np.diag(confusion)
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
        iou = hits[union > 0] / union[union > 0]
        accuracy = hits.sum() / max(confusion.sum(), 1)
        return {
            "miou": float(iou.mean()) if len(iou) else 0.0,
            "pixel_accuracy": float(accuracy),
            "examples": int(examples),
        }


class AveragePrecision(Score):
    """COCO's mean average precision of boxes, by pycocotools: map50 (at IoU 0.5) and map (mean over
    IoU 0.5 to 0.95), 100 boxes per image, all sizes.

    Predictions: "boxes" [N, D, 4], "scores", "labels", "valid" [N, D]; batches: "boxes" [N, B, 4],
    "box_labels", "box_valid", "box_ignored" [N, B], "image" and its "extent". Ignored boxes are
    COCO's crowds. What is predicted ends with the picture, as in Darknet's own evaluation: truth
    does. Overlaps do not depend on the unit of length.

    Raises: IcmError (`result`, `resampled`) if no image has a box.
    """

    def __init__(self, classes: int):
        self._classes = classes
        self._images = 0
        self._truth: list[tuple] = []  # image, label, box, ignored
        self._found: list[tuple] = []  # image, label, box, score

    def update(self, predicted, batch):
        for row in np.flatnonzero(batch["valid"]):
            self._images += 1
            start, size = batch["extent"][row].reshape(2, 2) / np.array(batch["image"].shape[1:3])
            low, high = np.tile(start, 2), np.tile(start + size, 2)
            for i in np.flatnonzero(batch["box_valid"][row] | batch["box_ignored"][row]):
                ignored = bool(batch["box_ignored"][row, i])
                label, box = batch["box_labels"][row, i], batch["boxes"][row, i]
                self._truth.append((self._images, int(label), box, ignored))
            for i in np.flatnonzero(predicted["valid"][row]):
                label, box = predicted["labels"][row, i], predicted["boxes"][row, i]
                box = np.clip(box, low, high)
                score = float(predicted["scores"][row, i])
                self._found.append((self._images, int(label), box, score))

    def add(self, other):
        self._truth += [(self._images + row[0], *row[1:]) for row in other._truth]
        self._found += [(self._images + row[0], *row[1:]) for row in other._found]
        self._images += other._images

    def result(self):
        scoring = self._compared()
        with _silence():
            scoring.accumulate()
        precision = scoring.eval["precision"]  # [IoU, recall, class, 1, 1], -1 without a box
        mean = lambda p: float(p[p > -1].mean())  # noqa: E731
        return {"map": mean(precision), "map50": mean(precision[0]), "examples": self._images}

    def resampled(self, counts):
        # COCOeval's, with each image's detections as often as the draw takes it.
        scoring, whole = self._compared(), np.zeros((2, len(counts)))
        recalls, classes = scoring.params.recThrs, np.zeros(len(counts))
        for start in range(0, len(scoring.evalImgs), self._images):
            rows = scoring.evalImgs[start : start + self._images]
            there = [(image, row) for image, row in enumerate(rows) if row is not None]
            objects = [(row["gtIgnore"] == 0).sum() for _, row in there]
            positives = counts[:, [image for image, _ in there]] @ np.array(objects, np.int64)
            found = sum(len(row["dtScores"]) for _, row in there)
            every = max(1, _AT_ONCE // max(1, found * len(scoring.params.iouThrs)))
            drawn = np.flatnonzero(positives)
            for first in range(0, len(drawn), every):
                some = drawn[first : first + every]
                precision = _precisions(there, counts[some], positives[some], recalls)
                whole[:, some] += precision.mean(axis=(1, 2)), precision[:, 0].mean(axis=1)
                classes[some] += 1
        with np.errstate(invalid="ignore"):
            return dict(zip(("map", "map50"), whole / classes, strict=True))

    def _compared(self) -> Any:
        """COCOeval that has matched what is found with what is there. Raises: as the class."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not any(not ignored for *_, ignored in self._truth):
            raise IcmError("no box to find in the validation split; average precision needs some")
        truth = [dict(_annotation(*row[:3]), iscrowd=int(row[3])) for row in self._truth]
        found = [dict(_annotation(*row[:3]), score=row[3]) for row in self._found]
        with _silence():
            given, predicted = COCO(), COCO()
            for coco, rows in ((given, truth), (predicted, found)):
                dataset: Any = {
                    "images": [{"id": i + 1} for i in range(self._images)],
                    "categories": [{"id": k} for k in range(self._classes)],
                    "annotations": [dict(row, id=n) for n, row in enumerate(rows, 1)],
                }
                coco.dataset = dataset
                coco.createIndex()
            scoring: Any = COCOeval(given, predicted, "bbox")
            scoring.params.areaRng, scoring.params.areaRngLbl = [[0, 1e10]], ["all"]
            scoring.params.maxDets = [100]
            scoring.evaluate()
        return scoring


def _precisions(rows: list[tuple], counts, positives, recalls) -> np.ndarray:
    """The interpolated precision of a class at each recall: float64 [draws, IoUs, recalls].

    Args: rows: (image, what COCOeval says of it). counts: [draws, images]. positives: [draws].
    """
    scores = np.concatenate([row["dtScores"] for _, row in rows])
    order = np.argsort(-scores, kind="mergesort")
    image = np.concatenate([np.full(len(row["dtScores"]), i) for i, row in rows]).astype(int)
    matched, ignored = (
        np.concatenate([row[key] for _, row in rows], axis=1)[:, order].astype(bool)
        for key in ("dtMatches", "dtIgnore")
    )
    taken = counts[:, image[order]][:, None]  # [draws, 1, detections]
    right = np.cumsum(taken * (matched & ~ignored), axis=2, dtype=float)
    wrong = np.cumsum(taken * (~matched & ~ignored), axis=2, dtype=float)
    precision = right / (right + wrong + np.spacing(1))
    best = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    best = np.concatenate([best, np.zeros((*best.shape[:2], 1))], axis=2)
    found = right / positives[:, None, None]
    at = [[np.searchsorted(row, recalls) for row in several] for several in found]
    return np.take_along_axis(best, np.array(at), axis=2)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what pycocotools prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _annotation(image: int, label: int, box, unit: float = 1000.0) -> dict:
    """A row as COCO has it; `unit` because it takes boxes of less than one pixel for small ones."""
    top, left, bottom, right = (unit * float(side) for side in box)
    height, width = max(bottom - top, 0.0), max(right - left, 0.0)
    area = height * width
    sides = [left, top, width, height]
    return {"image_id": image, "category_id": label, "bbox": sides, "area": area, "iscrowd": 0}
