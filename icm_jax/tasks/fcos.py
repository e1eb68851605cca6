"""FCOS as mathematics (Tian et al. 2019, 2020): which place is to find which object, and losses.

Each place of each level's grid stands for its centre in the image. It is to find the object in the
middle of which it lies, if the farthest side of that object is as far as the level is for; of
several the smallest. What it then says is its class, and how far the sides are.

Lengths are pixels of the image; boxes are (ymin, xmin, ymax, xmax), and distances are in that order
too: to the top, left, bottom and right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from icm_jax.nets.pyramid import STRIDES, Found
from icm_jax.tasks import boxes as box_maths
from icm_jax.tasks.boxes import area

FARTHEST = (64.0, 128.0, 256.0, 512.0)
"""Pixels to the farthest side up to which P3, P4, P5 and P6 find an object (Tian et al. 2019)."""
RADIUS = 1.5
"""Steps of the grid from an object's middle in which places are to find it (Tian et al. 2020)."""
ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (Lin et al. 2017b)."""


class Places(NamedTuple):
    """All places of all levels, P of them, as constants.

    centres: float32 [P, 2], (y, x). strides: float32 [P]. bounds: float32 [P, 2], least and largest
    distance to the farthest side.
    """

    centres: np.ndarray
    strides: np.ndarray
    bounds: np.ndarray


class Targets(NamedTuple):
    """What the places of N images are to find.

    there: bool [N, P], whether there is an object. asked: bool [N, P], whether what is said of the
    classes counts: where no object is found, only outside those that are ignored. labels: int32
    [N, P]. boxes: float32 [N, P, 4]. distances: float32 [N, P, 4]; where there is no object,
    meaningless. centre: float32 [N, P], see `centreness`; 0 where there is none.
    """

    there: jax.Array
    asked: jax.Array
    labels: jax.Array
    boxes: jax.Array
    distances: jax.Array
    centre: jax.Array


def places(grids: Sequence[tuple[int, ...]], scale: float = 1.0) -> Places:
    """The places of grids (h, w) of P3 to P7, row by row.

    Args: scale: of `FARTHEST`, whose values are for images of 800 pixels.
    """
    bounds = (0.0, *(scale * far for far in FARTHEST), np.inf)
    found: list[tuple] = []
    for number, ((h, w), stride) in enumerate(zip(grids, STRIDES, strict=True)):
        rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        centres = (np.stack([rows, columns], axis=-1).reshape(-1, 2) + 0.5) * stride
        limits = np.tile(bounds[number : number + 2], (h * w, 1))
        found.append((centres, np.full(h * w, stride), limits))
    return Places(*(np.concatenate(part).astype(np.float32) for part in zip(*found, strict=True)))


def together(found: Sequence[Found]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of classes [N, P, K], distances in pixels [N, P, 4] and logits of centre-ness [N, P]
    of all levels, in the order of `places`; float32."""
    n = found[0].centre.shape[0]
    scaled = [
        level.distances * stride for level, stride in zip(found, STRIDES[: len(found)], strict=True)
    ]
    flat = [
        [level.reshape(n, -1, *level.shape[3:]) for level in several]
        for several in ([f.classes for f in found], scaled, [f.centre for f in found])
    ]
    classes, distances, centre = (jnp.concatenate(several, axis=1) for several in flat)
    return classes, distances, centre


def boxes_at(centres: jax.Array | np.ndarray, distances: jax.Array) -> jax.Array:
    """Boxes whose sides are so far from the centres: [P, 2], float32 [..., P, 4] -> [..., P, 4]."""
    shape = (1,) * (distances.ndim - 2) + (-1, 2)
    at = jnp.asarray(centres, distances.dtype).reshape(shape)
    return jnp.concatenate([at - distances[..., :2], at + distances[..., 2:]], axis=-1)


def distances_to(centres: jax.Array | np.ndarray, boxes: jax.Array) -> jax.Array:
    """The inverse of `boxes_at` for every pair: [P, 2], float32 [B, 4] -> [P, B, 4]."""
    at = jnp.asarray(centres, boxes.dtype)[:, None]
    return jnp.concatenate([at - boxes[None, :, :2], boxes[None, :, 2:] - at], axis=-1)


def centreness(distances: jax.Array) -> jax.Array:
    """sqrt(min(l, r) / max(l, r) · min(t, b) / max(t, b)), equation 3: [..., 4] -> [...]; 1 in the
    middle of a box, 0 on its sides and beyond them.

    >>> centreness(jnp.array([[5.0, 5.0, 5.0, 5.0], [1.0, 2.0, 4.0, 2.0]])).tolist()
    [1.0, 0.5]
    """
    one, other = distances[..., :2], distances[..., 2:]
    inside = distances.min(axis=-1) > 0
    share = jnp.minimum(one, other) / jnp.where(inside[..., None], jnp.maximum(one, other), 1.0)
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, share.prod(axis=-1), 1.0)), 0.0)


