"""Codecs: round trips at any size, rates, qualities, layers, windows; one test for all kinds."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
    BUILT,
    FEATURE,
    RNG,
    SCALABLE,
    STRANGERS,
    encoded,
    images,
    initial,
    quality_of,
    small_codec,
)

from icm_jax.codecs import bitstream, codec, feature_codec, filter_codec
from icm_jax.codecs.hyperprior import Gain
from icm_jax.coding import container
from icm_jax.errors import IcmError

CODERS = ["native"]
if importlib.util.find_spec("tensorflow_compression_ops"):
    CODERS.append("tfc")


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 64)])
def test_decoding_equals_test_mode_at_any_size(frozen, size, coder):
    batch = images(2, *size, 3)
    quality, condition = quality_of(frozen.codec)
    streams = bitstream.encode(frozen, batch, coder, quality=quality)
    result = codec.forward(frozen.codec, frozen.on_device, {"image": batch} | condition, size)
    for row, stream in enumerate(streams):
        latents, header = bitstream.decode_latents(frozen, stream, coder)
        assert header.shape == size
        for name, expected in result.latents.items():
            np.testing.assert_allclose(latents[name][0], expected[row], atol=1e-3)
    for output in frozen.codec.outputs:
        decoded = bitstream.decode(frozen, streams, output, coder)
        scale, channels = (8, 3) if frozen.codec.config[0] == "autoencoder" else (4, 8)
        small = tuple(-(-side // scale) for side in size)
        assert decoded.shape == ((2, *small, channels) if output == "feature" else batch.shape)
        np.testing.assert_allclose(decoded, result.outputs[output], rtol=1e-3, atol=1e-2)
    assert bitstream.encode(frozen, batch, "native", quality=quality) == streams


def test_every_altered_byte_is_an_error(frozen):
    stream = encoded(frozen, images(1, 16, 16, 3))[0]
    output = next(iter(frozen.codec.outputs))
    for at in range(0, len(stream), 3):
        altered = stream[:at] + bytes([stream[at] ^ 1]) + stream[at + 1 :]
        with pytest.raises(IcmError):
            bitstream.decode(frozen, [altered], output)


def test_latents_that_decode_differently_are_an_error(frozen):
    stream = container.unpack(encoded(frozen, images(1, 16, 16, 3))[0])
    other = container.pack(stream.header, [(stream.layers[0].strings, 0)])
    with pytest.raises(IcmError, match="did not decode to the latents"):
        bitstream.decode(frozen, [other], next(iter(frozen.codec.outputs)))


def test_only_frozen_codecs_write_and_only_their_own_read(frozen):
    with pytest.raises(IcmError, match="freeze"):
        bitstream.encode(frozen.codec, images(1, 8, 8, 3))
    if "integer" in frozen.variables:
        with pytest.raises(IcmError, match="frozen already"):
            bitstream.freeze(frozen.codec, frozen.variables, images(2, 32, 32, 3))
    changed = jax.tree.map(lambda x: x + 1 if x.dtype.kind == "f" else x, frozen.variables)
    other = bitstream.FrozenCodec(frozen.codec, changed, frozen.tables)
    with pytest.raises(IcmError, match="decode with the model that wrote it"):
        streams = encoded(frozen, images(1, 8, 8, 3))
        bitstream.decode(other, streams, next(iter(frozen.codec.outputs)))
    with pytest.raises(IcmError, match="no output"):
        bitstream.decode(frozen, [], "picture")
    with pytest.raises(IcmError, match="uint8"):
        bitstream.encode(frozen, np.zeros((1, 8, 8, 3), np.float32))


def disturbed(frozen):
    """The codec with noise on every weight that is a float, and the fingerprint that it had: far
    more than another machine's arithmetic does to what such weights compute."""

    def noisy(x):
        moved = x * RNG.normal(1, 0.01, x.shape) + RNG.normal(0, 0.01, x.shape)
        return moved.astype(x.dtype) if x.dtype.kind == "f" else x

    other = dataclasses.replace(frozen, variables=jax.tree.map(noisy, frozen.variables))
    vars(other)["fingerprint"] = frozen.fingerprint
    return other


