"""Images with noise: the noise itself, and its table in a report."""

import numpy as np

from icm_jax.measure.noise import with_noise
from icm_jax.report.noise import noise_table


def test_noise_is_of_its_deviation_and_of_the_image_alone():
    images = np.full((3, 64, 64, 3), 128, np.uint8)
    images[2] = 250
    noisy = with_noise(images, (4, 5, 6), 10.0)
    assert noisy.dtype == np.uint8 and noisy.shape == images.shape
    for image in noisy[:2]:
        moved = image.astype(float) - 128
        assert abs(moved.mean()) < 0.3 and abs(moved.std() - 10) < 0.3
        assert abs(np.corrcoef(moved[:, 1:].ravel(), moved[:, :-1].ravel())[0, 1]) < 0.05
    assert noisy[2].max() == 255 and (noisy[2] == 255).mean() > 0.2  # clipped, not wrapped
    assert not np.array_equal(noisy[0], noisy[1])
    np.testing.assert_array_equal(with_noise(images[1:2], (5,), 10.0)[0], noisy[1])
    np.testing.assert_array_equal(with_noise(images, (4, 5, 6), 1e-6), images)


def record(run, kind, quality=None, curve="classify", **score):
    own = dict(run=run, arm=run, point="0.33 bpp", kind=kind, quality=quality, curve=curve, seed=0)
    return own | dict(title=f"Title of {run}") | score


def test_the_table_has_what_noise_costs():
    records = [
        record("c51", "stream", top1=0.5),
        record("c51", "noise", 10.0, "noise", top1=0.4),
        record("c51", "noise", 20.0, "noise", top1=0.25),
        record("c51", "noise", 10.0, "noise", top1=0.44),  # of another seed
        record("c51", "stream", top1=0.6),
        record("c51", "speed", 16, "speed"),
        record("d", "pixels", miou=0.5, pixel_accuracy=0.9),
        record("d", "noise", 20.0, "noise", miou=0.505),
        record("joint", "stream", top1=0.9),  # without noise
    ]
    assert noise_table(records) == [
        ["arm", "point", "score", "σ = 0", "σ = 10", "σ = 20"],
        ["Title of c51", "0.33 bpp", "top-1 [%]", "55.0", "42.0 (-13.0)", "25.0 (-30.0)"],
        ["Title of d", "0.33 bpp", "mIoU [%]", "50.0", "–", "50.5 (+0.5)"],
    ]
    assert noise_table([r for r in records if r["kind"] != "noise"]) == []
