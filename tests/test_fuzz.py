"""A thousand files as an attacker writes them, checksums and fingerprints valid: an error or an
image. The hundred thousand of benchmarks/fuzz.py are drawn from the same generators."""

import tracemalloc

import forge
import numpy as np
import pytest
from small import images, small_codec

from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.coding import archive, container
from icm_jax.errors import IcmError

NAME = "mean_scale_hyperprior"
LEAST = 24 << 20
"""Bytes: what no file of this small codec may allocate, be it read or refused."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """(frozen codec, its file, a stream of it)."""
    frozen, path = small_codec(NAME), tmp_path_factory.mktemp("fuzz") / "codec.icmc"
    model_file.save(path, frozen)
    return frozen, path.read_bytes(), container.unpack(frozen.compress(images(40, 56, 3), 60))


def image_or_error(frozen, data) -> bool:
    """Whether a file gives an image, of the size that it says."""
    try:
        image = frozen.decompress(data)
    except IcmError:
        return False
    header = container.unpack(data).header
    assert image.dtype == np.uint8 and image.shape[:2] == header.shape
    return True


def test_six_hundred_forged_images_give_an_error_or_an_image(subject, monkeypatch):
    frozen, _, whole = subject
    monkeypatch.setattr(bitstream, "MAX_PIXELS", 1 << 14)  # what is claimed is not to be computed
    found = []
    for number in range(600):
        rng = np.random.default_rng((7, number))
        if number % 4:
            data = forge.forged_stream(rng, frozen, whole)
        else:
            sides = tuple(int(side) for side in rng.choice(forge.SIDES[:6], 2))
            data = forge.forged_symbols(rng, frozen, sides, int(rng.integers(10_001)))
        found.append(image_or_error(frozen, data))
    assert 100 < sum(found) < 500


def test_four_hundred_forged_models_give_an_error_or_a_codec(subject, tmp_path):
    """And none takes memory that the codec does not need."""
    _, data, whole = subject
    path, loaded = tmp_path / "forged.icmc", 0
    for number in range(400):
        path.write_bytes(forge.forged_model(np.random.default_rng((8, number)), data, ("z", "y")))
        if not number % 5:  # it takes three times as long
            tracemalloc.start()
        try:
            archive.describe(path)
        except IcmError as error:
            assert "forged.icmc" in str(error)
        try:
            given = model_file.load(path, CODECS)
        except IcmError as error:
            assert "forged.icmc" in str(error)
            continue
        finally:
            assert tracemalloc.get_traced_memory()[1] < LEAST, number
            tracemalloc.stop()
        loaded += 1
        if given.codec.config == subject[0].codec.config:  # others would be compiled anew
            layers = [layer.strings for layer in whole.layers]
            sides, steps = whole.header.shape, whole.header.quality
            head = forge.head(given.fingerprint, sides, steps, layers)
            empty = [np.zeros(0, "<i4")] * len(layers)
            image_or_error(given, forge.sealed(given, forge.stream(head, layers, empty)))
    assert 50 < loaded < 350
