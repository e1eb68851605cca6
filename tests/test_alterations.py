"""Altered image files: an error or the right image, whatever was done to them."""

import numpy as np
import pytest
from small import images, small_codec

from icm_jax.coding import container
from icm_jax.errors import IcmError


@pytest.fixture(scope="module")
def file_and_codec():
    """A colour image of 40 × 56 pixels in a file, and the codec that wrote it."""
    frozen = small_codec("mean_scale_hyperprior")
    return frozen.compress(images(40, 56, 3), 80), frozen


def survives(frozen, data, altered):
    """Whether an altered file gives an error or, in spite of it, the very image."""
    try:
        given = frozen.decompress(altered)
    except IcmError:
        return True
    return altered == data or bool((given == frozen.decompress(data)).all())


def test_every_bit_of_a_file_is_guarded(file_and_codec):
    data, frozen = file_and_codec
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        assert survives(frozen, data, bytes(altered)), bit


def test_twenty_thousand_alterations_give_an_error_or_the_image(file_and_codec):
    """Flips, truncations, splices and runs of zeros, drawn from a fixed seed."""
    data, frozen = file_and_codec
    rng = np.random.default_rng(11)
    for number in range(20_000):
        altered = bytearray(data)
        at, length = rng.integers(0, len(data)), int(rng.geometric(0.1))
        if number % 4 == 0:
            for place in rng.integers(0, 8 * len(data), length):
                altered[place // 8] ^= 1 << place % 8
        elif number % 4 == 1:
            altered = altered[:at]
        elif number % 4 == 2:
            source = rng.integers(0, len(data))
            altered[at : at + length] = data[source : source + int(rng.geometric(0.1))]
        else:
            altered[at : at + length] = bytes(len(altered[at : at + length]))
        assert survives(frozen, data, bytes(altered)), number


def test_a_forged_size_takes_no_memory(file_and_codec):
    data, frozen = file_and_codec
    stream = container.unpack(data)
    header = stream.header._replace(shape=((1 << 21) - 1,) * 2)
    forged = container.pack(header, [(layer.strings, 0) for layer in stream.layers])
    with pytest.raises(IcmError, match="an image of 2097151"):
        frozen.decompress(forged)
