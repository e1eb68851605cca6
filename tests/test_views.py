"""Views against one-image NumPy versions, their randomness and their independence of sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icm_jax.errors import IcmError
from icm_jax.tasks import views

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 20, 28, 3)).astype(np.uint8)


def sample(line, place, width):
    """Value at a real place of a [L, ...] line: triangle filter, renormalised at the ends."""
    weights = np.maximum(0, 1 - np.abs(np.arange(len(line)) - place) / max(width, 1))
    return np.tensordot(weights / weights.sum(), line, 1)


def resized(image, top, left, height, width, flip, size):
    rows = [
        sample(image, top + (i + 0.5) * height / size - 0.5, height / size) for i in range(size)
    ]
    columns = np.swapaxes(np.array(rows), 0, 1)
    out = [
        sample(columns, left + (i + 0.5) * width / size - 0.5, width / size) for i in range(size)
    ]
    out = np.swapaxes(np.array(out), 0, 1)
    return out[:, ::-1] if flip else out


@pytest.mark.parametrize(
    "window", [(0, 0, 20, 28, False), (3.3, 5.9, 14.2, 9.5, True), (8.0, 2.5, 5.0, 4.2, False)]
)
@pytest.mark.parametrize("size", [6, 24])
def test_resampling_equals_numpy(window, size):
    image = IMAGES[0].astype(np.float32)
    given = views._resample(
        image, tuple(jnp.asarray(v) for v in map(np.float32, window)), (size, size)
    )
    np.testing.assert_allclose(given, resized(image, *window, size), atol=2e-2)


def test_masks_follow_their_image():
    """A mask drawn into the image comes out at the same places, whatever the window and flip."""
    masks = np.zeros((64, 20, 28), np.uint8)
    for i in range(64):
        row, column = RNG.integers(0, 14), RNG.integers(0, 20)
        masks[i, row : row + 6, column : column + 8] = 9
    images = np.repeat(masks[..., None], 3, -1) * 20
    view, mask = views.mild(images, 40, masks, key=jax.random.key(1))
    assert set(np.unique(mask)) <= {0, 9}
    # Edges are soft in the image, at a corner by no more than 3/4 of the step of 180.
    off = np.abs(view[..., 0] - 20.0 * mask.astype(jnp.float32))
    assert off.max() <= 136 and (off > 1).mean() < 0.1 and mask.any()


def test_boxes_follow_their_image(monkeypatch):
    """White rectangles are where their boxes say, in any window and flip."""
    monkeypatch.setattr(views, "JITTER_P", 0.0)
    images = np.zeros((48, 40, 60, 3), np.uint8)
    boxes = np.zeros((48, 2, 4), np.float32)
    for i in range(48):
        top, left = RNG.integers(0, 20), RNG.integers(0, 40)
        images[i, top : top + 16, left : left + 15] = 255
        boxes[i, 0] = [top / 40, left / 60, (top + 16) / 40, (left + 15) / 60]
    valid = np.tile([[True, False]], (48, 1))
    given, placed, seen, _ = jax.jit(
        lambda key: views.boxed(images, boxes, valid, crop=(0.3, 1.0), key=key)
    )(jax.random.key(3))
    assert not seen[:, 1].any() and 0.5 < seen[:, 0].mean() < 1
    shares = []
    for view, box, there in zip(np.asarray(given[..., 0]), placed[:, 0], seen[:, 0], strict=True):
        rows, columns = np.nonzero(view > 127)
        if not there:
            continue
        drawn = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
        np.testing.assert_allclose(np.asarray(box) * [40, 60, 40, 60], drawn, atol=1.01)
        shares.append(float(box[3] - box[1]) * 60 / 15)
    assert min(shares) < 0.95 and max(shares) > 1.2  # some are cut, some enlarged


def test_windows_keep_their_area_aspect_and_place():
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.vmap(lambda key: jnp.stack(views._random_window(key, (40, 60), (0.2, 0.5))[:4]))
    top, left, height, width = np.asarray(draw(keys)).T
    flips = jax.vmap(lambda key: views._random_window(key, (40, 60), (0.2, 0.5))[4])(keys)
    area, aspect = height * width / 2400, width / height
    assert area.min() > 0.199 and area.max() < 0.501 and abs(area.mean() - 0.35) < 0.01
    assert aspect.min() > 0.749 and aspect.max() < 1.334 and abs(np.log(aspect).mean()) < 0.02
    assert top.min() >= 0 and (top + height).max() <= 40.001
    assert left.min() >= 0 and (left + width).max() <= 60.001
    assert abs(np.asarray(flips).mean() - 0.5) < 0.05


def test_blur_is_a_gaussian_of_unit_sum(monkeypatch):
    monkeypatch.setattr(views, "BLUR_P", 1.0)
    sigma = 1.5 * views.BLUR_SIZE / 25  # 1.5 pixels in a view of 25
    monkeypatch.setattr(views, "BLUR_SIGMA", (sigma, sigma))
    point = np.zeros((25, 25, 1), np.float32)
    point[12, 12] = 1
    given = np.asarray(views._blur(jnp.asarray(point), jax.random.key(0)))[..., 0]
    line = np.exp(-0.5 * ((np.arange(25) - 12) / 1.5) ** 2)
    np.testing.assert_allclose(given, np.outer(line, line) / line.sum() ** 2, atol=1e-6)
    flat = jnp.full((25, 25, 3), 0.3)
    np.testing.assert_allclose(views._blur(flat, jax.random.key(0)), flat, rtol=1e-5)


def test_jitter_is_the_composition_of_its_parts(monkeypatch):
    """With one strength at a time the change is that operation's own, and none is the identity."""
    monkeypatch.setattr(views, "JITTER_P", 1.0)
    image = RNG.uniform(0.4, 0.6, (6, 6, 3)).astype(np.float32)
    luma = image @ np.array([0.299, 0.587, 0.114], np.float32)
    monkeypatch.setattr(views, "JITTER", (0.0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(views._jitter(image, jax.random.key(2)), image, atol=1e-5)
    anchors = (np.zeros_like(image), np.full_like(image, luma.mean()), luma[..., None] + 0 * image)
    for number, anchor in enumerate(anchors):
        strengths = [0.0] * 4
        strengths[number] = 0.4
        monkeypatch.setattr(views, "JITTER", tuple(strengths))
        given = np.asarray(views._jitter(image, jax.random.key(2)))
        factor = ((given - anchor) * (image - anchor)).sum() / ((image - anchor) ** 2).sum()
        assert 0.6 <= factor <= 1.4 and abs(factor - 1) > 1e-3
        np.testing.assert_allclose(given, anchor + factor * (image - anchor), atol=1e-5)


def test_probabilities_of_contrastive_views():
    """Of 600 constant colour images, about 20 % come out grey."""
    images = np.broadcast_to(np.array([200, 40, 90], np.uint8), (600, 8, 8, 3))
    view = np.asarray(views.contrastive(images, 8, key=jax.random.key(5)))
    grey = np.ptp(view, axis=-1).max((1, 2)) < 1
    assert 0.15 < grey.mean() < 0.25
    same = np.abs(view - images).max((1, 2, 3)) < 0.5  # neither jittered nor grey
    assert 0.11 < same.mean() < 0.21


def test_views_do_not_depend_on_sharding():
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("data",))
    sharded = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
    for view in (views.contrastive, lambda *a, key: views.mild(*a, key=key)[0]):
        function = jax.jit(lambda x, key, view=view: view(x, 16, key=key))
        whole, split = (function(x, jax.random.key(0)) for x in (IMAGES, sharded))
        assert len(devices) == 1 or len(split.sharding.device_set) == len(devices)
        np.testing.assert_allclose(whole, split, atol=1e-3)
        np.testing.assert_array_equal(whole, function(IMAGES, jax.random.key(0)))


def test_centre_is_the_middle():
    np.testing.assert_array_equal(views.centre(IMAGES, 12), IMAGES[:, 4:16, 8:20])
    np.testing.assert_array_equal(views.centre(IMAGES[..., 0], 20), IMAGES[:, :, 4:24, 0])
    with pytest.raises(IcmError, match="20 × 28 pixels holds no view of 24"):
        views.centre(IMAGES, 24)


def test_a_cut_is_a_window_of_the_very_pixels_or_its_mirror():
    images = RNG.integers(0, 256, (6, 9, 7, 3)).astype(np.uint8)
    cuts = np.asarray(views.cut(jnp.asarray(images), 5, key=jax.random.key(1)))
    places = set()
    for image, given in zip(images, cuts, strict=True):
        found = [
            (top, left, flip)
            for top, left, flip in np.ndindex(5, 3, 2)
            if (image[top : top + 5, left : left + 5][:, :: 1 - 2 * flip] == given).all()
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 3
    with pytest.raises(IcmError, match="holds no view of 8"):
        views.cut(jnp.asarray(images), 8, key=jax.random.key(1))


def test_views_of_coefficients_are_those_of_the_pixels():
    """Each is the inverse DCT of a crop at a multiple of 16, mirrored or not."""
    rng = np.random.default_rng(0)
    luma = rng.integers(-50, 50, (6, 8, 6, 64)).astype(np.int16)
    chroma = rng.integers(-50, 50, (6, 4, 3, 128)).astype(np.int16)
    given = jax.jit(lambda *planes, key: views.coefficients(*planes, 32, key=key))(
        luma, chroma, key=jax.random.key(0)
    )
    assert given[0].shape == (6, 4, 4, 64) and given[1].shape == (6, 2, 2, 128)
    found = set()
    for row in range(6):
        pixels, colours = samples(luma[row]), samples(chroma[row][..., 64:])
        own = samples(np.asarray(given[0][row])), samples(np.asarray(given[1][row])[..., 64:])
        for top in range(3):
            for left in range(2):
                part = pixels[16 * top :][:32, 16 * left :][:, :32]
                colour = colours[8 * top :][:16, 8 * left :][:, :16]
                for step in (1, -1):
                    if np.allclose(own[0], part[:, ::step], atol=1e-3):
                        np.testing.assert_allclose(own[1], colour[:, ::step], atol=1e-3)
                        found.add((row, top, left, step))
    assert len(found) == 6 and len({step for *_, step in found}) == 2
    centre = views.coefficients(luma, chroma, 32)
    np.testing.assert_array_equal(centre[0], luma[:, 2:6, 0:4])
    with pytest.raises(IcmError, match="no view of 80 pixels"):
        views.coefficients(luma, chroma, 80)


def samples(plane):
    """Pixels of int [h, w, 64] by SciPy's inverse DCT."""
    rows, columns, _ = plane.shape
    blocks = scipy.fft.idctn(plane.reshape(rows, columns, 8, 8).astype(float), axes=(2, 3))
    return blocks.transpose(0, 2, 1, 3).reshape(8 * rows, 8 * columns)


WIDE = {
    "contrastive": lambda size, key: views.contrastive(IMAGES, size, key=key),
    "mild": lambda size, key: views.mild(IMAGES, size, key=key)[0],
    "cut": lambda size, key: views.cut(jnp.asarray(IMAGES), size, key=key),
    "centre": lambda size, key: views.centre(IMAGES, size),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_size_is_a_number_or_height_and_width(name):
    key = jax.random.key(0)
    assert WIDE[name]((10, 20), key).shape == (4, 10, 20, 3)
    for one, both in ((10, (10, 10)), ((12,), 12)):
        np.testing.assert_array_equal(WIDE[name](one, key), WIDE[name](both, key))
    if name in ("cut", "centre"):
        with pytest.raises(IcmError, match="20 × 28 pixels holds no view of 10 × 30"):
            WIDE[name]((10, 30), key)


def test_wide_views_keep_what_they_show_in_proportion():
    """Of a canvas twice as wide as high, views twice as wide as high show such windows, and all of
    it when nothing is cropped."""
    keys = jax.random.split(jax.random.key(0), 500)
    shape, view = (40, 80), (16, 32)
    draw = lambda key: jnp.stack(views._random_window(key, shape, (0.3, 0.5), view)[:4])  # noqa: E731
    _, _, height, width = np.asarray(jax.vmap(draw)(keys)).T
    aspect = width / height
    assert 1.49 < aspect.min() < 1.6 and 2.5 < aspect.max() < 2.67
    whole = np.tile(np.arange(80, dtype=np.uint8), (1, 40, 1))
    images = np.repeat(whole[..., None], 3, -1)
    given, mask = views.mild(images, shape, whole, crop=(1.0, 1.0), key=jax.random.key(1))
    row = np.asarray(mask)[0, 0]
    assert (row == np.arange(80)).all() or (row == np.arange(80)[::-1]).all()
    np.testing.assert_allclose(given[0, ..., 0], mask[0], atol=1e-3)


def test_wide_views_of_coefficients_are_those_of_the_pixels():
    rng = np.random.default_rng(0)
    luma = rng.integers(-50, 50, (2, 4, 12, 64)).astype(np.int16)
    chroma = rng.integers(-50, 50, (2, 2, 6, 128)).astype(np.int16)
    pixels = np.stack([samples(plane) for plane in luma])
    given, _ = views.coefficients(luma, chroma, (16, 64), key=jax.random.key(0))
    other = views.aligned(np.repeat(pixels[..., None], 3, -1), (16, 64), key=jax.random.key(0))
    assert given.shape == (2, 2, 8, 64) and other.shape == (2, 16, 64, 3)
    for one, two in zip(np.asarray(given), np.asarray(other), strict=True):
        np.testing.assert_allclose(samples(one), two[..., 0], atol=1e-3)
