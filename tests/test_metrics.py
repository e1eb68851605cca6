"""SSIM and MS-SSIM against closed forms and SciPy; broken predictions never count as right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from icm_jax import ops
from icm_jax.errors import IcmError
from icm_jax.measure import Accuracy, MeanIoU, metrics

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
VALID = np.array([True])


def images(height, width, seed=0):
    rng = np.random.default_rng(seed)
    x = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, (height, width, 3)), (2, 2, 0))
    x = np.clip(127 + 6 * (x - x.mean()), 0, 255)
    y = np.clip(x + rng.normal(scale=20, size=x.shape), 0, 255)
    return x.astype(np.uint8), y.astype(np.uint8)


def scipy_maps(x, y):
    """SSIM and contrast-structure maps of one plane, where SciPy's 11-tap filter needs no edge."""

    def blur(values):
        # radius 5 = int(truncate * sigma + 0.5)
        return scipy.ndimage.gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    cs = (2 * vxy + C2) / (vx + vy + C2)
    return cs * (2 * mx * my + C1) / (mx**2 + my**2 + C1), cs


def test_ssim_of_constant_images_is_the_luminance_term():
    x, y = np.full((16, 20), 100, np.uint8), np.full((16, 20), 50, np.uint8)
    assert metrics.ssim(x, x) == pytest.approx(1)
    expected = (2 * 100 * 50 + C1) / (100**2 + 50**2 + C1)
    assert metrics.ssim(x, y) == pytest.approx(expected, abs=1e-9)


def test_ms_ssim_of_constant_images_has_luminance_at_the_coarsest_scale_alone():
    x, y = np.full((176, 180), 100, np.uint8), np.full((176, 180), 50, np.uint8)
    luminance = (2 * 100 * 50 + C1) / (100**2 + 50**2 + C1)
    assert metrics.ms_ssim(x, y) == pytest.approx(luminance**0.1333, abs=1e-9)


def test_ssim_equals_scipy():
    x, y = images(40, 33)
    maps = [scipy_maps(*(i[..., c].astype(float) for i in (x, y)))[0] for c in range(3)]
    assert metrics.ssim(x, y) == pytest.approx(np.mean(maps), abs=1e-9)
    assert 0.1 < metrics.ssim(x, y) < 0.99


def test_ms_ssim_equals_scipy():
    x, y = images(200, 181)
    weights, planes = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), []
    for channel in range(3):
        a, b = (image[..., channel].astype(float) for image in (x, y))
        product = 1.0
        for scale, weight in enumerate(weights):
            whole, cs = scipy_maps(a, b)
            product *= (whole if scale == 4 else cs).mean() ** weight
            a, b = (p[: p.shape[0] & ~1, : p.shape[1] & ~1] for p in (a, b))
            a, b = ((p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) / 4 for p in (a, b))
        planes.append(product)
    assert metrics.ms_ssim(x, y) == pytest.approx(np.mean(planes), abs=1e-9)


def test_opposite_structure_counts_as_zero():
    x = images(176, 176)[0]
    assert metrics.ms_ssim(x, 255 - x) == 0


def test_images_too_small_or_unequal_are_refused():
    x = np.zeros((175, 300, 3), np.uint8)
    with pytest.raises(IcmError, match="at least 176"):
        metrics.ms_ssim(x, x)
    with pytest.raises(IcmError, match="equal shapes"):
        metrics.ssim(x, x[:, 1:])


@pytest.mark.parametrize("logits", [[1, np.nan, 0], [np.nan] * 3, [np.inf, 0, 0]])
def test_logits_that_are_not_finite_are_wrong_at_any_number_of_classes(logits):
    score = Accuracy()
    score.update({"logits": np.float32([logits])}, {"label": np.array([0]), "valid": VALID})
    assert score.result() == {"top1": 0, "top5": 0, "examples": 1}


@pytest.mark.parametrize("mask, segment", [(7, 0), (0, 5), (0, -1)])
def test_class_ids_out_of_range_are_refused(mask, segment):
    score = MeanIoU("abcd")
    with pytest.raises(IcmError, match="expected 0 to 3"):
        score.update(
            {"segments": np.array([[[segment]]])}, {"mask": np.array([[[mask]]]), "valid": VALID}
        )


def test_the_loss_is_the_metric():
    """ops.ms_ssim in float32 on the device against the float64 metric, and its gradient."""
    pairs = [images(190, 181, seed) for seed in range(2)]
    x, y = (np.stack(side) for side in zip(*pairs, strict=True))
    given = ops.ms_ssim(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    expected = [metrics.ms_ssim(*pair) for pair in pairs]
    np.testing.assert_allclose(given, expected, rtol=1e-4)
    loss = lambda y: 1 - ops.ms_ssim(jnp.asarray(x[:1], jnp.float32), y).sum()  # noqa: E731
    start = jnp.asarray(y[:1], jnp.float32)
    gradient = jax.grad(loss)(start)
    step = 20.0 * gradient / jnp.linalg.norm(gradient)
    slope = (loss(start + step) - loss(start - step)) / 2
    np.testing.assert_allclose(slope, (gradient * step).sum(), rtol=2e-2)


def test_decibels_of_similarity():
    assert metrics.decibels(0.99) == pytest.approx(20.0)
    assert metrics.decibels(1.0) == float("inf")
