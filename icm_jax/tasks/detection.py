"""Detection (Redmon and Farhadi 2018): loss over all outputs, boxes after suppression.

    image -> the detector -> raw outputs -> loss against targets, or boxes

Per object, weighted 2 - area: binary cross-entropy of its offsets in the cell, half the squared
error of its log size; and cross-entropy of each class on its own. Objectness is asked of all
anchors but those that overlap some object by more than half without being responsible for it. Sums
over anchors, means over images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.data.fields import FieldError
from icm_jax.errors import IcmError
from icm_jax.nets.detector import Detector, Part
from icm_jax.nets.yolo import build_detector
from icm_jax.tasks import boxes, views
from icm_jax.tasks.task import TRAIN, Aux, Task, apply

PROTOCOLS = ("coco", "voc2007", "voc2010")
"""By which average precision is measured; see `icm_jax.measure.precision`."""
IGNORED = 0.5
"""Overlap with an object above which an anchor that is not responsible is not asked."""


def anchors(detector: Detector, grids: Sequence[tuple[int, int]], scale: float) -> list[jax.Array]:
    """Per output float32 [A, 2]: (width, height) as fractions of the image.

    Args:
      grids: (h, w) of each output. scale: of the detector's anchors, which are in pixels.
    """
    return [
        jnp.asarray(
            np.asarray(pairs, np.float32)
            * np.float32(scale)
            / np.asarray([w * stride, h * stride], np.float32)
        )
        for pairs, (h, w), stride in zip(detector.anchors, grids, detector.strides, strict=True)
    ]


def detection(config: ConfigDict) -> Task:
    """The task.

    Fields: detector (name and arguments, see `icm_jax.nets.yolo.DETECTORS`); classes; dtype;
    anchor_scale (1: anchors of the published sizes, in pixels); least, overlap, limit (of
    `boxes.suppress`); crop (least and largest share of an image that a training view shows); size
    (side of the images, or height and width); protocol (one of `PROTOCOLS`, which scores it).

    Predictions are made of "image" or, from the detector's split on, of "feature".

    Raises: IcmError for a size that is no multiple of the detector's grid, or no such detector.

    Batches hold "image" uint8 [N, H, W, 3], sides multiples of the grid, "boxes" float32
    [N, B, 4], "box_labels" int32 [N, B], "box_valid" bool [N, B].
    """
    detector = build_detector(config.detector, config.classes)
    if any(side % detector.grid for side in views.sides(config.size)):
        told = f"is {config.size}; the detector takes sides that are multiples of {detector.grid}"
        raise FieldError(("task", "size"), config.size, told)
    dtype = jnp.dtype(config.dtype)
    whole, tail = Part(detector, dtype=dtype), Part(detector, detector.split, dtype=dtype)

    def anchors_of(outputs):
        return anchors(detector, [raw.shape[1:3] for raw in outputs], config.anchor_scale)

    def init(key, batch):
        drawn = whole.init(key, scaled(batch["image"][:1]), train=False)
        return {name: {"detector": tree} for name, tree in drawn.items()}

    def loss(variables, batch, key, step):
        del step
        if "boxes" not in batch:
            raise IcmError(
                "detection learns from boxes, and the batches of this data set have none; "
                "data.boxes says how many an image may have"
            )
        images, truth, valid, _ = views.boxed(
            batch["image"], batch["boxes"], batch["box_valid"], crop=tuple(config.crop), key=key
        )
        outputs, stats = apply(whole, variables, "detector", scaled(images), True)
        labels = batch["box_labels"]
        metrics = losses(outputs, truth, labels, valid, anchors_of(outputs), detector.scales)
        return sum(metrics.values()), Aux(metrics, {"batch_stats": {"detector": stats}})

    def predict(variables, batch):
        if "feature" in batch:
            outputs, _ = apply(tail, variables, "detector", batch["feature"], False)
        else:
            outputs, _ = apply(whole, variables, "detector", scaled(batch["image"]), False)
        options = config.limit, config.overlap, config.least
        return detections(outputs, anchors_of(outputs), detector.scales, *options)._asdict()

    return Task(init, loss, predict, groups=lambda name: TRAIN)


def scaled(image: jax.Array) -> jax.Array:
    """uint8 or float on 0...255 -> float32 on 0...1."""
    return image.astype(jnp.float32) / 255.0


def losses(
    outputs: Sequence[jax.Array],
    truth: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    shapes: Sequence[jax.Array],
    scales: Sequence[float],
) -> dict[str, jax.Array]:
    """{"place", "objectness", "class"}: float32 scalars; see the head of this file.

    Args:
      outputs: float32 [N, h, w, A, 5 + K] each.
      truth: float32 [N, B, 4]; labels: int32 [N, B]; valid: bool [N, B].
      shapes: what `anchors` gives. scales: of the detector's outputs.
    """
    classes = outputs[0].shape[-1] - 5
    grids = [raw.shape[1:3] for raw in outputs]
    wanted = boxes.targets(truth, labels, valid, shapes, grids, classes)
    place = objectness = kind = jnp.float32(0.0)
    cross = optax.sigmoid_binary_cross_entropy
    for raw, target, anchor, scale in zip(outputs, wanted, shapes, scales, strict=True):
        n = raw.shape[0]
        there = target.weight > 0
        given = boxes.place(jax.lax.stop_gradient(raw), anchor, scale).reshape(n, -1, 4)
        overlap = jnp.where(valid[:, None, :], boxes.iou(given, truth), 0.0).max(-1)
        asked = there | (overlap.reshape(there.shape) <= IGNORED)
        offsets = (target.boxes[..., 1::-1] + (scale - 1) / 2) / scale
        offsets = cross(raw[..., :2], offsets).sum(-1)
        sizes = 0.5 * jnp.square(raw[..., 2:4] - target.boxes[..., 3:1:-1]).sum(-1)
        place += (target.weight * (offsets + sizes)).sum() / n
        truly = there.astype(jnp.float32)
        objectness += jnp.where(asked, cross(raw[..., 4], truly), 0.0).sum() / n
        kind += (truly * cross(raw[..., 5:], target.classes).sum(-1)).sum() / n
    return {"place": place, "objectness": objectness, "class": kind}


def divergence(outputs: Sequence[jax.Array], given: Sequence[jax.Array]) -> jax.Array:
    """How far what a detector makes of a decoded feature is from what it makes of the feature
    itself: float32 [N], nats of each image. No labels are needed.

    The Kullback-Leibler divergences of objectness, and of each class and of the offsets in the
    cell, half the squared error of the log sizes: these weighted by the objectness that there is.

    Args: outputs, given: of the feature, of the decoded one; float32 [N, h, w, A, 5 + K] each.
    """
    total = jnp.zeros(outputs[0].shape[0], jnp.float32)
    for p, q in zip(outputs, given, strict=True):
        apart, there = _binary_divergence(p, q), jax.nn.sigmoid(p[..., 4])
        place = apart[..., :2].sum(-1) + 0.5 * jnp.square(p[..., 2:4] - q[..., 2:4]).sum(-1)
        total += (apart[..., 4] + there * (place + apart[..., 5:].sum(-1))).sum(axis=(1, 2, 3))
    return total


def _binary_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Between Bernoulli variables of these logits, in nats."""
    cross = optax.sigmoid_binary_cross_entropy
    return cross(q, jax.nn.sigmoid(p)) - cross(p, jax.nn.sigmoid(p))


def detections(
    outputs: Sequence[jax.Array],
    shapes: Sequence[jax.Array],
    scales: Sequence[float],
    limit: int,
    overlap: float,
    least: float,
) -> boxes.Detections:
    """Boxes of raw outputs; a class's score is objectness times its own probability, and none
    beyond the border of a window that is traced `ops.within`. `shapes` is what `anchors` gives,
    `scales` the detector's, the rest is of `boxes.suppress`."""
    n = outputs[0].shape[0]
    found, scores = [], []
    for raw, anchor, scale in zip(outputs, shapes, scales, strict=True):
        found.append(boxes.place(raw, anchor, scale).reshape(n, -1, 4))
        probability = jax.nn.sigmoid(raw[..., 4:5]) * jax.nn.sigmoid(raw[..., 5:])
        there = ops.inside(jnp.ones((*raw.shape[:3], 1), raw.dtype))[..., None] > 0
        probability = jnp.where(there, probability, -1.0)
        scores.append(probability.reshape(n, -1, raw.shape[-1] - 5))
    placed, scored = jnp.concatenate(found, axis=1), jnp.concatenate(scores, axis=1)
    return boxes.suppress(placed, scored, limit, overlap, least, candidates=5 * limit)
