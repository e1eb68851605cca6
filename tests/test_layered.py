"""Codecs in layers that begin as a trained picture codec, and what of it they keep."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import BUILT, DETECTOR, LAYERS, SCALABLE, images, initial, small_codec

from icm_jax.codecs import CODECS, bitstream, layered_codec, model_file, refine
from icm_jax.codecs.codec import forward
from icm_jax.codecs.scalable import detected
from icm_jax.coding import container
from icm_jax.errors import IcmError
from icm_jax.nets.detector import Part
from icm_jax.report import latents
from icm_jax.tasks import build_task
from icm_jax.weights import start_from

LIKE = dict(LAYERS, checkered=2, levels=3)
"""As the small codec "space_channel" is built."""
KINDS = {
    "conditional": lambda **options: layered_codec(
        "conditional", (8, 6), (2, 3, 3), (2, 3, 3), 2, DETECTOR, **LIKE, **options
    ),
    "split": lambda: layered_codec("split", (8, 6), (2, 3), (3,), 1, DETECTOR, **LIKE),
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """(path of a picture codec's file, the codec in floats, its variables as they come back)."""
    frozen, path = small_codec("space_channel"), tmp_path_factory.mktemp("picture") / "a.icmc"
    model_file.save(path, frozen)
    return path, BUILT["space_channel"](), refine.floats(frozen)


def coded(codec, variables, batch, quality=0.3):
    given = {"image": batch, "quality": np.full(len(batch), quality, np.float32)}
    return jax.jit(lambda v: forward(codec, v, given, batch.shape[1:3]))(variables)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_begin_as_the_picture_codec_that_they_start_from(picture, kind, capsys):
    path, codec, variables = picture
    built, batch = KINDS[kind](), images(2, 64, 32, 3)
    started = start_from(jax.device_get(initial(built, batch)), "icmc", path)
    assert "which start at random" in capsys.readouterr().err
    expected, given = coded(codec, variables, batch), coded(built, started, batch)
    np.testing.assert_allclose(given.outputs["image"], expected.outputs["image"], atol=1e-3)
    for name in ("y0", "y1", "y2"):
        np.testing.assert_array_equal(given.latents[name], expected.latents[name])
        np.testing.assert_allclose(given.bits[name], expected.bits[name], rtol=1e-4)
    layers = {segment.name: segment.layer for segment in built.segments}
    if kind == "split":
        assert layers == {"z": 0, "y0": 0, "y1": 0, "y2": 1}
    else:  # the base is the same codec at a lower quality
        base = coded(codec, variables, batch, 0.15)
        np.testing.assert_array_equal(given.latents["b1"], base.latents["y1"])
        assert [layers[name] for name in ("z_b", "b0", "b2", "z_e", "y0", "y2")] == [0] * 3 + [
            1
        ] * 3


@pytest.mark.parametrize("name", ["space_channel", "mean_scale_hyperprior", "omni_feature"])
def test_networks_of_integers_come_back_as_floats(name):
    """What freezing makes of them is again what they were made of, within its rounding."""
    frozen = small_codec(name)
    variables, codec = refine.floats(frozen), (BUILT[name])()
    batch = images(1, 64, 64, 3)
    shape = batch.shape[1:3]
    quality = {"quality": np.full(1, 0.5, np.float32)} if codec.qualities else {}
    latents = jax.device_get(forward(codec, variables, {"image": batch} | quality, shape).latents)
    known = {name: np.ones_like(value) for name, value in latents.items()}
    for segment in codec.segments:
        if segment.thaw is None:
            continue
        seen = latents | {"known": known[segment.name]}
        size = latents[segment.name].shape
        real = segment.prior(variables, seen, size)
        whole = segment.exact(frozen.variables, seen, size)
        assert np.abs(np.asarray(real.index) - whole.index).max() <= 2
        if real.mean is not None:
            np.testing.assert_allclose(real.mean, whole.mean, atol=0.26)


def test_a_picture_that_is_kept_is_not_trained():
    fixed = ("layered/picture/analysis", "layered/picture/gain", "layered/picture/synthesis")
    config = dict(
        name="scalable_compression",
        codec=dict(name="layered", kind="conditional", widths=(8, 6), base=(2, 3), hypers=2),
        classes=2,
        detector=dict(name="yolov3", width=1 / 32, depth=0.1),
        lambdas=(0.001, 0.1),
        feature_weight=100.0,
        picture_weight=0.0,
        fixed=fixed,
        size=32,
        straight_through=True,
    )
    config["codec"].update(LAYERS, enhancement=(2, 3), levels=3)
    task, batch = build_task(ConfigDict(config)), {"image": images(2, 32, 32, 3)}
    variables = initial(SCALABLE["conditional"](), batch["image"])
    params = variables["params"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(own):
        given = dict(variables, params=dict(params, layered=own), constants=dict(task.constants))
        return task.loss(given, batch, jax.random.key(0), jnp.int32(0))

    (_, aux), gradients = loss(params["layered"])
    assert {"bpp_base", "bpp_enhancement", "distortion_f"} == set(aux.metrics)
    flat = flax.traverse_util.flatten_dict({"layered": gradients}, sep="/")
    still = {name for name, leaf in flat.items() if not np.abs(leaf).any()}
    assert still == {name for name in flat if name.startswith(fixed)}
    with pytest.raises(IcmError, match=r"task\.fixed has 'layered/nothing', where no"):
        wrong = build_task(ConfigDict(dict(config, fixed=("layered/nothing",))))
        wrong.loss(dict(variables, constants=dict(wrong.constants)), batch, jax.random.key(0), 0)
    with pytest.raises(IcmError, match="give one λ, and to a codec with qualities the two ends"):
        build_task(ConfigDict(dict(config, lambdas=(0.1,))))


def test_through_an_image_the_feature_begins_as_that_of_the_picture(picture):
    path, codec, variables = picture
    shown, batch = KINDS["conditional"](through="image"), images(2, 64, 32, 3)
    started = start_from(jax.device_get(initial(shown, batch)), "icmc", path)
    given = coded(shown, started, batch).outputs["feature"]
    base = coded(codec, variables, batch, 0.15).outputs["image"]
    expected = detected(started, Part(DETECTOR, end=DETECTOR.split), base / 255.0)
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_the_base_alone_gives_the_feature():
    own, batch = small_codec("conditional"), images(1, 40, 70, 3)
    (data,) = bitstream.encode(own, batch, quality=60)
    first = container.prefix(data, 1)
    whole, alone = (bitstream.decode(own, [d], "feature", layers=1) for d in (data, first))
    np.testing.assert_array_equal(whole, alone)
    assert alone.shape == (1, 8, 12, DETECTOR.feature.channels) and len(first) < len(data)


def test_the_report_counts_the_bits_of_layers_at_a_quality():
    """The fibres that it compares are of the slices that others tell of, costs those of coding."""
    own = small_codec("conditional")
    assert latents.layer_latents(own.codec) == ["b0", "y0"]
    inputs = {"image": images(2, 64, 32, 3), "quality": np.full(2, 0.5, np.float32)}
    _, costs = latents._costs(own, inputs)
    expected = jax.jit(lambda v: forward(own.codec, v, inputs, (64, 32)).bits)(own.on_device)
    for name, bits in expected.items():
        np.testing.assert_allclose(costs[name].sum(), bits[0], rtol=1e-3)


def test_means_begin_at_what_the_base_says():
    """Integers say what floats do, and of a network that says nothing the base is all there is."""
    own = small_codec("conditional")
    codec, variables = refine.thawed(own)
    segment = next(s for s in codec.segments if s.name == "y1")
    shape, rng = (2, 8, 8, 3), np.random.default_rng(0)
    decoded = {
        name: (rng.integers(-90, 90, (2, side, side, count)) / 16).astype(np.float32)
        for name, side, count in (("b0", 8, 2), ("b1", 8, 3), ("y0", 8, 2), ("z_e", 2, 5))
    }
    decoded["quality"] = np.array([0.1234, 1.0], np.float32)
    whole = own.codec.segments[[s.name for s in own.codec.segments].index("y1")]
    exact = whole.prior(own.on_device, decoded, shape).mean
    real = segment.prior(variables, decoded, shape).mean
    np.testing.assert_allclose(exact, real, atol=0.3)
    none = decoded | {"b1": np.zeros_like(decoded["b1"])}
    moved = real - segment.prior(variables, none, shape).mean
    params = variables["params"]["layered"]
    rows = [params[n]["gain"][k] for n, k in (("picture", "log_gain"), ("machine", "log_inverse"))]
    levels = np.arange(3.0)
    for row, quality in enumerate((0.1234, 1.0)):
        of_both = [
            np.exp([np.interp(2 * q, levels, channel) for channel in np.asarray(logs).T])
            for logs, q in zip(rows, (quality, 0.5 * quality), strict=True)
        ]
        expected = decoded["b1"][row] * (of_both[0] / of_both[1])[2:]
        np.testing.assert_allclose(moved[row], expected, rtol=0.01, atol=0.2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="sum"), "no layered codec 'sum'"),
        (dict(kind="conditional", hypers=1), ", 1 hyperpriors;"),
        (dict(share=0.0), "share 0.0"),
        (dict(base_blocks=(0, 99, 0)), "up to 16"),
        (dict(through="pixels"), "then feature or image"),
        (dict(ahead=True), "knows them ahead"),
        (dict(base=()), r"slices \(\) and"),
    ],
)
def test_layers_that_cannot_be_are_refused(change, message):
    fields = dict(kind="split", widths=(8, 6), base=(2,), enhancement=(3,), hypers=2)
    with pytest.raises(IcmError, match=message):
        CODECS["layered"](**(fields | change), detector=DETECTOR)
