"""Entropy models against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.test_util import check_grads
from small import RNG, normal

from icm_jax import entropy
from icm_jax.coding import tables
from icm_jax.errors import IcmError

GRADIENT = dict(order=1, modes=("rev",), eps=0.03, rtol=0.01, atol=0.01)


@pytest.fixture(scope="module")
def prior():
    """A factorised prior moved away from its initial state."""
    module = entropy.Factorised()
    params = module.init(jax.random.key(0), normal(1, 3))["params"]
    leaves, tree = jax.tree.flatten(params)
    moved = [leaf + normal(*leaf.shape, scale=0.5) for leaf in leaves]
    return module, jax.tree.unflatten(tree, moved)


def cdf(params, x, channel):
    """The prior's CDF, written out: float64 [n]."""
    h = np.asarray(x, np.float64)[None, :]
    for layer in range(3):
        matrix = np.log1p(np.exp(np.asarray(params[f"matrix_{layer}"], np.float64)[channel]))
        h = matrix @ h + np.asarray(params[f"bias_{layer}"], np.float64)[channel]
        if layer < 2:
            h = h + np.tanh(np.asarray(params[f"factor_{layer}"])[channel]) * np.tanh(h)
    return 1 / (1 + np.exp(-h[0]))


def test_factorised_bits_are_the_density_convolved_with_noise(prior):
    module, params = prior
    y = np.linspace(-12, 12, 49)
    bits = module.apply({"params": params}, jnp.tile(y[:, None], (1, 3)).astype(jnp.float32))
    for channel in range(3):
        mass = cdf(params, y + 0.5, channel) - cdf(params, y - 0.5, channel)
        np.testing.assert_allclose(bits[:, channel], -np.log2(mass), rtol=2e-4, atol=2e-4)
    density = lambda x: (cdf(params, [x + 1e-4], 0) - cdf(params, [x - 1e-4], 0))[0] / 2e-4  # noqa: E731
    integral, _ = scipy.integrate.quad(density, 1.0, 2.0)
    np.testing.assert_allclose(
        2.0 ** -module.apply({"params": params}, jnp.full((1, 3), 1.5))[0, 0], integral, rtol=1e-3
    )


def test_bits_stay_finite_with_gradients_far_in_the_tails(prior):
    module, params = prior
    far = jnp.array([[-3e4, 3e4, 1e3]])
    value, gradient = jax.value_and_grad(lambda y: module.apply({"params": params}, y).sum())(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 0] < 0 < gradient[0, 1]
    index = jnp.zeros((2,))
    value, gradient = jax.value_and_grad(lambda y: entropy.gaussian_bits(y, index).sum())(
        jnp.array([-900.0, 900.0])
    )
    assert np.isfinite(value) and gradient[0] < 0 < gradient[1]


def test_far_elements_cost_about_what_their_escapes_do():
    """0.9 to 2.5 times what the tables charge, at 2 to 900 from the centre of the narrowest row."""
    y = np.array([2, 5, 20, 100, 900])
    made = tables.gaussian_tables()
    row = int(made.lengths[0])
    cdf = made.cdf[made.starts[0] + 1 :][: row + 1]
    gamma = y - (made.offsets[0] + row - 1) + 1
    price = tables.PRECISION - np.log2(np.diff(cdf)[-1]) + 2 * np.floor(np.log2(gamma)) + 2
    given = entropy.gaussian_bits(jnp.asarray(y, jnp.float32), jnp.zeros(5))
    assert ((given > 0.9 * price) & (given < 2.5 * price)).all(), (given, price)


def test_gaussian_bits_equal_scipy_and_finite_differences():
    y, index = normal(40, scale=5.0), jnp.asarray(RNG.uniform(0, 50, 40), jnp.float32)
    scale = np.exp(np.log(0.11) + np.asarray(index) * np.log(256 / 0.11) / 63)
    edge = 0.5 + 5.0 * scale  # beyond it, 6 bits more for every doubling of the distance
    inside = np.minimum(np.abs(np.float64(y)), edge)
    assert (inside == edge).any() and (inside < edge).any()
    lower, upper = ((-inside + s) / scale for s in (-0.5, 0.5))
    log_upper, log_lower = scipy.stats.norm.logcdf(upper), scipy.stats.norm.logcdf(lower)
    expected = -(log_upper + np.log(-np.expm1(log_lower - log_upper))) / np.log(2)
    expected += 6 * np.log2(np.maximum(np.abs(np.float64(y)) / edge, 1))
    np.testing.assert_allclose(entropy.gaussian_bits(y, index), expected, rtol=2e-4, atol=1e-5)
    shifted = entropy.gaussian_bits(y + 3.0, index, jnp.full((40,), 3.0))
    np.testing.assert_allclose(shifted, expected, rtol=1e-3, atol=1e-4)
    wide = jnp.full((40,), 30.0)
    check_grads(lambda y: entropy.gaussian_bits(y, wide).sum(), (y,), **GRADIENT)


def test_table_index_is_the_nearest_inside_the_table():
    given = entropy.table_index(jnp.array([-3.0, 0.4, 0.9, 20.99, 62.6, 63.0, 400.0]))
    np.testing.assert_array_equal(given, [0, 0, 1, 21, 63, 63, 63])


def test_frozen_prior_holds_the_masses_of_the_float_prior(prior):
    _, params = prior
    frozen = entropy.factorised_tables(params)
    for channel in range(3):
        start, length = frozen.starts[channel], frozen.lengths[channel]
        counts = np.diff(frozen.cdf[start + 1 : start + 2 + length])[:-1]
        values = frozen.offsets[channel] + np.arange(length - 1)
        mass = cdf(params, values + 0.5, channel) - cdf(params, values - 0.5, channel)
        raised = np.maximum(2.0**-16 - mass, 0).sum()  # to one count each; others pay for it
        assert np.abs(counts / 2**16 - mass).max() < 2**-15 + raised
        assert 1 - mass.sum() < 2 * tables.TAIL_MASS
    broken = dict(params, bias_0=params["bias_0"] * np.nan)
    with pytest.raises(IcmError, match="not finite"):
        entropy.factorised_tables(broken)
