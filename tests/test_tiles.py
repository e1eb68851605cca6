"""Windows: what they give is what the whole image gives, whatever its size."""

import concurrent.futures
import dataclasses
import functools

import jax
import numpy as np
import pytest
from small import BUILT, encoded, images, quality_of, small_codec

from icm_jax.codecs import ahead, bitstream, codec, programs, tiles, walk
from icm_jax.coding import container, range_coder
from icm_jax.measure import detect

SMALL = ((64, 64), (128, 128), (192, 128))
"""Windows so small that test images need many of them."""
KINDS = ("factorised", "mean_scale_hyperprior", "checkerboard", "space_channel")


@functools.cache
def in_one_piece(frozen, number):
    """The exact prior of a segment as one program on whole latents: no windows, no bounds."""

    def prior(variables, decoded, shape):
        found = frozen.codec.segments[number].prior(variables, decoded, shape)
        return found.index, found.mean

    return jax.jit(prior, static_argnums=2)


def strings_of_whole(frozen, image, quality, condition):
    """The strings of a file, by the codec's functions on the whole image and the range coder."""
    latents = jax.jit(frozen.codec.analyse)(frozen.on_device, {"image": image} | condition)
    decoded, strings = dict(condition), []
    for number, segment in enumerate(frozen.codec.segments):
        latent = np.asarray(latents[segment.name])
        values, known = np.zeros_like(latent), np.zeros(latent.shape[1:], bool)
        for mask in codec.pass_masks(segment, latent.shape):
            given = codec.seen(segment, decoded, values, known)
            index, mean = in_one_piece(frozen, number)(frozen.on_device, given, latent.shape)
            mean = np.zeros_like(latent) if mean is None else np.asarray(mean)
            chosen = mask[None]
            symbols = np.rint(latent - mean)[chosen].astype(np.int32)
            rows = np.asarray(index)[chosen]
            strings.append(range_coder.encode(symbols, rows, frozen.tables[segment.name]))
            values[chosen] = symbols + mean[chosen]
            known |= mask
        decoded[segment.name] = values
    return strings, decoded


@pytest.mark.parametrize("size", [(1, 1), (15, 33), (64, 80), (129, 301), (270, 190), (321, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_write_what_the_whole_image_does(kind, size):
    """The same strings, or at a tie in rounding floats a symbol or two that differ by one."""
    frozen = small_codec(kind)
    batch = images(1, *size, 3)
    quality, condition = quality_of(frozen.codec)
    condition = {name: value[:1] for name, value in condition.items()}
    expected, latents = strings_of_whole(frozen, batch, quality, condition)
    (data,) = bitstream.encode(frozen, batch, quality=quality, windows=SMALL)
    found = bitstream.decode_latents(frozen, data).latents
    strings = [s for layer in container.unpack(data).layers for s in layer.strings]
    ties = sum((np.abs(found[n] - latents[n]) > 0.01).sum() for n in latents if n != "quality")
    assert strings == expected or 0 < ties < 4 + 1e-3 * sum(
        latent.size for latent in latents.values()
    )
    whole = frozen.codec.outputs["image"](frozen.on_device, found, size)
    given = bitstream.decode(frozen, [data], "image", windows=SMALL)
    np.testing.assert_allclose(given, whole, atol=0.05)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 20), (30, 41)])
@pytest.mark.parametrize(
    "kind", ["mean_scale_hyperprior", "checkerboard", "space_channel", "disentangled"]
)
def test_table_rows_are_the_same_integers_in_every_window(kind, size):
    frozen = small_codec(kind)
    sides = tuple(16 * side for side in size)
    rng = np.random.default_rng(sum(size))
    shapes = {s.name: (1, *s.shape(*sides)) for s in frozen.codec.segments}
    decoded = {n: rng.integers(-99, 99, s).astype(np.float32) for n, s in shapes.items()}
    for number, segment in enumerate(frozen.codec.segments):
        shape = shapes[segment.name]
        known = rng.integers(0, 2, shape[1:]).astype(bool)
        given = codec.seen(segment, decoded, decoded[segment.name] * known[None], known)
        index, mean = in_one_piece(frozen, number)(frozen.on_device, given, shape)
        for windows in (SMALL, tiles.SIZES, ((320, 384),)):
            found = walk.prior(frozen.codec, number, shape, frozen.on_device, given, windows)
            np.testing.assert_array_equal(found[0], index)
            if mean is not None:
                np.testing.assert_array_equal(found[1], mean)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_coded_before_changes_nothing(kind):
    """Files, and pixels of files, do not depend on their order."""
    frozen = small_codec(kind)
    batch = [images(1, *size, 3) for size in ((40, 90), (130, 70), (64, 64))]
    quality, _ = quality_of(frozen.codec)
    first = [encoded(frozen, one)[0] for one in batch]
    assert [encoded(frozen, one)[0] for one in reversed(batch)] == first[::-1]
    shown = [frozen.decompress(data) for data in first]
    for data, pixels in zip(reversed(first), reversed(shown), strict=True):
        np.testing.assert_array_equal(frozen.decompress(data), pixels)
    together = bitstream.encode(frozen, np.concatenate([batch[0]] * 3), quality=quality)
    assert together == first[:1] * 3


