"""Heads for objects: FCOS, RoIAlign and masks against plain loops and cases worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from icm_jax.errors import IcmError
from icm_jax.nets import pyramid
from icm_jax.nets.pyramid import STRIDES
from icm_jax.tasks import build_task, fcos, regions

RNG = np.random.default_rng(5)
GRIDS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of 64 × 96 pixels
SCALE = 1 / 8  # levels for 8, 16, 32 and 64 pixels


def random_boxes(count):
    """float32 [count, 4] in quarters of a pixel, which float32 computes with exactly."""
    corners = np.sort(RNG.integers(0, 4 * np.array([64, 96]), (count, 2, 2)), axis=1) / 4
    return corners.reshape(count, 4).astype(np.float32)


def owners_one_by_one(boxes, valid):
    """The paper's rule, place by place and object by object."""
    bounds, found = [0, *(SCALE * far for far in fcos.FARTHEST), np.inf], []
    for level, (h, w) in enumerate(GRIDS):
        stride = STRIDES[level]
        for row in range(h):
            for column in range(w):
                y, x = (row + 0.5) * stride, (column + 0.5) * stride
                best, least = -1, np.inf
                for number, (top, left, bottom, right) in enumerate(boxes.astype(float)):
                    sides = [y - top, x - left, bottom - y, right - x]
                    middle = (top + bottom) / 2, (left + right) / 2
                    near = max(abs(y - middle[0]), abs(x - middle[1])) < 1.5 * stride
                    meant = bounds[level] <= max(sides) <= bounds[level + 1]
                    area = (bottom - top) * (right - left)
                    if valid[number] and min(sides) > 0 and near and meant and area < least:
                        best, least = number, area
                found.append(best)
    return np.array(found)


def test_places_find_what_the_plain_loop_says():
    at, found = fcos.places(GRIDS, SCALE), set()
    for _ in range(12):
        boxes, valid = random_boxes(9), RNG.random(9) < 0.8
        boxes[0] = [2, 0, 118, 139]  # the coarsest level's, whose place is at (64, 64)
        given = np.asarray(fcos.owners(jnp.asarray(boxes), jnp.asarray(valid), at))
        np.testing.assert_array_equal(given, owners_one_by_one(boxes, valid))
        found |= {level for level in range(5) if (given[at.strides == STRIDES[level]] >= 0).any()}
    assert found == {0, 1, 2, 3, 4}


def test_targets_give_their_boxes_back():
    boxes, at = random_boxes(6), fcos.places(GRIDS, SCALE)
    labels, valid = jnp.arange(6, dtype=jnp.int32)[None], jnp.ones((1, 6), bool)
    wanted = fcos.targets(jnp.asarray(boxes)[None], labels, valid, ~valid, at)
    there = np.asarray(wanted.there[0])
    assert 0 < there.sum() < len(there) and wanted.asked.all()
    placed = np.asarray(fcos.boxes_at(at.centres, wanted.distances))[0, there]
    np.testing.assert_array_equal(placed, boxes[np.asarray(wanted.labels)[0, there]])
    top, left, bottom, right = np.asarray(wanted.distances)[0, there].T
    expected = np.minimum(top, bottom) / np.maximum(top, bottom)
    expected = np.sqrt(expected * np.minimum(left, right) / np.maximum(left, right))
    np.testing.assert_allclose(np.asarray(wanted.centre)[0, there], expected, rtol=1e-6)
    assert not np.asarray(wanted.centre)[0, ~there].any()


def test_nothing_is_asked_where_objects_are_ignored():
    """A crowd on the left half: there is no background, but an object in it is found."""
    boxes = jnp.array([[[0, 0, 64, 48], [22, 14, 34, 26]]], jnp.float32)
    labels, valid = jnp.zeros((1, 2), jnp.int32), jnp.array([[False, True]])
    at = fcos.places(GRIDS, SCALE)
    wanted = fcos.targets(boxes, labels, valid, ~valid, at)
    left = at.centres[:, 1] < 48
    np.testing.assert_array_equal(wanted.asked[0], ~left | np.asarray(wanted.there[0]))
    assert wanted.there.any() and left[np.asarray(wanted.there[0])].all()


def test_focal_loss_is_its_formula():
    logits = RNG.normal(0, 3, 40)
    p, truth = 1 / (1 + np.exp(-logits)), RNG.integers(0, 2, 40)
    expected = np.where(truth, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    given = fcos.focal_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(truth, jnp.float32))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-7)
    slopes = jax.grad(lambda x: fcos.focal_loss(x, jnp.ones(2)).sum())(jnp.array([-90.0, 90.0]))
    np.testing.assert_allclose(slopes, [-0.25, 0.0], atol=1e-6)


