"""The uncertainty coefficient against pairs whose coefficient is known."""

import jax
import numpy as np
import pytest

from icm_jax.errors import IcmError
from icm_jax.measure.redundancy import fibres, uncertainty_coefficient

RNG = np.random.default_rng(0)
N = 6000


@pytest.fixture(scope="module")
def pairs():
    """b: one of four points; a: two channels of noise, some of which b tells.

    The noise is uniform on four numbers, 2 bits a channel.
    """
    which = RNG.integers(0, 4, N)
    b = 20.0 * np.stack([which % 2, which // 2, which], axis=1) + RNG.integers(0, 2, (N, 3))
    noise = RNG.integers(0, 4, (N, 2))
    return which, b, noise


def coefficient(a, b):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        return uncertainty_coefficient(a, b, clusters=4, steps=250)


def test_what_is_known_of_independent_latents_is_nothing(pairs):
    _, b, noise = pairs
    assert coefficient(noise, b) < 0.01


def test_what_follows_is_known(pairs):
    which, b, _ = pairs
    assert coefficient(np.stack([which, 3 - which], axis=1), b) > 0.95


def test_half_is_known(pairs):
    """One channel of 2 bits is b's, the other of 2 bits is noise: 1/2; and a sum of 4 + 2 bits."""
    which, b, noise = pairs
    given = coefficient(np.stack([which, noise[:, 0]], axis=1), b)
    assert given == pytest.approx(0.5, abs=0.03)
    # 16 numbers, of which b leaves four neighbours: H = 4, H(.|b) = 2.
    given = coefficient((4 * which + noise[:, 0])[:, None], b)
    assert given == pytest.approx(0.5, abs=0.05)


def test_it_has_a_direction(pairs):
    """b follows from a, but not a from b."""
    which, _, noise = pairs
    a = np.stack([which, noise[:, 0], noise[:, 1]], axis=1).astype(float)
    b = 9.0 * which[:, None]
    assert coefficient(b / 9, a * [9, 1, 1]) > 0.9
    assert coefficient(a, b) == pytest.approx(1 / 3, abs=0.03)


def test_too_few_fibres_are_refused():
    with pytest.raises(IcmError, match="at least 16 for 4 clusters"):
        uncertainty_coefficient(np.zeros((15, 2)), np.zeros((15, 2)), clusters=4)
    assert fibres(np.zeros((2, 3, 4, 5))).shape == (24, 5)
