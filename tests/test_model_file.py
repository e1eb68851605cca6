"""Codec files: every bit comes back, damage is named, half precision saves what it promises."""

import io
import tracemalloc
import zipfile
from typing import Any

import forge
import jax
import numpy as np
import pytest
from small import encoded, images, small_codec
from strangers.codec import checkerboard_codec
from strangers.feature_codec import plain_codec

import icm_jax
from icm_jax.codecs import CODECS as OURS
from icm_jax.codecs import bitstream, image_codec, model_file, needs, programs
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


SMALL = "mean_scale_hyperprior"


def rewritten(path, change=lambda arrays: None, **about) -> None:
    """The codec file with `change`d arrays and facts, and the fingerprint that belongs to them."""
    arrays, facts = forge.opened(path.read_bytes())
    change(arrays)
    path.write_bytes(forge.model(arrays, facts | about, ("z", "y")))


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "codec.icmc"
    model_file.save(path, small_codec(SMALL))
    return path


KERNEL = "variables/params/image_codec/analysis/Down_0/kernel"
INTEGER = "variables/integer/y/layer_1/"


def test_a_file_that_was_put_together_anew_is_the_same(small_file):
    before = icm_jax.load(small_file).fingerprint
    rewritten(small_file)
    assert icm_jax.load(small_file).fingerprint == before
    rewritten(small_file, lambda arrays: arrays.update({KERNEL: arrays[KERNEL] + 1}))
    assert icm_jax.load(small_file).fingerprint != before


@pytest.mark.parametrize(
    "name, change, message",
    [
        (KERNEL, lambda x: x.swapaxes(2, 3).reshape(5, 5, 4, 3), r"is float32 \[5, 5, 4, 3\], its"),
        (KERNEL, lambda x: x[..., :2], r"Down_0/kernel is .* takes float32 \[5, 5, 3, 4\]"),
        (KERNEL, lambda x: x.astype(np.int8), "is int8"),
        (KERNEL, lambda x: x.astype(np.float64), "is <f8, of rank 4; no codec has such"),
        (KERNEL, lambda x: x.astype(">f4"), "is >f4, of rank 4"),
        (KERNEL, lambda x: None, "lacks the array .*Down_0/kernel, float32"),
        ("variables/params/image_codec/more", lambda x: np.zeros(3, np.float32), "has no array"),
        ("variables/params/other/x", lambda x: np.zeros(3, np.float32), "has no array"),
        ("tables/x/cdf", lambda x: np.zeros(3, np.int32), "has no array tables/x/cdf"),
        (INTEGER + "kernel", lambda x: x[..., :-4], "layer_1/"),
        (INTEGER + "bias", lambda x: x[:, None], r"bias is int32 \[\d+, 1\]"),
        (INTEGER + "bias", lambda x: x.astype(np.float32), "bias is float32"),
        (INTEGER + "first", lambda x: None, "lacks the array .*layer_1/first"),
        ("tables/y/offsets", lambda x: x[:-1], r"takes int32 \[64\]"),
        ("tables/y/cdf", lambda x: x[:, None], "tables/y/cdf is int32"),
        ("tables/y/cdf", lambda x: x[::-1], "table row"),
    ],
)
def test_an_array_that_does_not_fit_is_named(small_file, name, change, message):
    def changed(arrays):
        arrays[name] = change(arrays.get(name))
        if arrays[name] is None:
            del arrays[name]

    rewritten(small_file, changed)
    with pytest.raises(IcmError, match=rf"codec\.icmc: .*{message}"):
        icm_jax.load(small_file)