def test_giou_by_hand():
    one = jnp.array([[0, 0, 2, 2]] * 4, jnp.float32)
    other = jnp.array([[0, 0, 2, 2], [1, 1, 3, 3], [0, 4, 2, 6], [5, 5, 5, 5]], jnp.float32)
    # Equal; 1 of 7 in common and 7 of 9 filled; nothing, 8 of 12 filled; a point far away.
    expected = [1, 1 / 7 + 7 / 9 - 1, 8 / 12 - 1, 4 / 25 - 1]
    np.testing.assert_allclose(fcos.giou(one, other), expected, rtol=1e-6)
    point = jnp.zeros((1, 4))
    assert np.isfinite(jax.grad(lambda x: fcos.giou(x, point).sum())(point)).all()


def interpolated(values, y, x):
    """One point, as the published kernel takes it: clamped, nothing from one element beyond on."""
    h, w = values.shape[:2]
    if not (-1 <= y <= h and -1 <= x <= w):
        return np.zeros(values.shape[2])
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    down, across = min(top + 1, h - 1), min(left + 1, w - 1)
    y, x = y - top, x - left
    upper = (1 - x) * values[top, left] + x * values[top, across]
    return (1 - y) * upper + y * ((1 - x) * values[down, left] + x * values[down, across])


def aligned(values, box, stride, side):
    top, left, bottom, right = (float(v) / stride - 0.5 for v in box)
    high, wide = (bottom - top) / side, (right - left) / side
    found = np.zeros((side, side, values.shape[2]))
    for p in range(side):
        for q in range(side):
            points = [(i + 0.5) / 2 for i in range(2)]
            at = [(top + (p + a) * high, left + (q + b) * wide) for a in points for b in points]
            found[p, q] = np.mean([interpolated(values, *point) for point in at], axis=0)
    return found


def test_roi_align_equals_the_loop():
    levels = [RNG.normal(size=(*grid, 3)).astype(np.float32) for grid in GRIDS[:3]]
    boxes = np.concatenate([random_boxes(6), [[-9, -30, 20, 10], [50, 80, 90, 130]]])
    level = RNG.integers(0, 3, len(boxes))
    given = regions.roi_align(levels, jnp.asarray(boxes, jnp.float32), jnp.asarray(level), 5)
    for row, (box, number) in enumerate(zip(boxes, level, strict=True)):
        expected = aligned(levels[number].astype(float), box, STRIDES[number], 5)
        np.testing.assert_allclose(given[row], expected, rtol=1e-4, atol=1e-5)


def test_roi_align_by_hand():
    """On columns that count from 0, each bin is its middle's place less the half of an element."""
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32)[None, :, None], (8, 12, 1))
    found = regions.roi_align([ramp], jnp.array([[8.0, 16, 40, 48]]), jnp.array([0]), 2)
    np.testing.assert_allclose(found[0, ..., 0], [[2.5, 4.5], [2.5, 4.5]], rtol=1e-6)


def test_boxes_are_seen_at_the_level_of_their_size():
    sides = np.array([8, 111, 113, 223, 225, 900])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1).astype(np.float32)
    assert regions.level_of(jnp.asarray(boxes)).tolist() == [0, 0, 0, 0, 1, 2]
    assert regions.level_of(jnp.asarray(boxes), 0.5).tolist() == [0, 0, 1, 1, 2, 2]


def test_masks_of_boxes_by_hand():
    """At every second pixel; the box sees twice as much, once to the right and once nothing."""
    masks = np.zeros((2, 4, 6), bool)
    masks[0, 1:3, 1:3] = True  # rows 2 to 6, columns 2 to 6
    boxes = jnp.array([[0, 0, 8, 8], [2, 4, 6, 8], [0, 0, 8, 8]], jnp.float32)
    given = regions.mask_targets(jnp.asarray(masks), 2.0, boxes, jnp.array([0, 0, 1]), 4)
    inner = np.zeros((4, 4))
    inner[1:3, 1:3] = 1
    np.testing.assert_array_equal(given[0], inner)
    np.testing.assert_array_equal(given[1], [[1, 1, 0, 0]] * 4)
    assert not given[2].any()


def test_masks_are_learned_on_boxes_that_overlap_an_outlined_object():
    truth = jnp.array([[0, 0, 8, 8], [20, 20, 40, 40], [50, 50, 60, 60]], jnp.float32)
    proposals = [[0, 0, 8, 6], [0, 0, 8, 3], [22, 20, 40, 40], [50, 50, 60, 60]]
    proposals = jnp.array(proposals, jnp.float32)
    outlined, proposed = jnp.array([True, True, False]), jnp.array([True, True, True, True])
    given = regions.examples(proposals, proposed, truth, outlined, 6, jax.random.key(0))
    boxes, rows, counts = (np.asarray(v) for v in given)
    kept = {(tuple(boxes[i]), int(rows[i])) for i in np.flatnonzero(counts)}
    own = {(tuple(np.asarray(truth[i])), i) for i in (0, 1)}
    assert kept == own | {((0, 0, 8, 6), 0), ((22, 20, 40, 40), 1)}
    few = regions.examples(proposals, proposed, truth, outlined, 2, jax.random.key(1))
    assert few[2].tolist() == [True, True]