def owners(boxes: jax.Array, valid: jax.Array, at: Places, radius: float = RADIUS) -> jax.Array:
    """Which object each place is to find: int32 [P], -1 for none.

    A place finds an object if it lies in it, no more than `radius` steps of its grid from the
    middle by either axis, and the farthest side is within the bounds of its level; of several, the
    one of the least area, and of equal ones the first (Tian et al. 2019, section 3.1; centre
    sampling: Tian et al. 2020).

    Args: boxes: float32 [B, 4]; valid: bool [B], which of them count.
    """
    distances = distances_to(at.centres, boxes)  # [P, B, 4]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    off = jnp.abs(jnp.asarray(at.centres)[:, None] - middle[None]).max(axis=-1)
    farthest = distances.max(axis=-1)
    finds = valid[None] & (distances.min(axis=-1) > 0) & (off < radius * at.strides[:, None])
    finds &= (farthest >= at.bounds[:, :1]) & (farthest <= at.bounds[:, 1:])
    areas = jnp.where(finds, area(boxes)[None], jnp.inf)
    return jnp.where(finds.any(axis=1), jnp.argmin(areas, axis=1), -1).astype(jnp.int32)


def targets(
    boxes: jax.Array, labels: jax.Array, valid: jax.Array, ignored: jax.Array, at: Places
) -> Targets:
    """What each place of each image is to say.

    Args:
      boxes: float32 [N, B, 4]; labels: int32 [N, B]; valid: bool [N, B], the objects; ignored: bool
        [N, B], those that are neither objects nor background.
    """

    def one(boxes, labels, valid, ignored):
        owner = owners(boxes, valid, at)
        there, row = owner >= 0, jnp.maximum(owner, 0)
        own = boxes[row]
        centres = jnp.asarray(at.centres)
        sides = jnp.concatenate([centres - own[:, :2], own[:, 2:] - centres], axis=-1)
        passed = ((distances_to(at.centres, boxes).min(axis=-1) > 0) & ignored[None]).any(axis=1)
        centre = jnp.where(there, centreness(sides), 0.0)
        return Targets(there, there | ~passed, labels[row], own, sides, centre)

    return jax.vmap(one)(boxes, labels, valid, ignored)


def focal_loss(logits: jax.Array, truth: jax.Array) -> jax.Array:
    """-α_t (1 - p_t)^γ log p_t of binary variables (Lin et al. 2017b, equation 5): float32 [...],
    truth 0 or 1 [...] -> [...], nats.

    >>> round(float(focal_loss(jnp.array(0.0), jnp.array(1.0))), 4)  # 0.25 · 0.25 · log 2
    0.0433
    """
    cross = optax.sigmoid_binary_cross_entropy(logits, truth)
    missed = jax.nn.sigmoid(jnp.where(truth > 0, -logits, logits))  # 1 - p_t
    return jnp.where(truth > 0, ALPHA, 1 - ALPHA) * missed**GAMMA * cross


def giou(one: jax.Array, other: jax.Array) -> jax.Array:
    """Generalised intersection over union (Rezatofighi et al. 2019, algorithm 1) of pairs of boxes:
    float [..., 4] twice -> [...], from -1 to 1.

    >>> apart = jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([0.0, 3.0, 1.0, 4.0])
    >>> float(giou(*apart))  # nothing in common, and of the hull of 4 half is empty
    -0.5
    """
    low, high = jnp.maximum(one[..., :2], other[..., :2]), jnp.minimum(one[..., 2:], other[..., 2:])
    both = area(jnp.concatenate([low, high], axis=-1))
    union = area(one) + area(other) - both
    low, high = jnp.minimum(one[..., :2], other[..., :2]), jnp.maximum(one[..., 2:], other[..., 2:])
    hull = area(jnp.concatenate([low, high], axis=-1))
    return _share(both, union) + _share(union, hull) - 1.0


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)


def losses(
    classes: jax.Array, distances: jax.Array, centre: jax.Array, wanted: Targets, at: Places
) -> dict[str, jax.Array]:
    """{"class", "place", "centre"}: float32 scalars, whose sum is the loss (equation 2).

    The focal loss of all places that are asked, over the number of those that have an object;
    1 - GIoU, averaged with the centre-ness that it should have as weight; and the cross-entropy of
    centre-ness, over that number.

    Args: classes, distances, centre: what `together` gives.
    """
    there = wanted.there.astype(jnp.float32)
    count = jnp.maximum(there.sum(), 1.0)
    truth = jax.nn.one_hot(wanted.labels, classes.shape[-1]) * there[..., None]
    kind = jnp.where(wanted.asked[..., None], focal_loss(classes, truth), 0.0)
    far = 1.0 - giou(boxes_at(at.centres, distances), wanted.boxes)
    place = (far * wanted.centre).sum() / jnp.maximum(wanted.centre.sum(), 1e-6)
    middle = optax.sigmoid_binary_cross_entropy(centre, wanted.centre) * there
    return {"class": kind.sum() / count, "place": place, "centre": middle.sum() / count}


def detections(
    found: Sequence[Found],
    at: Places,
    size: tuple[int, int],
    limit: int,
    overlap: float,
    least: float,
) -> box_maths.Detections:
    """Boxes of what the head says, as fractions of the image's sides; a score is the square root of
    a class's probability times centre-ness, as the published code has it since 2020.

    Args: size: height and width in pixels. limit, overlap, least: of `boxes.suppress`.
    """
    classes, distances, centre = together(found)
    sides = jnp.array([*size, *size], jnp.float32).reshape(1, 1, 4)
    placed = jnp.clip(boxes_at(at.centres, distances) / sides, 0.0, 1.0)
    scores = jnp.sqrt(jax.nn.sigmoid(classes) * jax.nn.sigmoid(centre)[..., None])
    return box_maths.suppress(placed, scores, limit, overlap, least, candidates=5 * limit)