def test_many_sizes_take_few_programs():
    """Photographs of 60 sizes in at most six sizes of windows, and little wasted on them; those of
    768 × 512 pixels, which the field codes most, in one."""
    rng = np.random.default_rng(3)
    sides = [tuple(pair) for pair in rng.integers(300, 1300, (60, 2))]
    used = {tiles.best_size(pair, 32) for pair in sides}
    assert len(used) <= 6 and used <= set(tiles.SIZES)
    for pair in ((512, 768), (768, 512)):
        assert tiles.best_size(pair, 32) == pair
    for large in ((3000, 4000), (4320, 7680)):
        windows = [list(tiles.spans(*pair, 32)) for pair in zip(large, (512, 640), strict=True)]
        area = len(windows[0]) * len(windows[1]) * 512 * 640
        assert area < 1.5 * large[0] * large[1]


@pytest.mark.parametrize("kind", ["mean_scale_hyperprior", "disentangled"])
def test_further_sizes_compile_nothing_and_leave_nothing(kind, monkeypatch):
    """Of one size of windows: neither programs of the codec nor any other of JAX; and of detection
    none, either. So nothing is kept for a size."""
    frozen, compiled = small_codec(kind), []
    monkeypatch.setattr(programs, "_made", {})
    facts = dict(classes=["cat", "dog"], anchor_scale=0.1, overlap=0.5, limit=5)
    find = detect.finder(frozen, facts, 0.0) if kind == "disentangled" else None

    def heard(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def used(height, width):
        data = frozen.compress(images(height, width, 3))
        assert frozen.decompress(data).shape == (height, width, 3)
        if find is not None:
            assert find(data)["width"] == width

    used(200, 130)
    kept, arrays = set(programs._made), len(jax.live_arrays())
    jax.monitoring.register_event_duration_secs_listener(heard)
    for size in ((200, 131), (131, 200), (150, 256), (256, 233)):
        used(*size)
    assert not compiled and set(programs._made) == kept and len(jax.live_arrays()) <= arrays
    used(20, 50)
    assert compiled and len(programs._made) > len(kept)  # another size of windows is heard


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_windows_give_what_single_ones_do(kind, monkeypatch):
    frozen, batch = small_codec(kind), images(1, 150, 330, 3)
    quality, _ = quality_of(frozen.codec)
    expected = bitstream.encode(frozen, batch, quality=quality, windows=SMALL)
    pixels = bitstream.decode(frozen, expected, "image", windows=SMALL)
    monkeypatch.setattr(walk, "together", lambda variables: 4)
    found = bitstream.encode(frozen, batch, quality=quality, windows=SMALL)
    one, other = (bitstream.decode_latents(frozen, data[0]).latents for data in (expected, found))
    ties = sum((np.abs(one[name] - other[name]) > 0.01).sum() for name in one)
    assert found == expected or 0 < ties < 4 + 1e-3 * one["z" if "z" in one else "y"].size
    given = bitstream.decode(frozen, expected, "image", windows=SMALL)
    np.testing.assert_allclose(given, pixels, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compiled_ahead_is_what_is_needed(kind, monkeypatch):
    """Nothing else is compiled, nothing twice, and files and pixels stay."""
    frozen, image = small_codec(kind), images(70, 90, 3)
    quality, _ = quality_of(frozen.codec)
    (data,) = bitstream.encode(frozen, image[None], quality=quality)
    pixels = bitstream.decode(frozen, [data], "image")[0]

    def programs_of(*steps):
        pool = concurrent.futures.ThreadPoolExecutor(3)
        monkeypatch.setattr(programs, "_made", {})
        monkeypatch.setattr(ahead, "_begun", set())
        monkeypatch.setattr(ahead, "_pool", lambda: pool)
        submitted, submit = [], pool.submit
        monkeypatch.setattr(pool, "submit", lambda *task: submitted.append(submit(*task)))
        for step in steps:
            step()
        pool.shutdown()
        assert all(future.exception() is None for future in submitted)
        return {(key[0].__name__, *key[1][1:], key[2]) for key in programs._made}, len(submitted)

    def there():
        assert frozen.compress(image, quality) == data

    def back():
        np.testing.assert_array_equal(frozen.decompress(data), np.rint(pixels.clip(0, 255)))

    plainly, _ = programs_of(lambda: bitstream.encode(frozen, image[None], quality=quality))
    assert programs_of(there, there) == (plainly, 2 + len(frozen.codec.segments))
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "begin", lambda *_, **__: None)
        plainly, _ = programs_of(back)
    assert programs_of(back, back) == (plainly, 1 + len(frozen.codec.segments))


@pytest.mark.parametrize("length", [1, 64, 65, 100, 257])
def test_spans_keep_every_place_once_and_its_halo(length):
    size, halo = 64, 16
    kept = []
    for start, begin, end in tiles.spans(length, size, halo):
        assert 0 <= start <= begin < end <= min(start + size, length)
        assert begin - start >= halo or start == 0
        assert start + size - end >= halo or end == length
        kept += range(begin, end)
    assert kept == list(range(length))


def test_a_halo_wider_than_all_windows_takes_one_of_few_sizes():
    """As one that leaves only a rest of them; sides grow by a quarter at most."""
    assert tiles.best_size((100, 130), 600, 64) == (256, 256)
    assert tiles.best_size((1100, 130), 600, 64) == (1280, 192)
    assert tiles.best_size((3000, 4000), 500, 32) == (3072, 4096)
    assert tiles.best_size((3000, 4000), 240, 32) == (1024, 1024)
    found = {tiles.one_window((side, 9), 32)[0] for side in range(1, 8193)}
    assert len(found) < 30 and all(
        side <= tiles.one_window((side, 9))[0] <= 1.25 * side + 1 for side in range(1, 8193, 7)
    )


@pytest.mark.parametrize(
    ("kind", "window", "size"),
    [
        ("disentangled", 192, (150, 390)),
        ("split", 192, (150, 390)),
        ("residual", 640, (600, 780)),
        ("conditional", 192, (150, 390)),
        ("layered_split", 192, (150, 390)),
        ("autoencoder", 128, (129, 301)),
        ("autoencoder", 64, (8, 17)),
    ],
)
def test_codecs_see_in_windows_what_they_see_of_the_whole(kind, window, size):
    """Latents, feature and picture; weights that begin at zero are others here, so that every
    layer looks around."""
    frozen = small_codec(kind)
    tiling = frozen.codec.tiling
    assert tiling is not None
    filled = jax.tree.map(
        lambda x: x if x.any() else x + np.asarray(0.05, x.dtype), frozen.variables
    )
    variables, image = jax.device_put(filled), images(1, *size, 3)
    windows = ((window, window),)
    assert tiles.best_size(size, tiling.halo, 16, windows) == windows[0]
    _, condition = quality_of(frozen.codec)
    condition = {name: value[:1] for name, value in condition.items()}
    expected = jax.jit(frozen.codec.analyse)(variables, {"image": image} | condition)
    latents: dict = dict(condition)
    for sizes in (windows, tiles.SIZES):
        found = walk.analyse(frozen.codec, variables, image, condition, sizes)
        for name, latent in expected.items():
            latents[name] = np.rint(latent)
            np.testing.assert_allclose(found[name], latent, rtol=1e-4, atol=1e-4)
    for name, of_latents in frozen.codec.outputs.items():
        whole = jax.jit(of_latents, static_argnums=2)(variables, latents, size)
        found = walk.output(frozen.codec, name, size, variables, latents, windows)
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-2)