@pytest.mark.parametrize("name", [*BUILT, *STRANGERS, *SCALABLE])
def test_no_float_has_a_say_in_what_is_coded(name):
    """Given latents are the same bytes, and bytes the same latents, under other floats."""
    frozen, shape = small_codec(name), (50, 70)
    latents = {
        segment.name: RNG.integers(0, 6, (1, *segment.shape(*shape))).astype(np.float32)
        for segment in frozen.codec.segments
    }
    told = frozen.codec._replace(analyse=lambda variables, inputs: latents, tiling=None)
    model = dataclasses.replace(frozen, codec=told)
    other = disturbed(model)
    streams = [encoded(one, images(1, *shape, 3))[0] for one in (model, other)]
    assert streams[0] == streams[1]
    given = [bitstream.decode_latents(one, streams[0]).latents for one in (model, other)]
    for segment in frozen.codec.segments:
        np.testing.assert_array_equal(given[0][segment.name], given[1][segment.name])
        assert np.abs(given[0][segment.name] - latents[segment.name]).max() <= 0.5
    output = next(iter(frozen.codec.outputs))
    outputs = [bitstream.decode(one, streams[:1], output) for one in (model, other)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3  # which may be other ones


def test_rows_that_floats_choose_do_not_survive_other_floats():
    """What the test before would see of a codec whose entropy network is one of floats."""
    built, batch = STRANGERS["checkerboard"](), images(1, 64, 80, 3)
    variables = initial(built, batch)
    tables = bitstream.freeze(built, variables, batch).tables
    segments = tuple(segment._replace(exact=None) for segment in built.segments)
    floats = built._replace(segments=segments)
    model = bitstream.FrozenCodec(floats, jax.device_get(variables), tables)
    (stream,) = encoded(model, batch)
    bitstream.decode_latents(model, stream)
    with pytest.raises(IcmError, match=r"did not decode to the latents|cannot decode"):
        bitstream.decode_latents(disturbed(model), stream)


def test_latents_that_are_not_finite_are_refused(frozen):
    params = jax.tree.map(lambda x: x * np.nan, frozen.variables["params"])
    other = bitstream.FrozenCodec(
        frozen.codec, dict(frozen.variables, params=params), frozen.tables
    )
    with pytest.raises(IcmError, match="not finite"):
        encoded(other, images(1, 8, 8, 3))


def test_a_layer_decodes_without_the_next():
    built = BUILT["mean_scale_hyperprior"]()
    z, y = built.segments
    built = built._replace(segments=(z, y._replace(layer=1)))
    variables = jax.jit(built.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.uint8))
    frozen = bitstream.freeze(built, variables, images(2, 32, 32, 3))
    data = encoded(frozen, images(1, 40, 24, 3))[0]
    cut = data[: -len(container.unpack(data).layers[1].strings[0])]
    whole = bitstream.decode_latents(frozen, data).latents
    first = bitstream.decode_latents(frozen, cut, layers=1).latents
    np.testing.assert_array_equal(first["z"], whole["z"])
    assert "y" not in first and bitstream.decode(frozen, [data], "image").shape == (1, 40, 24, 3)
    with pytest.raises(IcmError, match="needs the latent 'y', which is in a later layer"):
        bitstream.decode(frozen, [data], "image", layers=1)
    with pytest.raises(IcmError, match="the first 1 is whole"):
        bitstream.decode(frozen, [cut], "image")


def test_passes_see_what_was_decoded_before_and_nothing_else():
    """Of two passes: the first knows nothing of y, the second all black squares and no white."""
    frozen = small_codec("checkerboard")
    batch = images(1, 64, 80, 3)
    given = bitstream.decode_latents(frozen, encoded(frozen, batch)[0]).latents
    segment, shape = frozen.codec.segments[1], given["y"].shape
    black, white = codec.pass_masks(segment, shape)
    assert (black ^ white).all() and black[0, 0].all() and not black[0, 1].any()

    def rows(known, change=0.0):
        values = (given["y"] + change) * known[None]
        prior = segment.prior(frozen.on_device, codec.seen(segment, given, values, known), shape)
        return np.asarray(prior.index), np.asarray(prior.mean)

    nothing, blacks = np.zeros_like(black), black
    first, second, other = rows(nothing), rows(blacks), rows(blacks, 8.0)
    assert (first[1] != second[1])[:, white].any() and (second[1] != other[1])[:, white].any()
    stream = container.unpack(encoded(frozen, batch)[0])
    assert [len(layer.strings) for layer in stream.layers] == [3]  # z, and two of y
    estimate = bitstream.estimate(frozen, batch, quality=quality_of(frozen.codec)[0])
    assert abs(8 * len(stream.layers[0].strings[0]) - estimate["z"][0]) < 64
    written = 8 * sum(map(len, stream.layers[0].strings[1:]))
    assert abs(written - estimate["y"][0]) < 0.02 * estimate["y"][0] + 64


@pytest.mark.parametrize("wrong", [np.zeros((3, 3, 5)), np.full((3, 3, 5), -1), np.zeros(5, int)])
def test_passes_that_are_no_numbers_of_each_element_are_refused(wrong):
    y = small_codec("checkerboard").codec.segments[1]._replace(passes=lambda shape: wrong)
    with pytest.raises(IcmError, match="passes of latent 'y' are"):
        codec.pass_masks(y, (1, 3, 3, 5))


