"""Boxes as arrays: overlap, YOLOv3's outputs and targets, non-maximum suppression; all under jit.

A box is (ymin, xmin, ymax, xmax) as fractions of the image's sides, as in TFDS. A set of boxes has
a fixed number of rows; a mask says which of them count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Detections(NamedTuple):
    """Per image D rows, best first. boxes float32 [N, D, 4]; scores float32 [N, D]; labels int32
    [N, D]; valid bool [N, D]."""

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array


class Targets(NamedTuple):
    """What one scale's outputs [N, h, w, A, 5 + K] should be; see `targets`.

    boxes: float32 [N, h, w, A, 4], offsets in the cell (y, x in 0...1) and log ratios to the anchor
    (h, w). weight: float32 [N, h, w, A], 2 - area where an object belongs, else 0. classes: float32
    [N, h, w, A, K].
    """

    boxes: jax.Array
    weight: jax.Array
    classes: jax.Array


def area(boxes: jax.Array) -> jax.Array:
    """float [..., 4] -> float [...]; 0 if a side is negative."""
    return jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0), axis=-1)


def iou(one: jax.Array, other: jax.Array) -> jax.Array:
    """Intersection over union: float [..., A, 4], [..., B, 4] -> [..., A, B]; 0 of nothing."""
    one, other = one[..., :, None, :], other[..., None, :, :]
    low, high = jnp.maximum(one[..., :2], other[..., :2]), jnp.minimum(one[..., 2:], other[..., 2:])
    both = area(jnp.concatenate([low, high], axis=-1))
    union = area(one) + area(other) - both
    return jnp.where(union > 0, both / jnp.where(union > 0, union, 1.0), 0.0)


def place(raw: jax.Array, anchors: jax.Array) -> jax.Array:
    """Boxes that raw outputs mean (Redmon and Farhadi 2018, figure 2).

    Args:
      raw: float32 [N, h, w, A, 5 + K]: tx, ty, tw, th, objectness, classes.
      anchors: float32 [A, 2], (width, height) as fractions of the image.
    Returns: float32 [N, h, w, A, 4].
    """
    h, w = raw.shape[1:3]
    rows = jnp.arange(h, dtype=raw.dtype).reshape(1, h, 1, 1)
    columns = jnp.arange(w, dtype=raw.dtype).reshape(1, 1, w, 1)
    y = (jax.nn.sigmoid(raw[..., 1]) + rows) / h
    x = (jax.nn.sigmoid(raw[..., 0]) + columns) / w
    # exp is bounded: an untrained or damaged network gives no infinite box.
    size = jnp.exp(jnp.minimum(raw[..., 2:4], 10.0)) * anchors.reshape(1, 1, 1, -1, 2)
    half_w, half_h = size[..., 0] / 2, size[..., 1] / 2
    return jnp.stack([y - half_h, x - half_w, y + half_h, x + half_w], axis=-1)


def targets(boxes, labels, valid, anchors, grids, classes: int) -> list[Targets]:
    """Each object belongs to the anchor, of all scales, whose shape overlaps its own best.

    Args:
      boxes: float32 [N, B, 4]; labels: int32 [N, B]; valid: bool [N, B].
      anchors: per scale float32 [A, 2], fractions of the image.
      grids: per scale (h, w). classes: K.

    Two objects in one cell and anchor: the later one stands.
    """
    n, count = labels.shape
    size = boxes[..., 2:] - boxes[..., :2]  # h, w
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2
    shapes = jnp.concatenate([a[:, ::-1] for a in anchors])  # h, w
    origin = jnp.zeros_like(shapes)
    overlap = iou(
        jnp.concatenate([jnp.zeros_like(size), size], axis=-1),
        jnp.broadcast_to(jnp.concatenate([origin, shapes], axis=-1)[None], (n, shapes.shape[0], 4)),
    )
    best = jnp.argmax(overlap, axis=-1)  # [N, B]
    image = jnp.broadcast_to(jnp.arange(n)[:, None], (n, count))
    found, first = [], 0
    for own, (h, w) in zip(anchors, grids, strict=True):
        number = best - first
        here = valid & (number >= 0) & (number < len(own)) & (size > 0).all(-1)
        scaled = centre * jnp.array([h, w], centre.dtype).reshape(1, 1, 2)
        cell = jnp.clip(scaled.astype(jnp.int32), 0, jnp.array([h - 1, w - 1]).reshape(1, 1, 2))
        # Rows that do not count go out of range, where `drop` leaves them.
        at = (
            jnp.where(here, image, n),
            cell[..., 0],
            cell[..., 1],
            jnp.clip(number, 0, len(own) - 1),
        )
        ratio = size / own[jnp.clip(number, 0, len(own) - 1)][..., ::-1]
        values = jnp.concatenate(
            [scaled - cell.astype(scaled.dtype), jnp.log(jnp.maximum(ratio, 1e-9))], axis=-1
        )
        grid = (n, h, w, len(own))
        weight = 2.0 - jnp.clip(size[..., 0] * size[..., 1], 0.0, 1.0)
        found.append(
            Targets(
                jnp.zeros((*grid, 4)).at[at].set(values, mode="drop"),
                jnp.zeros(grid).at[at].set(weight, mode="drop"),
                jnp.zeros((*grid, classes))
                .at[at]
                .set(jax.nn.one_hot(labels, classes), mode="drop"),
            )
        )
        first += len(own)
    return found


def suppress(
    boxes, scores, limit: int, overlap: float, least: float, candidates: int
) -> Detections:
    """Greedy non-maximum suppression per class, for a batch.

    Args:
      boxes: float32 [N, M, 4]. scores: float32 [N, M, K], of each class.
      limit: D, detections per image at most. overlap: IoU above which the lesser box of a class
        goes. least: scores below it are none. candidates: best (box, class) pairs that are looked
        at; above that many, the lowest are lost.
    """
    n, m, classes = scores.shape
    top, index = jax.lax.top_k(scores.reshape(n, m * classes), min(candidates, m * classes))
    labels, rows = index % classes, index // classes
    chosen = jnp.take_along_axis(boxes, rows[..., None], axis=1)
    rivals = (iou(chosen, chosen) > overlap) & (labels[:, :, None] == labels[:, None, :])
    places = jnp.arange(top.shape[1])

    def visit(i, keep):
        loses = (rivals[:, i] & keep & (places < i)[None]).any(axis=-1)
        return keep.at[:, i].set(keep[:, i] & ~loses)

    keep = jax.lax.fori_loop(0, top.shape[1], visit, top >= least)
    kept, order = jax.lax.top_k(jnp.where(keep, top, -1.0), min(limit, top.shape[1]))
    take = lambda values: jnp.take_along_axis(values, order, axis=1)  # noqa: E731
    return Detections(
        jnp.take_along_axis(chosen, order[..., None], axis=1),
        jnp.maximum(kept, 0.0),
        take(labels).astype(jnp.int32),
        take(keep),
    )