def test_a_codec_without_windows_is_coded_whole():
    frozen = small_codec("mean_scale_hyperprior")
    plain = bitstream.FrozenCodec(
        BUILT["mean_scale_hyperprior"]()._replace(tiling=None), frozen.variables, frozen.tables
    )
    batch = images(1, 50, 70, 3)
    (data,) = encoded(plain, batch)
    assert frozen.fingerprint == plain.fingerprint
    for one in (frozen, plain):
        assert np.abs(one.decompress(data).astype(int) - plain.decompress(data)).max() <= 1


@pytest.mark.parametrize("size", [(45, 77), (100, 900)])
def test_features_in_windows_are_those_of_the_whole_image(size):
    """Latents and output of Omni-ICM's codec, and the bits of its densities; the last size takes
    several windows."""
    frozen, batch = small_codec("omni_feature"), images(1, *size, 3)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + np.float32(0.04 * rng.normal(size=x.shape) * (x.ndim > 1)),
        frozen.variables["params"],
    )  # as if trained: latents that are not all zero
    frozen = dataclasses.replace(frozen, variables=frozen.variables | {"params": moved})
    windows = ((128, 640),)
    several = tiles.best_size(size, frozen.codec.tiling.halo, 16, windows)[1] < size[1]
    assert several == (size[1] == 900)
    args = frozen.codec, frozen.on_device
    whole, parts = (walk.analyse(*args, batch, {}, given) for given in ((), windows))
    assert np.abs(whole["y"]).max() > 0.5
    for name, latent in whole.items():
        np.testing.assert_allclose(parts[name], latent, atol=1e-4)
    decoded = {name: np.rint(3 * latent) for name, latent in whole.items()}
    expected, found = (
        walk.output(frozen.codec, "feature", size, frozen.on_device, decoded, given)
        for given in ((), windows)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    bits = [bitstream.estimate(frozen, batch, windows=given) for given in ((), windows)]
    for name in bits[0]:
        np.testing.assert_allclose(bits[1][name], bits[0][name], rtol=1e-4)
