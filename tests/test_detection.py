"""The detection task: outputs that say the truth cost nothing and give it back; training learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from ml_collections import ConfigDict

from icm_jax.errors import IcmError
from icm_jax.nets.yolo import yolov3
from icm_jax.tasks import boxes, build_task
from icm_jax.tasks.detection import anchors, detections, divergence, losses

TRUTH = np.float32([[[0.1, 0.2, 0.3, 0.25], [0.3, 0.1, 0.95, 0.9], [0, 0, 0, 0]]])
LABELS, VALID = jnp.array([[2, 0, 1]]), jnp.array([[True, True, False]])
GRIDS = [(2, 3), (4, 6), (8, 12)]  # of 64 × 96 pixels
SHAPES = anchors(yolov3(3), GRIDS, 0.2)


@jax.jit
def cost(outputs, truth, labels, valid):
    return losses(outputs, truth, labels, valid, SHAPES, (1.0,) * len(SHAPES))


def truthful(sure=12.0):
    """Raw outputs that mean TRUTH."""
    outputs = []
    wanted = boxes.targets(jnp.asarray(TRUTH), LABELS, VALID, SHAPES, GRIDS, 3)
    for target in wanted:
        inner = jnp.clip(target.boxes[..., 1::-1], 1e-5, 1 - 1e-5)
        there = target.weight[..., None] > 0
        outputs.append(
            jnp.concatenate(
                [
                    jnp.log(inner / (1 - inner)),
                    target.boxes[..., 3:1:-1],
                    jnp.where(there, sure, -sure),
                    jnp.where(target.classes > 0, sure, -sure),
                ],
                axis=-1,
            )
        )
    return outputs


def test_outputs_that_say_the_truth_give_it_back():
    found = detections(truthful(), SHAPES, (1.0,) * len(SHAPES), 10, 0.5, 0.3)
    assert found.valid.sum() == 2
    order = np.argsort(np.asarray(found.labels[0, :2]))[::-1]
    assert np.asarray(found.labels)[0, order].tolist() == [2, 0]
    np.testing.assert_allclose(np.asarray(found.boxes)[0, order], TRUTH[0, :2], atol=1e-4)


def test_anchors_are_in_pixels():
    """As in Darknet, the same anchor is a smaller share of a larger image."""
    whole = anchors(yolov3(3), [(13, 13), (26, 26), (52, 52)], 1.0)
    np.testing.assert_allclose(whole[0][0], [116 / 416, 90 / 416], rtol=1e-6)
    wide = anchors(yolov3(3), [(13, 26), (26, 52), (52, 104)], 0.5)
    np.testing.assert_allclose(wide[2][2], [33 / 2 / 832, 23 / 2 / 416], rtol=1e-6)


def test_they_cost_nothing_beyond_what_offsets_must():
    """Cross-entropy of an offset is least, not zero, at the offset itself."""
    given = cost(truthful(), jnp.asarray(TRUTH), LABELS, VALID)
    assert given["objectness"] < 0.01 and given["class"] < 0.01
    shifted = [raw.at[..., :2].add(0.3) for raw in truthful()]
    worse = cost(shifted, jnp.asarray(TRUTH), LABELS, VALID)
    assert worse["place"] > given["place"] + 0.01
    other = cost(truthful(), jnp.asarray(TRUTH), LABELS.at[0, 1].set(1), VALID)
    np.testing.assert_allclose(other["class"] - given["class"], 24.0, rtol=1e-3)
    # What is not valid is not there.
    moved = jnp.asarray(TRUTH).at[0, 2].set(jnp.array([0.5, 0.5, 0.9, 0.7]))
    same = cost(truthful(), moved, LABELS, VALID)
    assert all(same[name] == given[name] for name in given)


def test_near_misses_are_not_asked():
    """An anchor that overlaps the object by half, but is not responsible, costs nothing."""
    outputs = truthful()
    coarse = outputs[0]
    (n, y, x, a) = np.argwhere(coarse[..., 4] > 0)[0]
    own, other = SHAPES[0][a], SHAPES[0][a - 1]
    near = coarse[n, y, x, a].at[2:4].add(jnp.log(own / other)).at[4].set(5.0)
    outputs[0] = coarse.at[n, y, x, a - 1].set(near)
    arguments = jnp.asarray(TRUTH), LABELS, VALID
    assert cost(outputs, *arguments)["objectness"] < 0.01
    outputs[0] = outputs[0].at[n, y, x, a - 1, 2].add(-3.0)  # too narrow: a false alarm
    assert cost(outputs, *arguments)["objectness"] > 4.0


def test_divergence_is_that_of_bernoulli_variables():
    """Against SciPy's entropy, cell by cell, and none of equal outputs."""
    rng = np.random.default_rng(0)
    p, q = (
        [rng.normal(0, 2, (2, h, w, 3, 5 + 4)).astype(np.float32) for h, w in ((2, 3), (4, 6))]
        for _ in range(2)
    )
    sigmoid, expected = scipy.special.expit, 0.0
    for there, given in zip(p, q, strict=True):
        for a, b in zip(there.reshape(-1, 9), given.reshape(-1, 9), strict=True):
            pairs = [
                scipy.stats.entropy([x, 1 - x], [y, 1 - y])
                for x, y in zip(sigmoid(a), sigmoid(b), strict=True)
            ]
            place = sum(pairs[:2]) + 0.5 * np.square(a[2:4] - b[2:4]).sum()
            expected += (pairs[4] + sigmoid(a[4]) * (place + sum(pairs[5:]))) / 2
    np.testing.assert_allclose(divergence(p, q).mean(), expected, rtol=1e-4)
    assert np.abs(divergence(p, p)).max() < 1e-6


def test_a_small_detector_learns_a_batch():
    own = dict(name="yolov3", width=1 / 16, depth=0.1)
    config = dict(name="detection", classes=3, detector=own, dtype="float32")
    task = build_task(
        ConfigDict(
            config
            | dict(least=0.1, overlap=0.5, limit=8, anchor_scale=0.2, crop=(1.0, 1.0), size=64)
        )
    )
    image = np.random.default_rng(0).integers(0, 60, (2, 64, 96, 3)).astype(np.uint8)
    image[:, 20:60, 10:86] += 150
    batch = {
        "image": image,
        "boxes": np.tile(np.float32([[[20 / 64, 10 / 96, 60 / 64, 86 / 96]]]), (2, 1, 1)),
    }
    batch |= {"box_labels": np.ones((2, 1), np.int32), "box_valid": np.ones((2, 1), bool)}
    with pytest.raises(IcmError, match="100; the detector takes sides that are multiples of 32"):
        build_task(ConfigDict(config | dict(size=100)))
    with pytest.raises(IcmError, match="learns from boxes"):
        task.loss({}, {"image": image}, None, None)
    optimiser = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.02, momentum=0.9))
    variables = jax.jit(task.init)(jax.random.key(0), batch)

    @jax.jit
    def step(variables, state):
        def loss(params):
            return task.loss(dict(variables, params=params), batch, jax.random.key(1), None)

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimiser.update(gradient, state)
        params = optax.apply_updates(variables["params"], updates)
        return dict(params=params, **aux.collections), state, value

    state, values = optimiser.init(variables["params"]), []
    for _ in range(60):
        variables, state, value = step(variables, state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0], values
    found = boxes.Detections(**task.predict(variables, batch))
    assert found.boxes.shape == (2, 8, 4)
