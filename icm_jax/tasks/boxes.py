"""Boxes as arrays: overlap, YOLOv3's outputs and targets, non-maximum suppression; all under jit.

A box is (ymin, xmin, ymax, xmax) as fractions of the image's sides, as in TFDS. A set of boxes has
a fixed number of rows; a mask says which of them count.
"""

from collections.abc import Sequence
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
    """What an output [N, h, w, A, 5 + K] should be; see `targets`.

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
    """Intersection over union: float [..., A, 4], [..., B, 4] -> [..., A, B]; 0 of nothing.

    >>> one, other = jnp.array([[0.0, 0.0, 1.0, 0.5]]), jnp.array([[0.0, 0.0, 0.5, 1.0]])
    >>> round(float(iou(one, other)[0, 0]), 4)
    0.3333
    """
    one, other = one[..., :, None, :], other[..., None, :, :]
    low, high = jnp.maximum(one[..., :2], other[..., :2]), jnp.minimum(one[..., 2:], other[..., 2:])
    both = area(jnp.concatenate([low, high], axis=-1))
    union = area(one) + area(other) - both
    return jnp.where(union > 0, both / jnp.where(union > 0, union, 1.0), 0.0)


def place(raw: jax.Array, anchors: jax.Array, scale: float = 1.0) -> jax.Array:
    """Boxes that raw outputs mean (Redmon and Farhadi 2018, figure 2).

    Args:
      raw: float32 [N, h, w, A, 5 + K]: tx, ty, tw, th, objectness, classes.
      anchors: float32 [A, 2], (width, height) as fractions of the image.
      scale: centres lie in the cell widened by this factor (Bochkovskiy et al. 2020, section 3.4;
        Darknet's scale_x_y).
    Returns: float32 [N, h, w, A, 4].
    """
    h, w = raw.shape[1:3]
    rows = jnp.arange(h, dtype=raw.dtype).reshape(1, h, 1, 1)
    columns = jnp.arange(w, dtype=raw.dtype).reshape(1, 1, w, 1)
    offset = jax.nn.sigmoid(raw[..., :2]) * scale - (scale - 1) / 2
    y, x = (offset[..., 1] + rows) / h, (offset[..., 0] + columns) / w
    # exp is bounded: an untrained or damaged network gives no infinite box.
    size = jnp.exp(jnp.minimum(raw[..., 2:4], 10.0)) * anchors.reshape(1, 1, 1, -1, 2)
    half_w, half_h = size[..., 0] / 2, size[..., 1] / 2
    return jnp.stack([y - half_h, x - half_w, y + half_h, x + half_w], axis=-1)


def targets(
    boxes: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    anchors: Sequence[jax.Array],
    grids: Sequence[tuple[int, ...]],
    classes: int,
) -> list[Targets]:
    """Each object belongs to the anchor, of all outputs, whose shape overlaps its own best.

    Args:
      boxes: float32 [N, B, 4]; labels: int32 [N, B]; valid: bool [N, B].
      anchors: per output float32 [A, 2], (width, height) as fractions of the image.
      grids: per output (h, w). classes: K.

    Two objects in one cell and anchor: the later one stands.
    """
    size = boxes[..., 2:] - boxes[..., :2]  # h, w
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2
    best = _likest(size, jnp.concatenate([pairs[:, ::-1] for pairs in anchors]))
    seen = valid & (size > 0).all(-1)
    found, first = [], 0
    for pairs, grid in zip(anchors, grids, strict=True):
        number = best - first
        here = seen & (number >= 0) & (number < len(pairs))
        number = jnp.clip(number, 0, len(pairs) - 1)
        ratio = size / pairs[number][..., ::-1]
        found.append(
            _placed(centre, size, ratio, labels, here, number, (*grid, len(pairs), classes))
        )
        first += len(pairs)
    return found


def _likest(size, shapes):
    """Which of `shapes` [A, 2] overlaps each `size` [N, B, 2] best, both (h, w): int32 [N, B]."""
    sizes, shapes = (jnp.concatenate([jnp.zeros_like(x), x], axis=-1) for x in (size, shapes))
    shapes = jnp.broadcast_to(shapes[None], (size.shape[0], *shapes.shape))
    return jnp.argmax(iou(sizes, shapes), axis=-1)


def _placed(centre, size, ratio, labels, here, number, shape) -> Targets:
    """Objects [N, B] that are `here`, each in its cell and anchor `number` of h, w, A and K.

    `centre` and `size` are fractions of the image, `ratio` is the size over the anchor's.
    """
    n, (h, w, count, classes) = labels.shape[0], shape
    scaled = centre * jnp.array([h, w], centre.dtype).reshape(1, 1, 2)
    cell = jnp.clip(scaled.astype(jnp.int32), 0, jnp.array([h - 1, w - 1]).reshape(1, 1, 2))
    # Rows that do not count go out of range, where `drop` leaves them.
    image = jnp.where(here, jnp.broadcast_to(jnp.arange(n)[:, None], labels.shape), n)
    at = image, cell[..., 0], cell[..., 1], number
    offsets = scaled - cell.astype(scaled.dtype)
    values = jnp.concatenate([offsets, jnp.log(jnp.maximum(ratio, 1e-9))], axis=-1)
    weight = 2.0 - jnp.clip(size[..., 0] * size[..., 1], 0.0, 1.0)

    def filled(values, *last):
        return jnp.zeros((n, h, w, count, *last)).at[at].set(values, mode="drop")

    return Targets(
        filled(values, 4), filled(weight), filled(jax.nn.one_hot(labels, classes), classes)
    )


def suppress(
    boxes: jax.Array,
    scores: jax.Array,
    limit: int,
    overlap: float,
    least: float,
    candidates: int,
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