def test_written_bytes_match_the_estimate():
    """Latents drawn from the model itself: 1 % + 32 bytes, side information included."""
    built = feature_codec(**FEATURE)
    variables = jax.jit(built.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.uint8))
    params = jax.tree.map(jnp.copy, variables["params"])
    last = params["feature_codec"]["analysis"]["Down_1"]
    last["kernel"] = last["kernel"] * 0.05  # scales near the table's middle, as after training
    batch = images(3, 96, 128, 3)
    frozen = bitstream.freeze(built, {**variables, "params": params}, batch)
    for row, stream in enumerate(bitstream.encode(frozen, batch)):
        bits = sum(float(v[row]) for v in bitstream.estimate(frozen, batch).values())
        assert abs(len(stream) - bits / 8) <= 0.01 * bits / 8 + 32


def test_grey_images_come_back_grey_from_the_header(frozen):
    grey = images(1, 20, 12)
    (stream,) = encoded(frozen, grey)
    (same,) = encoded(frozen, np.repeat(grey[..., None], 3, axis=-1))
    given, colour = (bitstream.decode_latents(frozen, data) for data in (stream, same))
    assert given.header.grey and not colour.header.grey
    for name, latent in given.latents.items():
        np.testing.assert_array_equal(latent, colour.latents[name])


def test_a_quality_is_asked_for_where_there_are_qualities():
    batch = images(1, 40, 24, 3)
    one, many = BUILT["scale_hyperprior"](), BUILT["mean_scale_hyperprior"]()
    one, many = (
        bitstream.freeze(built, jax.jit(built.init)(jax.random.key(1), batch), batch)
        for built in (one, many)
    )
    with pytest.raises(IcmError, match="one rate"):
        bitstream.encode(one, batch, quality=50)
    for wrong in (None, -0.1, 100.1, float("nan")):
        with pytest.raises(IcmError, match="a number from 0 to 100"):
            bitstream.encode(many, batch, quality=wrong)
    bits = [sum(bitstream.estimate(many, batch, quality=q).values())[0] for q in (0, 25.5, 100)]
    assert bits == sorted(bits) and bits[0] < bits[-1]
    header = bitstream.decode_latents(many, bitstream.encode(many, batch, quality=25.5)[0]).header
    assert header.quality == 2550


def test_gain_interpolates_logarithms():
    gain = Gain(levels=3, channels=1)
    y = jnp.ones((3, 1, 1, 1))
    rows = {"log_gain": jnp.log(jnp.array([[1.0], [4.0], [9.0]])), "log_inverse": jnp.zeros((3, 1))}
    given = gain.apply({"params": rows}, y, jnp.array([0.25, 0.5, 0.875]))
    expected = [2.0, 4.0, np.exp(np.log(4) * 0.25 + np.log(9) * 0.75)]
    np.testing.assert_allclose(given.ravel(), expected, rtol=1e-6)


def test_filter_of_half_precision_is_near_the_exact_one():
    exact, fast = (filter_codec("18", 8, 6, (4, 8, 8), dtype) for dtype in ("float32", "bfloat16"))
    batch = images(2, 32, 32, 3)
    variables = jax.jit(exact.init)(jax.random.key(1), batch)
    for name, decoded in (("y", None), ("feature", exact.analyse(variables, {"image": batch}))):
        given, expected = (
            one.analyse(variables, {"image": batch})["y"]
            if name == "y"
            else one.outputs["feature"](variables, decoded, (32, 32))
            for one in (fast, exact)
        )
        assert given.dtype == jnp.float32
        error = np.abs(given - expected).mean() / np.abs(expected).mean()
        assert 0 < error < 0.02


def test_training_mode_gives_noise_and_gradients():
    built = filter_codec("18", 8, 6, (4, 8, 8))
    batch = images(2, 32, 32, 3)
    variables = jax.jit(built.init)(jax.random.key(1), batch)
    # Off the initial values: there the last convolution of a residual block is zero, and with it
    # the gradient of the others.
    variables["params"] = jax.tree.map(lambda leaf: leaf + 0.05, variables["params"])

    @jax.jit
    def rate(params, key):
        result = codec.forward(
            built, {**variables, "params": params}, {"image": batch}, (32, 32), key=key
        )
        return result.bits["y"].sum(), result.latents["y"]

    (_, one), gradient = jax.value_and_grad(rate, has_aux=True)(
        variables["params"], jax.random.key(0)
    )
    _, other = rate(variables["params"], jax.random.key(1))
    assert 0 < np.abs(one - other).max() <= 1.0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["filter"]["encoder"]))
    quiet = codec.forward(built, variables, {"image": batch}, (32, 32)).latents["y"]
    np.testing.assert_array_equal(quiet, np.round(quiet))
