"""Our coder against the full tensorflow-compression 2.14.1: its models, its tables, its strings.

That release needs TensorFlow 2.14 and an old NumPy, so it lives in an environment of its own, with
neither JAX nor the rest of this package:

    make conformance

which installs requirements/conformance.txt and runs

    python -m pytest -W default --noconftest tests/conformance

Elsewhere this module is skipped.
"""

import math

import numpy as np
import pytest

tfc = pytest.importorskip(
    "tensorflow_compression", reason="needs requirements/conformance.txt", exc_type=ImportError
)
tf = pytest.importorskip("tensorflow")

from icm_jax.coding import range_coder, tables  # noqa: E402
from icm_jax.coding.tables import Tables  # noqa: E402

PRECISIONS = [(12, 2.0**-8), (16, 2.0**-16), (14, 2.0**-4)]
SHAPE = (3, 6, 5, 4)  # [N, H, W, C]


def scale_of(index):
    low, high = math.log(0.11), math.log(256.0)
    return tf.exp(low + index * ((high - low) / 63))


def frozen(model) -> Tables:
    return Tables(model.cdf.numpy(), model.cdf_offset.numpy())


@pytest.fixture(scope="module", params=PRECISIONS, ids=lambda p: f"{p[0]} bits")
def batched(request):
    precision, tail_mass = request.param
    tf.random.set_seed(precision)
    return tfc.ContinuousBatchedEntropyModel(
        tfc.NoisyDeepFactorized(batch_shape=SHAPE[-1:]),
        coding_rank=3,
        compression=True,
        tail_mass=tail_mass,
        range_coder_precision=precision,
    )


@pytest.fixture(scope="module", params=PRECISIONS, ids=lambda p: f"{p[0]} bits")
def indexed(request):
    precision, tail_mass = request.param
    return tfc.ContinuousIndexedEntropyModel(
        lambda scale: tfc.NoisyNormal(loc=0.0, scale=scale),
        index_ranges=(64,),
        parameter_fns={"scale": lambda index: scale_of(index[..., 0])},
        coding_rank=3,
        channel_axis=-1,
        compression=True,
        tail_mass=tail_mass,
        range_coder_precision=precision,
    )


def latents(spread):
    """Float latents; the last image lies far outside the tables in places."""
    values = np.random.default_rng(0).normal(0, spread, SHAPE).astype(np.float32)
    values[-1, ::2] *= 300
    return values


def ours_if_equal(theirs, symbols, index, own):
    """Our strings of a batch, which must be `theirs`; and what we read in theirs, the symbols."""
    ours = [
        range_coder.encode(image.ravel(), rows.ravel(), own)
        for image, rows in zip(symbols, index, strict=True)
    ]
    assert ours == theirs.tolist()
    for string, image, rows in zip(theirs, symbols, index, strict=True):
        back = range_coder.decode(string, rows.ravel(), own)
        np.testing.assert_array_equal(back, image.ravel())
    return ours


def test_factorised_strings_both_ways(batched):
    """Rows cycle with the channel; symbols are rounded after the quantisation offset is taken."""
    own = frozen(batched)
    offset = batched.quantization_offset.numpy()
    y = latents(6.0)
    symbols = np.rint(y - offset).astype(np.int32)
    index = np.broadcast_to(np.arange(SHAPE[-1], dtype=np.int32), SHAPE)
    ours = ours_if_equal(batched.compress(y).numpy(), symbols, index, own)
    decoded = batched.decompress(tf.constant(ours), SHAPE[1:3]).numpy()
    np.testing.assert_array_equal(decoded, symbols.astype(np.float32) + offset)


def test_gaussian_strings_both_ways(indexed):
    own = frozen(indexed)
    index = np.random.default_rng(1).integers(0, 64, SHAPE).astype(np.int32)
    y = latents(1.0) * scale_of(index.astype(np.float32)).numpy()
    symbols = np.rint(y).astype(np.int32)
    theirs = indexed.compress(y, index[..., None].astype(np.float32)).numpy()
    ours = ours_if_equal(theirs, symbols, index, own)
    decoded = indexed.decompress(tf.constant(ours), index[..., None].astype(np.float32)).numpy()
    np.testing.assert_array_equal(decoded, symbols)


def test_our_gaussian_tables_are_theirs_up_to_ties(indexed):
    """Same supports; entries differ where they evaluate in float32 and where masses tie."""
    precision, tail_mass = int(indexed.range_coder_precision), indexed.tail_mass
    scales = scale_of(np.arange(64, dtype=np.float32)).numpy()
    theirs = frozen(indexed)
    ours = tables.gaussian_tables(scales, precision, tail_mass)
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    for row, length in zip(range(64), ours.lengths, strict=True):
        mine, other = (t.cdf[t.starts[row] + 1 :][: length + 1] for t in (ours, theirs))
        assert np.abs(np.diff(mine) - np.diff(other)).max() <= 2


@pytest.mark.parametrize(("precision", "tail_mass"), PRECISIONS)
def test_our_tables_serve_their_location_scale_model(precision, tail_mass):
    """Strings with scales and means of a hyperprior, escapes included, go both ways."""
    scales = scale_of(np.arange(64, dtype=np.float32)).numpy()
    own = tables.gaussian_tables(scales, precision, tail_mass)
    model = tfc.LocationScaleIndexedEntropyModel(
        tfc.NoisyNormal,
        num_scales=64,
        scale_fn=scale_of,
        coding_rank=3,
        compression=True,
        tail_mass=tail_mass,
        range_coder_precision=precision,
    )
    model.set_weights([own.cdf, own.offsets])
    rng = np.random.default_rng(3)
    index = rng.integers(0, 64, SHAPE).astype(np.int32)
    mean = (rng.integers(-160, 161, SHAPE) / 16).astype(np.float32)
    y = mean + np.rint(latents(1.0) * scales[index]).astype(np.float32)
    symbols = (y - mean).astype(np.int32)
    reach = own.lengths[index] + own.offsets[index]
    assert (symbols > reach).any() and (symbols < own.offsets[index]).any()  # escapes
    # A tensor, since `compress` subtracts the mean in place.
    theirs = model.compress(tf.constant(y), index.astype(np.float32), mean).numpy()
    ours = ours_if_equal(theirs, symbols, index, own)
    decoded = model.decompress(tf.constant(ours), index.astype(np.float32), mean).numpy()
    np.testing.assert_array_equal(decoded, y)


def test_our_tables_serve_their_model():
    """A model of theirs that holds our factorised rows reads and writes our strings."""
    pmf = tables.gaussian_pmf(np.arange(-9, 10), 2.0)
    own = tables.from_pmfs([pmf, pmf[3:-3]], [-9, -6], precision=14)
    model = tfc.ContinuousBatchedEntropyModel(
        prior_shape=(2,),
        cdf=own.cdf,
        cdf_offset=own.offsets,
        coding_rank=2,
        compression=True,
        range_coder_precision=14,
        quantization_offset=None,
        offset_heuristic=False,
        bottleneck_dtype=tf.float32,
    )
    symbols = np.random.default_rng(2).integers(-14, 15, (40, 2)).astype(np.int32)
    index = np.tile(np.array([0, 1], np.int32), 40)
    string = range_coder.encode(symbols.ravel(), index, own)
    assert model.compress(symbols.astype(np.float32)).numpy() == string
    decoded = model.decompress(tf.constant(string), [40]).numpy()
    np.testing.assert_array_equal(decoded, symbols)
