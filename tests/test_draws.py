"""Bootstrap over images, on cases whose answer is known."""

import numpy as np
import scipy.stats

from icm_jax.measure import draws, metrics


def test_intervals_are_those_of_the_binomial():
    """Hits of images drawn again: Binomial(n, k / n), whose percentiles are known."""
    hits = (np.arange(200) < 60).astype(float)
    counts = draws.resamples(200, 4000)
    assert (counts.sum(axis=1) == 200).all()
    found = draws.interval(200 * draws.means(hits, counts), 0.9)
    expected = scipy.stats.binom(200, 0.3).ppf([0.05, 0.95])
    np.testing.assert_allclose(found, expected, atol=1)
    np.testing.assert_array_equal(counts, draws.resamples(200, 4000))
    assert (counts != draws.resamples(200, 4000, seed=1)).any()
    # What a difference has in common falls out.
    apart = draws.means(hits, counts) - draws.means(hits - 0.25, counts)
    np.testing.assert_allclose(draws.interval(apart), 0.25, rtol=1e-12)


def test_draws_that_have_nothing():
    values = np.array([1.0, np.nan, 3.0])
    counts = np.array([[1, 1, 1], [0, 3, 0], [0, 1, 2]])
    np.testing.assert_array_equal(draws.means(values, counts), [2.0, np.nan, 3.0])
    assert np.isnan(draws.interval(np.full(9, np.nan))).all()
    few, many = np.arange(100.0), np.arange(100.0)
    few[:5], many[:6] = np.nan, np.nan
    assert not np.isnan(draws.interval(few)).any() and np.isnan(draws.interval(many)).all()


def test_intervals_of_bd_rates():
    """A curve that takes a share of the anchor's bits, other by image: the mean share is known."""
    rates, quality = np.array([0.25, 0.5, 1.0, 2.0]), np.array([28.0, 31.0, 34.0, 37.0])
    share = np.random.default_rng(0).uniform(0.5, 0.9, 50)  # of the rate that an image takes
    drawn = [
        metrics.bd_rate(
            np.stack([rates, quality], axis=1), np.stack([rates * mean, quality], axis=1)
        )
        for mean in draws.means(share, draws.resamples(50))
    ]
    middle, error = 100 * (share.mean() - 1), 1.96 * 100 * share.std() / np.sqrt(50)
    np.testing.assert_allclose(
        draws.interval(np.array(drawn)), [middle - error, middle + error], atol=0.5
    )


def test_records_hold_draws():
    values = np.array([0.25, np.nan, 1e-3])
    record = {"map": 0.3, "draws": draws.packed({"map": values})}
    np.testing.assert_allclose(draws.of(record, "map"), values, rtol=1e-7)
    assert draws.of(record, "bpp") is None and draws.of({}, "map") is None
