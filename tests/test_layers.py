"""Layers and transforms against their formulas, SciPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jax.test_util import check_grads
from small import RNG, normal

from icm_jax import ops
from icm_jax.nets import convolution
from icm_jax.nets.convolution import (
    compiler_options,
    down_by_two,
    plus_bias,
    pointwise,
    product,
    up_by_two,
)
from icm_jax.nets.layers import GDN, Projector, Up, haar_cascade
from icm_jax.nets.transforms import ImageAnalysis, ImageSynthesis

GRADIENT = dict(order=1, modes=("rev",), eps=0.001, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("simplified", [False, True])
def test_gdn_equals_its_formula_and_undoes_itself_when_diagonal(simplified):
    x = normal(2, 3, 5, 4)
    gdn = GDN(simplified=simplified)
    variables = gdn.init(jax.random.key(0), x)
    beta, gamma = np.float32([0.5, 1, 2, 3]), np.abs(RNG.normal(size=(4, 4))).astype(np.float32)
    stored = {"beta": np.sqrt(beta + 2.0**-36), "gamma": np.sqrt(gamma + 2.0**-36)}
    given = np.asarray(gdn.apply({"params": stored}, x))
    pool = np.abs(x) if simplified else np.square(x)
    norm = np.einsum("nhwi,io->nhwo", pool, gamma) + beta
    norm = norm if simplified else np.sqrt(norm)
    np.testing.assert_allclose(given, x / norm, rtol=1e-5)
    inverse = GDN(inverse=True, simplified=simplified).apply({"params": stored}, x)
    np.testing.assert_allclose(inverse, x * norm, rtol=1e-5)
    initial = np.asarray(gdn.apply(variables, x))
    expected = np.asarray(x) / (1 + 0.1 * np.abs(x) if simplified else np.sqrt(1 + 0.1 * x**2))
    np.testing.assert_allclose(initial, expected, rtol=1e-5)
    check_grads(lambda x: jnp.sin(gdn.apply({"params": stored}, x)).sum(), (x,), **GRADIENT)


def test_bounds_let_helpful_gradients_through():
    x = jnp.array([-1.0, -1.0, 2.0, 2.0])
    pull = jnp.array([1.0, -1.0, 1.0, -1.0])  # a step goes against the gradient
    gradient = jax.grad(lambda x: (ops.lower_bound(x, 0.0) * pull).sum())(x)
    np.testing.assert_array_equal(gradient, [0, -1, 1, -1])
    gradient = jax.grad(lambda x: (ops.upper_bound(x, 1.0) * pull).sum())(x)
    np.testing.assert_array_equal(gradient, [1, -1, 1, 0])
    np.testing.assert_array_equal(ops.upper_bound(x, 1.0), [-1, -1, 1, 1])


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_strided_convolution_equals_scipy(size, kernel):
    x, weights = normal(1, *size, 2), normal(kernel, kernel, 2, 3)
    given = np.asarray(down_by_two(x, weights))[0]
    padded = np.pad(np.asarray(x)[0], ((0, size[0] % 2), (0, size[1] % 2), (0, 0)))
    for out in range(3):
        full = sum(
            scipy.signal.correlate2d(padded[..., c], weights[..., c, out], "same") for c in range(2)
        )
        np.testing.assert_allclose(given[..., out], full[::2, ::2], atol=2e-5)
    check_grads(down_by_two, (x, weights), **GRADIENT)
    # What other platforms compute for images.
    np.testing.assert_allclose(convolution._down_by_wide_blocks(x, weights)[0], given, atol=1e-5)


def plain_down(x, kernel):
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), pad, dimension_numbers=names)


def plain_up(x, kernel, bias):
    side = kernel.shape[0]
    pad, names = [(side - 1 - side // 2, side // 2 + 1)] * 2, ("NHWC", "HWIO", "NHWC")
    return bias.reshape(1, 1, 1, -1) + jax.lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), pad, lhs_dilation=(2, 2), dimension_numbers=names
    )


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
@pytest.mark.parametrize("channels, features", [(3, 6), (6, 7), (7, 2)])
def test_every_form_of_a_resampling_has_the_plain_ones_gradients(size, channels, features):
    x, bias = normal(2, *size, channels), normal(features)
    cases = [(down_by_two, plain_down, side, ()) for side in (1, 3, 5, 7)]
    cases += [(up_by_two, plain_up, side, (bias,)) for side in (3, 5)]
    for form, plain, side, rest in cases:
        operands = (x, normal(side, side, channels, features), *rest)
        (given, pull), (expected, plain_pull) = (jax.vjp(f, *operands) for f in (form, plain))
        np.testing.assert_allclose(given, expected, atol=2e-5)
        gradient = normal(*given.shape)
        for found, wanted in zip(pull(gradient), plain_pull(gradient), strict=True):
            np.testing.assert_allclose(found, wanted, atol=5e-5, err_msg=f"{form} {side}")


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_biases_and_products_of_channels_have_the_plain_ones_gradients(dtype, tolerance):
    x, matrix, bias = (a.astype(dtype) for a in (normal(2, 3, 5, 4), normal(4, 6), normal(6)))
    gradient = normal(2, 3, 5, 6).astype(dtype)
    given, pull = jax.vjp(lambda x, w, b: plus_bias(product(x, w), b), x, matrix, bias)
    expected, plain = jax.vjp(lambda x, w, b: x @ w + b.reshape(1, 1, 1, -1), x, matrix, bias)
    assert given.dtype == dtype
    pairs = zip((given, *pull(gradient)), (expected, *plain(gradient)), strict=True)
    for found, wanted in pairs:
        assert found.shape == wanted.shape and found.dtype == dtype
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(
            np.float32(found), np.float32(wanted), rtol=0, atol=tolerance * scale
        )


def test_compiler_options_are_for_cpus_that_know_them(monkeypatch):
    assert compiler_options("cuda") == {}
    options = compiler_options("cpu")
    x = normal(2, 8, 8, 16)
    step = jax.jit(lambda x: down_by_two(x, normal(3, 3, 16, 16)), compiler_options=options)
    assert "ynn" not in str(step.lower(x).compile().as_text())
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=individual_dot")
    compiler_options.cache_clear()
    assert compiler_options("cpu") == {}
    compiler_options.cache_clear()


def test_pointwise_convolution_is_a_product_of_channels():
    x, weights = normal(2, 3, 5, 4), normal(1, 1, 4, 3)
    given, pull = jax.vjp(pointwise, x, weights)
    np.testing.assert_allclose(given, np.einsum("nhwc,cf->nhwf", x, weights[0, 0]), atol=1e-5)
    gradient = normal(2, 3, 5, 3)
    to_x, to_weights = pull(gradient)
    np.testing.assert_allclose(to_x, np.einsum("nhwf,cf->nhwc", gradient, weights[0, 0]), atol=1e-5)
    np.testing.assert_allclose(to_weights[0, 0], np.einsum("nhwc,nhwf->cf", x, gradient), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 5)])
@pytest.mark.parametrize("side", [3, 5])
def test_transposed_convolution_equals_its_definition(size, side):
    x, kernel = normal(1, *size, 3), normal(side, side, 3, 2)
    full = np.zeros((2 * size[0] + 4, 2 * size[1] + 4, 2))
    for row, column in np.ndindex(*size):
        stamp = np.einsum("c,abcf->abf", x[0, row, column], kernel)
        full[2 * row : 2 * row + side, 2 * column : 2 * column + side] += stamp
    bias = normal(2)
    given = up_by_two(x, kernel, bias)[0]
    rows, columns = (slice(side // 2, side // 2 + 2 * length) for length in size)
    np.testing.assert_allclose(given, full[rows, columns] + np.asarray(bias), atol=2e-5)
    check_grads(lambda w, b: up_by_two(x, w, b), (kernel, bias), **GRADIENT)


def test_sub_pixel_convolution_doubles_the_sides():
    layer = Up(3)
    x = normal(2, 4, 5, 6)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["Conv_0"]["kernel"]
    y = np.asarray(layer.apply(variables, x))
    assert y.shape == (2, 8, 10, 3)
    inner = np.einsum("hwc,hwco->o", np.asarray(x)[0, 0:3, 1:4], kernel)
    np.testing.assert_allclose(y[0, 2:4, 4:6].reshape(-1), inner, rtol=1e-4, atol=1e-5)


def test_projector_has_one_hidden_layer():
    layer, x = Projector(5, 2), normal(3, 4)
    params = layer.init(jax.random.key(0), x)["params"]
    hidden = np.maximum(x @ params["Dense_0"]["kernel"], 0)
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), hidden @ params["Dense_1"]["kernel"], rtol=1e-5
    )


def test_image_transforms_begin_as_a_wavelet_packet():
    """Orthonormal bands, none twice; smooth images survive what is cut away, noise does not."""
    windows = haar_cascade((12, 20, 24))
    for window, (inner, scale) in zip(windows, ((12, 0.25), (20, 1), (24, 4)), strict=True):
        matrix = window.reshape(-1, inner) / scale
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(inner), atol=1e-6)
    wide = haar_cascade((16,))[0]
    assert np.abs(wide).any(axis=(0, 1, 2)).sum() == 12  # all bands of RGB, and no more
    y, x = np.mgrid[:64, :64]
    smooth = 128 + 100 * np.sin(x / 30 + np.array([0, 0.2, 0.4])[:, None, None]) * np.cos(y / 40)
    smooth = smooth.transpose(1, 2, 0)[None].astype(np.float32)
    noise = np.random.default_rng(0).uniform(0, 255, smooth.shape).astype(np.float32)
    analysis, synthesis = ImageAnalysis(24, (16,) * 3), ImageSynthesis((16,) * 3)
    first = analysis.init(jax.random.key(0), smooth)
    second = synthesis.init(jax.random.key(1), jnp.zeros((1, 4, 4, 24)))
    errors = [
        np.sqrt(np.square(synthesis.apply(second, analysis.apply(first, image)) - image).mean())
        for image in (smooth, noise)
    ]
    assert errors[0] < 12 < 50 < errors[1]
