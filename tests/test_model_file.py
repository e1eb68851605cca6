"""Codec files: every bit comes back, damage is named, half precision saves what it promises."""

import io
import zipfile

import jax
import numpy as np
import pytest
from small import encoded, images
from strangers.codec import checkerboard_codec
from strangers.feature_codec import plain_codec

import icm_jax
from icm_jax.codecs import CODECS as OURS
from icm_jax.codecs import bitstream, image_codec, model_file
from icm_jax.coding import archive
from icm_jax.errors import IcmError

CODECS = OURS | {"checkerboard": checkerboard_codec, "plain_feature": plain_codec}


def test_saving_and_loading_keeps_every_bit(frozen, tmp_path):
    path = tmp_path / "codec.icmc"
    model_file.save(path, frozen)
    loaded = model_file.load(path, CODECS)
    assert loaded.fingerprint == frozen.fingerprint
    batch = images(1, 9, 12, 3)
    assert encoded(loaded, batch) == encoded(frozen, batch)
    assert [p.name for p in tmp_path.iterdir()] == ["codec.icmc"]
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(IcmError, match=r"codec\.icmc"):
            model_file.load(path, CODECS)
    path.write_bytes(b"{}")
    with pytest.raises(IcmError, match=r"codec\.icmc is not a readable codec file.*no archive"):
        model_file.load(path, CODECS)
    with pytest.raises(IcmError, match="absent"):
        model_file.load(tmp_path / "absent", CODECS)


def test_an_altered_byte_is_named_or_changes_nothing(frozen, tmp_path):
    """Archives hold bits that nothing depends on, such as dates; all others are checked."""
    path = tmp_path / "codec.icmc"
    model_file.save(path, frozen, licence="CC0")
    data, about = path.read_bytes(), archive.describe(path)

    def refused(place):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        try:
            loaded = model_file.load(path, CODECS)
        except IcmError as error:
            assert "codec.icmc" in str(error)
            return True
        assert loaded.fingerprint == frozen.fingerprint
        assert archive.describe(path) == about
        return False

    with zipfile.ZipFile(io.BytesIO(data)) as stored:
        entry = max(stored.infolist(), key=lambda entry: entry.compress_size)
    middle = entry.header_offset + entry.compress_size // 2
    assert sum(refused(middle + k) for k in range(8)) >= 7  # between blocks zlib leaves bits unused
    for place in range(0, len(data), len(data) // 40):
        refused(place)


def test_a_package_without_a_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "BOXED", tmp_path / "photo.icmc")
    with pytest.raises(IcmError, match="no model in the package; train one"):
        icm_jax.load()


def test_a_codec_file_says_what_it_is(frozen, tmp_path, monkeypatch):
    path = tmp_path / "codec.icmc"
    model_file.save(path, frozen, licence="CC0", description="for tests")
    about = archive.describe(path)
    assert (about["licence"], about["description"]) == ("CC0", "for tests")
    assert about["fingerprint"] == frozen.fingerprint.hex()
    monkeypatch.setattr(archive, "VERSION", 2)
    with pytest.raises(IcmError, match="of version 1, this icm_jax reads version 2"):
        model_file.load(path, CODECS)


def test_a_codec_without_a_builder_is_named(frozen, tmp_path):
    """As of a file whose codec stands outside of the package; it is not called damaged."""
    model_file.save(tmp_path / "codec.icmc", frozen)
    with pytest.raises(IcmError, match=r"holds a codec '\w+', here are none; put its builder"):
        model_file.load(tmp_path / "codec.icmc", {"none": CODECS["image"]})


def test_weights_that_half_precision_holds_take_half_the_file(tmp_path):
    built = image_codec("scale_hyperprior", 16, 16)
    sample = images(2, 64, 64, 3)
    variables = jax.jit(built.init)(jax.random.key(1), sample)
    whole = bitstream.freeze(built, variables, sample)
    half = bitstream.freeze(built, variables, sample, weights="float16")
    sizes = []
    for name, frozen in (("whole", whole), ("half", half)):
        model_file.save(tmp_path / name, frozen)
        assert model_file.load(tmp_path / name, CODECS).fingerprint == frozen.fingerprint
        sizes.append((tmp_path / name).stat().st_size)
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sizes[0] - sizes[1] > 0.5 * weights  # of 2 bytes each; many compress well
    leaves = zip(*map(jax.tree.leaves, (half.variables, whole.variables)), strict=True)
    assert all(np.allclose(a, b, rtol=2**-11, atol=1e-7) for a, b in leaves if a.dtype.kind == "f")
    with pytest.raises(IcmError, match="float32 or float16"):
        bitstream.freeze(built, variables, sample, weights="int3")
