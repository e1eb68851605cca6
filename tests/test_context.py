"""Context models in raster order: waves, whole files, what is not to be."""

import dataclasses

import jax
import numpy as np
import pytest
from small import RNG, images
from test_codecs import disturbed
from test_compressai import golden
from zoo import saved

import icm_jax
from icm_jax.codecs import bitstream, model_file, walk
from icm_jax.codecs.codec import forward
from icm_jax.codecs.compressai import SERIAL
from icm_jax.coding import container
from icm_jax.errors import IcmError
from icm_jax.nets import context
from icm_jax.ops import quantise
from icm_jax.weights import compressai

SIZES = ((80, 112), (77, 51))
"""Of images."""


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """{architecture: (checkpoint, frozen codec)}."""
    path, found = tmp_path_factory.mktemp("context") / "weights.safetensors", {}
    for name in SERIAL:
        state, expected = golden(name)
        checkpoint = compressai.read(saved(path, state))
        picture = expected["image"][None]
        found[name] = checkpoint, bitstream.freeze(checkpoint.codec, checkpoint.variables, picture)
    return found


def raster(state, y, once):
    """y_hat [h, w, M] position by position, by CompressAI's weights and rules, in float64."""
    weights = {name: np.float64(value) for name, value in state.items()}
    kernel = weights["context_prediction.weight"] * weights["context_prediction.mask"]
    height, width, channels = y.shape
    wide = np.zeros((height + 4, width + 4, channels))
    for row, column in np.ndindex(height, width):
        seen = wide[row : row + 5, column : column + 5]
        told = np.einsum("ocij,ijc->o", kernel, seen) + weights["context_prediction.bias"]
        told = np.concatenate([once[row, column], told])
        for layer in (0, 2, 4):
            told = np.where(told < 0, 0.01 * told, told) if layer else told
            name = f"entropy_parameters.{layer}"
            told = weights[f"{name}.weight"][:, :, 0, 0] @ told + weights[f"{name}.bias"]
        mean = told[channels:]
        wide[row + 2, column + 2] = np.rint(y[row, column] - mean) + mean
    return wide[2:-2, 2:-2]


@pytest.mark.parametrize("sides", [(5, 7), (1, 4), (6, 1), (3, 2)])
def test_waves_give_what_raster_order_gives(codecs, sides):
    y, once = RNG.normal(0, 4, (*sides, 12)), RNG.normal(0, 1, (*sides, 24))
    checkpoint, _ = codecs["mbt2018"]
    prior = checkpoint.codec.segments[1].prior

    def decided(latent, once, seen):
        return quantise(latent, prior.each(checkpoint.variables, once, seen).mean)

    given = np.float32(y)[None], np.float32(once)[None]
    found = jax.jit(lambda *given: context.in_waves(*given, decided))(*given)
    np.testing.assert_allclose(found[0], raster(golden("mbt2018")[0], y, once), atol=1e-4)


def test_every_position_is_in_one_wave_after_those_that_it_sees():
    for height, width in ((1, 1), (5, 7), (4, 2), (2, 9)):
        number, lengths = np.full((height, width), -1), []
        for turn in range(context.waves(height, width)):
            rows, columns = context.wave(turn, height, width)
            assert (number[rows, columns] == -1).all()
            number[rows, columns] = turn
            lengths.append(len(rows))
        assert number.min() == 0 and max(lengths) == context.longest(height, width)
        for row, column in np.ndindex(height, width):
            above = number[max(row - 2, 0) : row, max(column - 2, 0) : column + 3]
            beside = number[row, max(column - 2, 0) : column]
            assert max([-1, *above.ravel(), *beside]) < number[row, column]


@pytest.mark.parametrize("name", SERIAL)
def test_files_decode_to_the_latents_of_forward(codecs, name):
    _, frozen = codecs[name]
    other = disturbed(frozen)
    for number, sides in enumerate(SIZES):
        image = images(1, *sides, 3)
        (data,) = bitstream.encode(frozen, image)
        assert [len(layer.strings) for layer in container.unpack(data).layers] == [2]
        latents = bitstream.decode_latents(frozen, data).latents
        with jax.default_matmul_precision("bfloat16"):
            given = bitstream.decode_latents(other, data).latents
        for latent in "zy":
            np.testing.assert_array_equal(given[latent], latents[latent])
        assert np.any(latents["y"] % 1) and not np.any(latents["y"] * 16 % 1)
        bits = bitstream.estimate(frozen, image, windows=((128, 128),))
        assert abs(sum(map(np.sum, bits.values())) / 8 / (len(data) - 24) - 1) < 0.2
        if number == 0:  # a program of all waves
            whole = walk.sample(frozen.codec, frozen.on_device, {"image": image})
            for latent in "zy":
                np.testing.assert_array_equal(whole[latent], latents[latent])
        assert frozen.decompress(data).shape == (*sides, 3)


def test_images_that_take_several_windows_are_coded_alike(codecs):
    _, frozen = codecs["mbt2018"]
    image = images(1, 130, 300, 3)
    streams = [bitstream.encode(frozen, image, windows=w)[0] for w in ((), ((128, 128),))]
    assert streams[0] == streams[1]


def test_altered_files_are_errors(codecs):
    _, frozen = codecs["mbt2018"]
    (data,) = bitstream.encode(frozen, images(1, *SIZES[0], 3))
    stream = container.unpack(data)
    (layer,) = stream.layers
    z, y = layer.strings
    for altered in (
        y[:-3],
        y + b"\1\2",
        y[:9] + bytes([y[9] ^ 64]) + y[10:],
        RNG.bytes(len(y)),
        b"",
    ):
        forged = container.pack(stream.header, [([z, altered], 0)])  # whole but for its symbols
        with pytest.raises(IcmError, match=r"truncated, altered|did not decode to the latents"):
            bitstream.decode_latents(frozen, forged)
    for at in range(0, len(data), 29):
        with pytest.raises(IcmError):
            bitstream.decode_latents(frozen, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(IcmError, match="cannot be refined: it has a context model"):
        bitstream.encode(frozen, images(1, 64, 64, 3), effort=1)


@pytest.mark.parametrize("name", SERIAL)
def test_model_files_come_back_whole(codecs, tmp_path, name):
    _, frozen = codecs[name]
    path, image = tmp_path / "codec.icmc", images(1, 64, 64, 3)
    path.write_bytes(model_file.packed(frozen))
    again = icm_jax.load(path)
    assert again.fingerprint == frozen.fingerprint
    assert bitstream.encode(again, image) == bitstream.encode(frozen, image)
    arrays = frozen.variables["integer"]["y"]
    short = {**arrays["context"], "kernel": arrays["context"]["kernel"][:, :, 1:]}
    integers = {**frozen.variables["integer"], "y": {**arrays, "context": short}}
    other = dataclasses.replace(frozen, variables={**frozen.variables, "integer": integers})
    path.write_bytes(model_file.packed(other))
    with pytest.raises(IcmError, match="integer/y/context/kernel"):
        icm_jax.load(path)


def test_noise_and_gradients_have_shapes(codecs):
    """In training all positions are computed at once."""
    codec, variables = codecs["mbt2018"][0].codec, codecs["mbt2018"][0].variables
    inputs, key = {"image": images(1, 64, 64, 3)}, jax.random.key(0)

    def cost(variables):
        found = forward(codec, variables, inputs, (64, 64), key=key, straight_through=True)
        return sum(bits.sum() for bits in found.bits.values()) + found.outputs["image"].sum()

    shapes = jax.eval_shape(jax.grad(cost), variables)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, variables)
