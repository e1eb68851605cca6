"""Optimisers and schedules against their formulas."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from toy import toy, toy_run

from icm_jax.engine import optim, train
from icm_jax.errors import IcmError

# optax's and orbax's own code neither keeps to strict promotion nor is free of deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_schedules_are_their_formulas():
    config = ml_collections.ConfigDict(dict(schedule="cosine", learning_rate=2.0, warmup_steps=4))
    schedule = optim.make_schedule(config, 12)
    expected = [2 * t / 4 if t < 4 else 1 + np.cos(np.pi * (t - 4) / 8) for t in range(12)]
    np.testing.assert_allclose([schedule(t) for t in range(12)], expected, atol=1e-6)
    none = optim.make_schedule(ml_collections.ConfigDict(dict(config, warmup_steps=0)), 0)
    assert none(0) == 2.0  # a run of no steps needs no rate, but may have one
    for bad in (dict(schedule="step"), dict(warmup_steps=12)):
        with pytest.raises(IcmError):
            optim.make_schedule(ml_collections.ConfigDict(dict(config, **bad)), 12)


def test_rates_follow_the_batch_by_their_rule():
    given = {rule: optim.scaled(0.03, 1024, 256, rule) for rule in ("none", "linear", "sqrt")}
    assert given == pytest.approx({"none": 0.03, "linear": 0.12, "sqrt": 0.06})
    for rule, base in (("cubic", 256), ("linear", 0)):
        with pytest.raises(IcmError, match=r"rate_scaling 'cubic'|rate_batch is 0"):
            optim.scaled(0.03, 1024, base, rule)
    # Accumulated steps count: SGD's first update is the rate times the gradient.
    own = dict(toy_run().optim, rate_scaling="linear", rate_batch=4, accumulate=2)
    optimiser = optim.make_optimiser(ml_collections.ConfigDict(own), 8, 16)
    params = {"w": jnp.zeros(2)}
    state = optimiser.init(params)
    for _ in range(2):
        updates, state = optimiser.update({"w": jnp.ones(2)}, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * 16 * 2 / 4, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accumulated_steps_are_one_of_a_larger_batch(name):
    own = dict(toy_run().optim, name=name, schedule="cosine", clip_norm=0.3)
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 4, 4, 3)).astype(np.uint8)

    def averages(rows, **changes):
        run = toy_run(steps=24 // rows, batch_size=rows, optim=own | changes)
        training = train.prepare(run, toy())
        init, _ = train.initial(training)
        step = jax.jit(train.make_step(training.task, training.optimiser, run))
        state = init(jax.random.key(0), {})
        for batch in images.reshape(-1, rows, 4, 4, 3):
            state, _ = step(state, {"image": batch}, jax.random.key(0))
            yield state.variables["params"]["w"]["v"], state.ema["w"]["v"]

    whole = list(averages(6, warmup_steps=1))
    small = list(averages(2, warmup_steps=3, accumulate=3))
    np.testing.assert_allclose(small[2::3], whole, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(small[3::3], small[2:-1:3])  # in between nothing moves
    assert np.abs(whole[-1]).min() > 1e-3
    with pytest.raises(IcmError, match="accumulate is 0"):
        optim.make_optimiser(ml_collections.ConfigDict(own | dict(accumulate=0)), 4, 2)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars", "lamb"])
def test_optimisers_descend_and_do_not_decay_vectors(name):
    config = dict(toy_run().optim, name=name, weight_decay=0.1, learning_rate=0.05)
    optimiser = optim.make_optimiser(ml_collections.ConfigDict(config), 100, 2)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones((2,))}
    updates, _ = optimiser.update(
        jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params
    )
    decayed = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(decayed["vector"], 1)
    if name != "adam":
        assert (decayed["matrix"] < 1).all()
    with pytest.raises(IcmError, match="unknown optimiser"):
        optim.make_optimiser(ml_collections.ConfigDict(dict(config, name="sdg")), 100, 2)