def test_pyramid_has_the_published_grids_and_size():
    """At 96 × 160 pixels; the parameters of RetinaNet's pyramid on a ResNet-50, and of FCOS's head
    with 80 classes, are those counted from the papers."""
    layers = [
        jax.ShapeDtypeStruct((2, 96 // s, 160 // s, 64 * s), jnp.float32) for s in (8, 16, 32)
    ]
    net = pyramid.Pyramid()
    variables = jax.eval_shape(net.init, jax.random.key(0), layers)
    levels = jax.eval_shape(net.apply, variables, layers)
    grids = [level.shape[1:3] for level in levels]
    assert grids == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    lateral = 256 * (512 + 1024 + 2048) + 3 * 256
    assert size(variables) == lateral + 5 * (9 * 256 * 256 + 256)
    head = pyramid.BoxHead(80)
    variables = jax.eval_shape(head.init, jax.random.key(0), levels)
    towers = 8 * (9 * 256 * 256 + 3 * 256)
    assert size(variables) == towers + (9 * 256 + 1) * 85 + 5
    found = jax.eval_shape(head.apply, variables, levels)
    at = fcos.places(grids)
    assert [f.classes.shape for f in found] == [(2, *grid, 80) for grid in grids]
    assert jax.eval_shape(fcos.together, found)[0].shape == (2, len(at.strides), 80)


MODEL = dict(variant="10", width=4, size=(64, 96), crop=(1.0, 1.0), dtype="float32", classes=2)
HEADS = dict(channels=8, convolutions=1, range_scale=SCALE, masks=True, mask_boxes=4)
HEADS |= dict(name="object_detection", least=0.05, overlap=0.6, limit=6, frontend="pixels")
FEATURE = dict(name="omni_feature", variant="10", width=4, channels=4, widths=(4, 4))
FEATURE |= dict(filter_channels=4, filter_widths=(4, 4, 4), hyper_channels=4)


def two_images():
    """A dark rectangle, and a bright triangle, each on noise."""
    image = RNG.integers(90, 130, (2, 64, 96, 3)).astype(np.uint8)
    masks = np.zeros((2, 3, 16, 24), bool)
    masks[0, 0, 4:12, 2:12] = True
    masks[1, 0, 2:14, 8:20] = np.tri(12, dtype=bool)
    for picture, mask, level in zip(image, masks[:, 0], (10, 250), strict=True):
        picture[np.kron(mask, np.ones((4, 4), bool))] = level
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[:, 0] = [[16 / 64, 8 / 96, 48 / 64, 48 / 96], [8 / 64, 32 / 96, 56 / 64, 80 / 96]]
    flags = np.tile([True, False, False], (2, 1))
    batch = dict(image=image, boxes=boxes, box_valid=flags, box_ignored=np.zeros((2, 3), bool))
    batch |= dict(box_labels=np.array([[0, 0, 0], [1, 0, 0]], np.int32), valid=np.ones(2, bool))
    return batch | dict(box_masks=masks, box_outlined=flags)


@pytest.mark.parametrize("masks", [False, True])
def test_features_of_a_codec_are_learned_from_as_images_are(masks):
    """Gradients reach the tail and the heads alone; nothing is compiled here."""
    task = build_task(
        ConfigDict(MODEL | HEADS | dict(frontend="feature", codec=FEATURE, masks=masks))
    )
    batch, key = two_images(), jax.random.key(0)
    variables = jax.eval_shape(task.init, key, {"image": batch["image"]})
    learned = {"tail", "pyramid", "box_head", *(["mask_head"] * masks)}
    parts = {name for name in variables["params"] if task.groups(name) == "train"}
    assert parts == learned and task.reads == "feature"
    feature = {k: v for k, v in batch.items() if k != "image"}
    feature["feature"] = jax.ShapeDtypeStruct((2, 16, 24, 4), jnp.float32)
    for given in (batch, feature):
        total, aux = jax.eval_shape(task.loss, variables, given, key, 0)
        assert total.shape == () and set(aux.metrics) == {"class", "place", "centre"} | (
            {"mask"} if masks else set()
        )
        found = jax.eval_shape(task.predict, variables, given)
        assert found["boxes"].shape == (2, 6, 4) and ("masks" in found) == masks
        assert not masks or found["masks"].shape == (2, 6, 28, 28)


def test_what_is_learned_from_must_be_there():
    task = build_task(ConfigDict(MODEL | HEADS))
    with pytest.raises(IcmError, match="objects are learned from boxes"):
        task.loss({}, {"image": None}, jax.random.key(0), None)
    batch = {k: v for k, v in two_images().items() if not k.startswith("box_m")}
    with pytest.raises(IcmError, match="objects are learned from outlines"):
        task.loss({}, batch, jax.random.key(0), None)