FIELDS = dict(small_codec(SMALL).codec.config[1])


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("image", dict(FIELDS, width=[4, 6, 8]), "takes width"),
        ("image", dict(FIELDS, width=10**12), "numbers from 0 to 16384"),
        ("image", dict(FIELDS, width=16384, channels=16384), "their product is at most"),
        ("image", dict(FIELDS, channels=-8), "takes channels: int"),
        ("image", dict(FIELDS, channels="8"), "takes channels: int"),
        ("image", dict(FIELDS, channels=True), "takes channels: int"),
        ("image", dict(FIELDS, levels=2.5), "takes levels: int"),
        ("image", dict(FIELDS, kind="none"), "no image codec 'none'"),
        ("image", dict(FIELDS, dtype="float99"), "float32, bfloat16, float16, not 'float99'"),
        ("image", dict(FIELDS, extra=1), "is built by image"),
        ("nothing", {}, "holds a codec 'nothing'"),
        ("autoencoder", dict(width=6, channels=3, centres=6, learned=True, blocks=10**4), "from"),
        ("omni_filter", dict(variant="10", width=0, channels=1, widths=[1, 1, 1]), "at least 1"),
        ("omni_filter", dict(variant="11", width=8, channels=1, widths=[1, 1, 1]), "no ResNet"),
        (
            "space_channel",
            dict(widths=[8, 8], slices=[2] * 500, blocks=[1, 1, 1], back_blocks=[1, 1, 1]),
            "1 to 16 slices",
        ),
        (
            "scalable",
            dict(
                kind="split", width=4, base=1, enhancement=1, hypers=1, detector=[[["conv"]] * 600]
            ),
            "takes detector",
        ),
    ],
)
def test_a_codec_that_cannot_be_is_refused_before_anything_is_built(
    small_file, name, fields, message
):
    items = [[key, value] for key, value in fields.items()]
    rewritten(small_file, codec=[name, items])
    with pytest.raises(IcmError, match=rf"codec\.icmc: .*{message}"):
        icm_jax.load(small_file)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[]", "does not say of which version"),
        (b'{"version": "1"}', "does not say of which version"),
        (b'{"version": 1, "codec": 7, "fingerprint": ""}', "lacks a codec"),
        (b'{"version": 1, "codec": ["image", [[1, 2]]], "fingerprint": ""}', "lacks a codec"),
        (b'{"version": 1, "codec": ["image", [["width", NaN]]], "fingerprint": ""}', "holds NaN"),
        (b"[" * 100_000, "not a readable codec file"),
        (b" " * (archive.MAX_ABOUT + 1), "at most 1048576"),
        (b"\xff", "not a readable codec file"),
    ],
)
def test_what_model_json_may_say(small_file, text, message):
    arrays: Any = {"model.json": np.frombuffer(text, np.uint8)}
    np.savez(file := io.BytesIO(), **arrays)
    small_file.write_bytes(file.getvalue())
    for look in (archive.describe, icm_jax.load):
        with pytest.raises(IcmError, match=rf"codec\.icmc.*{message}"):
            look(small_file)


def test_what_swells_is_refused_before_it_is_read(small_file, monkeypatch):
    """60 MB of zeros take 60 KB in a file; nothing is inflated that no codec needs."""

    def swollen(arrays):
        arrays[KERNEL] = np.zeros((5, 5, 3, 200_000), np.float32)

    rewritten(small_file, swollen)
    assert small_file.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(IcmError, match=r"Down_0/kernel is float32 \[5, 5, 3, 200000\]"):
        icm_jax.load(small_file)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    monkeypatch.setattr(archive, "MAX_BYTES", 1 << 24)
    with pytest.raises(IcmError, match=r"its arrays take 6\d+ bytes; at most 16777216"):
        icm_jax.load(small_file)


def test_arrays_are_read_whatever_their_order_in_memory(small_file):
    before = icm_jax.load(small_file)
    rewritten(small_file, lambda arrays: arrays.update({KERNEL: np.asfortranarray(arrays[KERNEL])}))
    assert icm_jax.load(small_file).fingerprint == before.fingerprint


def test_what_a_file_needs_is_looked_at_once(small_file, monkeypatch, tmp_path):
    """Initialising a codec takes longer than reading it: that its arrays fit is remembered."""
    looked = []
    real = needs._of_transforms
    monkeypatch.setattr(needs, "_of_transforms", lambda codec: looked.append(1) or real(codec))
    monkeypatch.setattr(programs, "folder_of_programs", lambda: tmp_path)
    for _ in range(3):
        icm_jax.load(small_file)
    assert len(looked) == (1 if jax.__version_info__ >= (0, 7) else 3)
    rewritten(small_file, lambda arrays: arrays.update({KERNEL: arrays[KERNEL][..., :2]}))
    for _ in range(2):
        with pytest.raises(IcmError, match="Down_0/kernel"):
            icm_jax.load(small_file)
