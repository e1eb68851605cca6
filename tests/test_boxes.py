"""Boxes against counting pixels, a plain greedy loop, and cases worked out by hand."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.tasks import boxes

SIDE = 12
FEW = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
corner = st.tuples(st.integers(0, SIDE), st.integers(0, SIDE))


@st.composite
def grid_boxes(draw, count):
    pairs = [(sorted(draw(corner)), sorted(draw(corner))) for _ in range(count)]
    return np.float32([[y[0], x[0], y[1], x[1]] for y, x in pairs])


def covered(box):
    canvas = np.zeros((SIDE, SIDE), bool)
    canvas[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])] = True
    return canvas


@FEW
@hypothesis.given(grid_boxes(4), grid_boxes(3))
def test_overlap_is_the_share_of_common_pixels(one, other):
    given = boxes.iou(jnp.asarray(one), jnp.asarray(other))
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            both, either = (covered(a) & covered(b)).sum(), (covered(a) | covered(b)).sum()
            np.testing.assert_allclose(given[i, j], both / either if either else 0.0, rtol=1e-6)


def greedy(given, scores, limit, overlap, least):
    """The textbook's loop, one class after the other."""
    found = []
    for label in range(scores.shape[1]):
        left = [
            i for i in np.argsort(-scores[:, label], kind="stable") if scores[i, label] >= least
        ]
        while left:
            best, *left = left
            found.append((scores[best, label], best, label))
            shares = np.asarray(boxes.iou(given[best][None], given))[0]
            left = [i for i in left if not shares[i] > overlap]
    return sorted(found, key=lambda item: -item[0])[:limit]


suppress = jax.jit(boxes.suppress, static_argnums=(2, 3, 4, 5))


@FEW
@hypothesis.given(grid_boxes(14), st.integers(0, 2**31 - 1))
def test_suppression_equals_the_greedy_loop(given, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(28).reshape(14, 2).astype(np.float32) / 28  # no ties
    result = suppress(jnp.asarray(given)[None], jnp.asarray(scores)[None], 6, 0.5, 0.25, 28)
    expected = greedy(given, scores, 6, 0.5, 0.25)
    assert int(result.valid.sum()) == len(expected)
    for row, (score, place, label) in enumerate(expected):
        assert result.labels[0, row] == label
        np.testing.assert_allclose(result.scores[0, row], score)
        np.testing.assert_array_equal(result.boxes[0, row], given[place])


ANCHORS = [
    jnp.array(a, jnp.float32) / 416
    for a in ([(116, 90), (156, 198), (373, 326)], [(30, 61), (62, 45), (59, 119)])
]
GRIDS = [(4, 6), (8, 12)]


def test_targets_are_what_outputs_must_be_to_mean_the_boxes():
    given = np.float32([[[0.1, 0.2, 0.3, 0.25], [0.3, 0.1, 0.95, 0.9], [0, 0, 0, 0]]])
    labels, valid = jnp.array([[2, 0, 1]]), jnp.array([[True, True, False]])
    found = boxes.targets(jnp.asarray(given), labels, valid, ANCHORS, GRIDS, 3)
    # 0.2 × 0.05 is nearest in shape to 30 × 61 (of 416); 0.65 × 0.8 to 373 × 326.
    fine, coarse = found[1], found[0]
    assert fine.weight.shape == (1, 8, 12, 3) and np.argwhere(fine.weight).tolist() == [
        [0, 1, 2, 0]
    ]
    assert np.argwhere(coarse.weight).tolist() == [[0, 2, 3, 2]]
    np.testing.assert_allclose(coarse.weight.max(), 2 - 0.65 * 0.8, rtol=1e-6)
    assert fine.classes[0, 1, 2, 0].tolist() == [0, 0, 1] and fine.classes.sum() == 1
    for own, anchors, box in ((fine, ANCHORS[1], given[0, 0]), (coarse, ANCHORS[0], given[0, 1])):
        n, y, x, a = np.argwhere(own.weight)[0]
        dy, dx, th, tw = own.boxes[n, y, x, a]
        raw = jnp.zeros((*own.weight.shape, 8))
        logit = lambda p: jnp.log(p / (1 - p))  # noqa: E731
        raw = raw.at[n, y, x, a, :4].set(jnp.stack([logit(dx), logit(dy), tw, th]))
        np.testing.assert_allclose(boxes.place(raw, anchors)[n, y, x, a], box, rtol=1e-4, atol=1e-6)


def test_an_object_at_the_edge_stays_in_the_last_cell():
    given = jnp.array([[[0.9, 0.9, 1.1, 1.1]]], jnp.float32)
    found = boxes.targets(
        given, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), ANCHORS, GRIDS, 1
    )
    (at,) = [np.argwhere(t.weight).tolist() for t in found if t.weight.any()]
    assert at[0][1:3] in ([3, 5], [7, 11])
