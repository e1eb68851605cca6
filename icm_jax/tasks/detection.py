"""YOLOv3 detection (Redmon and Farhadi 2018): loss over three scales, boxes after suppression.

    image -> Part(0, all layers) -> raw outputs -> loss against targets, or boxes

Per object, weighted 2 - area: binary cross-entropy of its offsets in the cell, half the squared
error of its log size; and cross-entropy of each class on its own. Objectness is asked of all
anchors but those that overlap some object by more than half without being responsible for it. Sums
over anchors, means over images.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from icm_jax.errors import IcmError
from icm_jax.nets import yolo
from icm_jax.tasks import boxes, views
from icm_jax.tasks.task import TRAIN, Aux, Task, apply

IGNORED = 0.5
"""Overlap with an object above which an anchor that is not responsible is not asked."""


def anchors(grids, scale: float) -> list[jax.Array]:
    """Per scale, coarsest first, float32 [3, 2]: (width, height) as fractions of the image.

    Args:
      grids: (h, w) of each scale's outputs. scale: of the published anchors, which are in pixels.
    """
    h, w = grids[0]
    sides = np.float32([w * yolo.STRIDES[0], h * yolo.STRIDES[0]])
    return [jnp.asarray(np.float32(own) * np.float32(scale) / sides) for own in yolo.ANCHORS]


def detection(config) -> Task:
    """The task.

    Fields: classes, width, depth, dtype (of `yolo.layers`); anchor_scale (1: anchors of the
    published sizes, in pixels); least, overlap, limit (of `boxes.suppress`); crop (least and
    largest share of an image that a training view shows); size (sides of the images).

    Predictions are made of "image" or, from the default split on, of "feature".

    Raises: IcmError for a size that is no multiple of 32, and as `yolo.layers`.

    Batches hold "image" uint8 [N, H, W, 3], sides multiples of 32, "boxes" float32 [N, B, 4],
    "box_labels" int32 [N, B], "box_valid" bool [N, B].
    """
    if any(side % yolo.STRIDES[0] for side in views.sides(config.size)):
        raise IcmError(f"YOLOv3 takes images whose sides are multiples of 32, not {config.size}")
    table = yolo.layers(config.classes, config.width, config.depth)
    whole = yolo.Part(table, 0, len(table), jnp.dtype(config.dtype))
    tail = yolo.Part(table, yolo.default_split(table), len(table), jnp.dtype(config.dtype))

    def init(key, batch):
        own = whole.init(key, scaled(batch["image"][:1]), train=False)
        return {name: {"detector": tree} for name, tree in own.items()}

    def loss(variables, batch, key, step):
        del step
        if "boxes" not in batch:
            raise IcmError(
                "detection learns from boxes, and the batches of this data set have none; "
                "data.boxes says how many an image may have"
            )
        images, truth, valid = views.boxed(
            batch["image"], batch["boxes"], batch["box_valid"], crop=tuple(config.crop), key=key
        )
        outputs, stats = apply(whole, variables, "detector", scaled(images), True)
        metrics = losses(outputs, truth, batch["box_labels"], valid, config.anchor_scale)
        return sum(metrics.values()), Aux(metrics, {"batch_stats": {"detector": stats}})

    def predict(variables, batch):
        if "feature" in batch:
            outputs, _ = apply(tail, variables, "detector", batch["feature"], False)
        else:
            outputs, _ = apply(whole, variables, "detector", scaled(batch["image"]), False)
        found = detections(outputs, config.anchor_scale, config.limit, config.overlap, config.least)
        return found._asdict()

    return Task(init, loss, predict, groups=lambda name: TRAIN)


def scaled(image):
    """uint8 or float on 0...255 -> float32 on 0...1."""
    return image.astype(jnp.float32) / 255.0


def losses(outputs, truth, labels, valid, scale: float) -> dict[str, jax.Array]:
    """{"place", "objectness", "class"}: float32 scalars; see the head of this file.

    Args:
      outputs: per scale float32 [N, h, w, 3, 5 + K].
      truth: float32 [N, B, 4]; labels: int32 [N, B]; valid: bool [N, B]. scale: of `anchors`.
    """
    classes = outputs[0].shape[-1] - 5
    grids = [raw.shape[1:3] for raw in outputs]
    shapes = anchors(grids, scale)
    wanted = boxes.targets(truth, labels, valid, shapes, grids, classes)
    place = objectness = kind = jnp.float32(0.0)
    cross = optax.sigmoid_binary_cross_entropy
    for raw, target, own in zip(outputs, wanted, shapes, strict=True):
        n = raw.shape[0]
        there = target.weight > 0
        given = boxes.place(jax.lax.stop_gradient(raw), own).reshape(n, -1, 4)
        overlap = jnp.where(valid[:, None, :], boxes.iou(given, truth), 0.0).max(-1)
        asked = there | (overlap.reshape(there.shape) <= IGNORED)
        offsets = cross(raw[..., :2], target.boxes[..., 1::-1]).sum(-1)
        sizes = 0.5 * jnp.square(raw[..., 2:4] - target.boxes[..., 3:1:-1]).sum(-1)
        place += (target.weight * (offsets + sizes)).sum() / n
        truly = there.astype(jnp.float32)
        objectness += jnp.where(asked, cross(raw[..., 4], truly), 0.0).sum() / n
        kind += (truly * cross(raw[..., 5:], target.classes).sum(-1)).sum() / n
    return {"place": place, "objectness": objectness, "class": kind}


def detections(outputs, scale: float, limit: int, overlap: float, least: float) -> boxes.Detections:
    """Boxes of raw outputs; a class's score is objectness times its own probability."""
    n = outputs[0].shape[0]
    found, scores = [], []
    shapes = anchors([raw.shape[1:3] for raw in outputs], scale)
    for raw, own in zip(outputs, shapes, strict=True):
        found.append(boxes.place(raw, own).reshape(n, -1, 4))
        probability = jax.nn.sigmoid(raw[..., 4:5]) * jax.nn.sigmoid(raw[..., 5:])
        scores.append(probability.reshape(n, -1, raw.shape[-1] - 5))
    placed, scored = jnp.concatenate(found, axis=1), jnp.concatenate(scores, axis=1)
    return boxes.suppress(placed, scored, limit, overlap, least, candidates=5 * limit)
