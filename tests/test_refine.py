"""Latents that are refined while encoding: cheaper, for the eye or for a detector, and decoded as
any others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import DETECTOR, small_codec

from icm_jax import ops
from icm_jax.codecs import bitstream, refine, walk
from icm_jax.coding import container
from icm_jax.errors import IcmError
from icm_jax.measure import aimed, coded
from icm_jax.nets.detector import Part

STEPS = 12
SMALL = ((128, 192),)
"""The only size of windows, so that the picture takes several."""


@pytest.fixture(scope="module")
def frozen():
    return small_codec("space_channel")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(refine, "STEPS", (0, STEPS, STEPS, STEPS))


def picture(height=100, width=150):
    """Smooth, so that the few steps have something to find."""
    rows, columns = np.mgrid[:height, :width] / 40.0
    waves = np.stack([np.sin(rows + columns), np.cos(rows), np.sin(2 * columns)], axis=-1)
    return (127 + 90 * waves).astype(np.uint8)


def cost(frozen, data, image, price):
    error = np.square(frozen.decompress(data).astype(float) - image).sum()
    return 8 * len(data) + price * error


def test_a_refined_file_costs_less_and_decodes_as_any_other(frozen, few):
    image, condition = picture(), {"quality": np.full(1, 0.6, np.float32)}
    plain, refined = (frozen.compress(image, 60, effort) for effort in (0, 1))
    assert refined != plain
    price = refine._price(frozen, image[None], condition, SMALL)
    assert cost(frozen, refined, image, price) < cost(frozen, plain, image, price)
    assert frozen.compress(image, 60, 1) == refined
    latents = bitstream.decode_latents(frozen, refined).latents
    assert all(np.isfinite(value).all() for value in latents.values())


def test_windows_join_to_a_whole(frozen):
    """Each latent is there once, whatever the windows, and costs no more than before."""
    image, condition = picture(150, 400), {"quality": np.full(1, 0.6, np.float32)}
    given = walk.analyse(frozen.codec, frozen.on_device, image[None], condition, SMALL)
    found = refine.refined(frozen, image[None], given, condition, STEPS, None, SMALL)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in given.items()
    }
    assert any((found[name] != given[name]).any() for name in given)


def test_without_gain_latents_stay(frozen, monkeypatch):
    monkeypatch.setattr(refine, "_RATE", 1e3)  # steps that ruin everything
    image, condition = picture(), {"quality": np.full(1, 0.6, np.float32)}
    given = walk.analyse(frozen.codec, frozen.on_device, image[None], condition)
    found = refine.refined(frozen, image[None], given, condition, STEPS)
    for name, value in given.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_file_for_a_detector_costs_less_by_its_outputs(frozen, monkeypatch):
    monkeypatch.setattr(refine, "STEPS", (0, 4 * STEPS))
    monkeypatch.setattr(refine, "_RATE", 0.1)  # weights are random, and say little
    image, canvas = picture(96, 128), (128, 128)
    part = Part(DETECTOR)
    variables = jax.jit(lambda: part.init(jax.random.key(3), jnp.zeros((1, *canvas, 3)), False))()
    aim = aimed.at_detector(DETECTOR, variables, image, canvas, 60)
    aim = aim._replace(variables=aim.variables | {"price": np.float32(1e6)})
    files = [frozen.compress(image, 60, effort, aim) for effort in (0, 1)]
    shown = [frozen.decompress(data)[None].astype(np.float32) for data in files]
    flaws = [float(aim.cost(aim.variables, given)) for given in shown]
    before, after = (8 * len(data) + flaw for data, flaw in zip(files, flaws, strict=True))
    assert files[0] != files[1] and after < before
    assert float(aim.cost(aim.variables, image[None].astype(np.float32))) < 1e-3 * flaws[0]


def test_a_base_is_refined_for_its_detector_and_a_picture_leaves_it(monkeypatch):
    """Each output's latents alone change, and the base's file costs less by the tail's outputs."""
    monkeypatch.setattr(refine, "STEPS", (0, 2 * STEPS))
    monkeypatch.setattr(refine, "_RATE", 0.1)
    layered, image = small_codec("conditional"), picture(60, 90)
    aim = aimed.at_own(layered)(image, 60)
    aim = aim._replace(variables=aim.variables | {"price": np.float32(1e6)})
    ways = dict(plain=(), machine=(1, aim), eye=(1,))
    files = {name: layered.compress(image, 60, *way) for name, way in ways.items()}
    latents = {n: bitstream.decode_latents(layered, data).latents for n, data in files.items()}
    base, own = ("b0", "b1"), ("y0", "y1")
    for changed, kept, name in ((base, own, "machine"), (own, base, "eye")):
        for n in kept:  # up to their rounding: the means of "own" hang on "base"
            np.testing.assert_allclose(latents[name][n], latents["plain"][n], atol=1)
        assert any((latents[name][n] != latents["plain"][n]).any() for n in changed)
    costs = {}
    for name in ("plain", "machine"):
        first = container.prefix(files[name], 1)
        feature = bitstream.decode(layered, [first], "feature", layers=1)
        costs[name] = 8 * len(first) + float(aim.cost(aim.variables, feature))
    assert costs["machine"] < costs["plain"]


def test_streams_of_a_batch_have_each_its_aim(monkeypatch):
    asked = []

    def refined(frozen, image, latents, condition, steps, aim, windows):
        asked.append((steps, aim))
        return latents

    monkeypatch.setattr(refine, "refined", refined)
    aims = [refine.Aim(lambda *_: jnp.float32(0), number, "feature") for number in range(2)]
    batch = np.stack([picture(64, 64), picture(64, 64)[::-1]])
    layered = small_codec("conditional")
    how = dict(output="feature", quality=60, layers=1)
    _, plain = coded.through_stream(layered, batch, **how)
    _, sizes = coded.through_stream(layered, batch, **how, effort=2, aims=aims)
    assert asked == [(refine.STEPS[2], aim) for aim in aims]
    for size, before in zip(sizes, plain, strict=True):  # no estimate is of refined latents
        assert before.keys() - size.keys() == {"bpp_estimated"} and size["bpp"] == before["bpp"]


def test_rounding_by_chance_ends_as_rounding_and_is_fair():
    x = jnp.linspace(-3.4, 3.4, 2001)
    keys = jax.random.split(jax.random.key(0), 200)
    cold = ops.rounded_by_chance(x, keys[0], jnp.float32(1e-3))
    far = np.abs(np.asarray(x) - np.floor(x) - 0.5) > 0.01
    np.testing.assert_allclose(cold[far], np.rint(x)[far], atol=1e-4)
    warm = jax.vmap(lambda key: ops.rounded_by_chance(jnp.full(500, 0.5), key, 0.3))(keys)
    assert abs(float(warm.mean()) - 0.5) < 0.01 and 0 <= float(warm.min()) < float(warm.max()) <= 1
    with_mean = ops.quantise(x, jnp.full_like(x, 0.3), key=keys[0], temperature=jnp.float32(1e-3))
    off = with_mean - 0.3 - jnp.round(with_mean - 0.3)
    assert float(jnp.median(jnp.abs(off))) < 1e-4


def test_efforts_and_models_that_cannot_be_are_refused(frozen):
    with pytest.raises(IcmError, match="an effort is one of 0 to 3, not 7"):
        frozen.compress(picture(), 60, 7)
    with pytest.raises(IcmError, match="this model has one rate"):
        small_codec("layered_split").compress(picture(), effort=1)
