"""GDN, convolutions, entropy models and codecs against closed forms, NumPy and round trips."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.signal
import scipy.stats

import icm_jax
from icm_jax import entropy, ops
from icm_jax.codecs import (
    CODECS,
    bitstream,
    codec,
    feature_codec,
    filter_codec,
    image_codec,
    model_file,
    tiles,
)
from icm_jax.codecs.hyperprior import Gain
from icm_jax.coding import container, tables
from icm_jax.errors import IcmError
from icm_jax.nets.layers import GDN, Projector, Up, down_by_two, haar_cascade, up_by_two
from icm_jax.nets.transforms import ImageAnalysis, ImageSynthesis

CODERS = ["native"]
if importlib.util.find_spec("tensorflow_compression_ops"):
    CODERS.append("tfc")
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(0, scale, shape), jnp.float32)


def check_gradient(function, x, tolerance=1e-2):
    """Directional derivative against central differences."""
    direction = normal(*x.shape)
    direction = direction / jnp.linalg.norm(direction)
    step = 3e-2
    numeric = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    analytic = (jax.grad(function)(x) * direction).sum()
    np.testing.assert_allclose(analytic, numeric, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("simplified", [False, True])
def test_gdn_equals_its_formula_and_undoes_itself_when_diagonal(simplified):
    x = normal(2, 3, 5, 4)
    gdn = GDN(simplified=simplified)
    variables = gdn.init(jax.random.key(0), x)
    beta, gamma = np.float32([0.5, 1, 2, 3]), np.abs(RNG.normal(size=(4, 4))).astype(np.float32)
    stored = {"beta": np.sqrt(beta + 2.0**-36), "gamma": np.sqrt(gamma + 2.0**-36)}
    given = np.asarray(gdn.apply({"params": stored}, x))
    pool = np.abs(x) if simplified else np.square(x)
    norm = np.einsum("nhwi,io->nhwo", pool, gamma) + beta
    norm = norm if simplified else np.sqrt(norm)
    np.testing.assert_allclose(given, x / norm, rtol=1e-5)
    inverse = GDN(inverse=True, simplified=simplified).apply({"params": stored}, x)
    np.testing.assert_allclose(inverse, x * norm, rtol=1e-5)
    initial = np.asarray(gdn.apply(variables, x))
    expected = np.asarray(x) / (1 + 0.1 * np.abs(x) if simplified else np.sqrt(1 + 0.1 * x**2))
    np.testing.assert_allclose(initial, expected, rtol=1e-5)
    check_gradient(lambda x: jnp.sin(gdn.apply({"params": stored}, x)).sum(), x)


def test_bounds_let_helpful_gradients_through():
    x = jnp.array([-1.0, -1.0, 2.0, 2.0])
    pull = jnp.array([1.0, -1.0, 1.0, -1.0])  # a step goes against the gradient
    gradient = jax.grad(lambda x: (ops.lower_bound(x, 0.0) * pull).sum())(x)
    np.testing.assert_array_equal(gradient, [0, -1, 1, -1])
    gradient = jax.grad(lambda x: (ops.upper_bound(x, 1.0) * pull).sum())(x)
    np.testing.assert_array_equal(gradient, [1, -1, 1, 0])
    np.testing.assert_array_equal(ops.upper_bound(x, 1.0), [-1, -1, 1, 1])


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_strided_convolution_equals_scipy(size, kernel):
    x, weights = normal(1, *size, 2), normal(kernel, kernel, 2, 3)
    given = np.asarray(down_by_two(x, weights))[0]
    padded = np.pad(np.asarray(x)[0], ((0, size[0] % 2), (0, size[1] % 2), (0, 0)))
    for out in range(3):
        full = sum(
            scipy.signal.correlate2d(padded[..., c], weights[..., c, out], "same") for c in range(2)
        )
        np.testing.assert_allclose(given[..., out], full[::2, ::2], atol=2e-5)
    check_gradient(lambda w: jnp.sin(down_by_two(x, w)).sum(), weights)


@pytest.mark.parametrize("size", [(1, 1), (4, 5)])
def test_transposed_convolution_equals_its_definition(size):
    x, kernel = normal(1, *size, 3), normal(5, 5, 3, 2)
    full = np.zeros((2 * size[0] + 4, 2 * size[1] + 4, 2))
    for row, column in np.ndindex(*size):
        stamp = np.einsum("c,abcf->abf", x[0, row, column], kernel)
        full[2 * row : 2 * row + 5, 2 * column : 2 * column + 5] += stamp
    given = up_by_two(x, kernel)[0]
    np.testing.assert_allclose(given, full[2 : 2 + 2 * size[0], 2 : 2 + 2 * size[1]], atol=2e-5)
    check_gradient(lambda w: jnp.sin(up_by_two(x, w)).sum(), kernel)


def test_sub_pixel_convolution_doubles_the_sides():
    layer = Up(3)
    x = normal(2, 4, 5, 6)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["Conv_0"]["kernel"]
    y = np.asarray(layer.apply(variables, x))
    assert y.shape == (2, 8, 10, 3)
    inner = np.einsum("hwc,hwco->o", np.asarray(x)[0, 0:3, 1:4], kernel)
    np.testing.assert_allclose(y[0, 2:4, 4:6].reshape(-1), inner, rtol=1e-4, atol=1e-5)


def test_projector_has_one_hidden_layer():
    layer, x = Projector(5, 2), normal(3, 4)
    params = layer.init(jax.random.key(0), x)["params"]
    hidden = np.maximum(x @ params["Dense_0"]["kernel"], 0)
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), hidden @ params["Dense_1"]["kernel"], rtol=1e-5
    )


@pytest.fixture(scope="module")
def prior():
    """A factorised prior moved away from its initial state."""
    module = entropy.Factorised()
    params = module.init(jax.random.key(0), normal(1, 3))["params"]
    leaves, tree = jax.tree.flatten(params)
    moved = [leaf + normal(*leaf.shape, scale=0.5) for leaf in leaves]
    return module, jax.tree.unflatten(tree, moved)


def cdf(params, x, channel):
    """The prior's CDF, written out: float64 [n]."""
    h = np.asarray(x, np.float64)[None, :]
    for layer in range(3):
        matrix = np.log1p(np.exp(np.asarray(params[f"matrix_{layer}"], np.float64)[channel]))
        h = matrix @ h + np.asarray(params[f"bias_{layer}"], np.float64)[channel]
        if layer < 2:
            h = h + np.tanh(np.asarray(params[f"factor_{layer}"])[channel]) * np.tanh(h)
    return 1 / (1 + np.exp(-h[0]))


def test_factorised_bits_are_the_density_convolved_with_noise(prior):
    module, params = prior
    y = np.linspace(-12, 12, 49)
    bits = module.apply({"params": params}, jnp.tile(y[:, None], (1, 3)).astype(jnp.float32))
    for channel in range(3):
        mass = cdf(params, y + 0.5, channel) - cdf(params, y - 0.5, channel)
        np.testing.assert_allclose(bits[:, channel], -np.log2(mass), rtol=2e-4, atol=2e-4)
    density = lambda x: (cdf(params, [x + 1e-4], 0) - cdf(params, [x - 1e-4], 0))[0] / 2e-4  # noqa: E731
    integral, _ = scipy.integrate.quad(density, 1.0, 2.0)
    np.testing.assert_allclose(
        2.0 ** -module.apply({"params": params}, jnp.full((1, 3), 1.5))[0, 0], integral, rtol=1e-3
    )


def test_bits_stay_finite_with_gradients_far_in_the_tails(prior):
    module, params = prior
    far = jnp.array([[-3e4, 3e4, 1e3]])
    value, gradient = jax.value_and_grad(lambda y: module.apply({"params": params}, y).sum())(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 0] < 0 < gradient[0, 1]
    index = jnp.zeros((2,))
    value, gradient = jax.value_and_grad(lambda y: entropy.gaussian_bits(y, index).sum())(
        jnp.array([-900.0, 900.0])
    )
    assert np.isfinite(value) and gradient[0] < 0 < gradient[1]


def test_gaussian_bits_equal_scipy_and_finite_differences():
    y, index = normal(40, scale=5.0), jnp.asarray(RNG.uniform(0, 50, 40), jnp.float32)
    scale = np.exp(np.log(0.11) + np.asarray(index) * np.log(256 / 0.11) / 63)
    lower, upper = ((-np.abs(np.float64(y)) + s) / scale for s in (-0.5, 0.5))
    log_upper, log_lower = scipy.stats.norm.logcdf(upper), scipy.stats.norm.logcdf(lower)
    expected = -(log_upper + np.log(-np.expm1(log_lower - log_upper))) / np.log(2)
    np.testing.assert_allclose(entropy.gaussian_bits(y, index), expected, rtol=2e-4, atol=1e-5)
    shifted = entropy.gaussian_bits(y + 3.0, index, jnp.full((40,), 3.0))
    np.testing.assert_allclose(shifted, expected, rtol=1e-3, atol=1e-4)
    wide = jnp.full((40,), 30.0)
    check_gradient(lambda y: entropy.gaussian_bits(y, wide).sum(), y)


def test_table_index_is_the_nearest_inside_the_table():
    given = entropy.table_index(jnp.array([-3.0, 0.4, 0.9, 20.99, 62.6, 63.0, 400.0]))
    np.testing.assert_array_equal(given, [0, 0, 1, 21, 63, 63, 63])


def test_frozen_prior_holds_the_masses_of_the_float_prior(prior):
    _, params = prior
    frozen = entropy.factorised_tables(params)
    for channel in range(3):
        start, length = frozen.starts[channel], frozen.lengths[channel]
        counts = np.diff(frozen.cdf[start + 1 : start + 2 + length])[:-1]
        values = frozen.offsets[channel] + np.arange(length - 1)
        mass = cdf(params, values + 0.5, channel) - cdf(params, values - 0.5, channel)
        assert np.abs(counts / 2**16 - mass).max() < 2**-15
        assert 1 - mass.sum() < 2 * tables.TAIL_MASS
    broken = dict(params, bias_0=params["bias_0"] * np.nan)
    with pytest.raises(IcmError, match="not finite"):
        entropy.factorised_tables(broken)


SMALL = dict(
    variant="18",
    width=8,
    filter_channels=6,
    filter_widths=(4, 8, 8),
    channels=5,
    widths=(4, 8),
    hyper_channels=4,
)


BUILT = {
    "omni_feature": lambda: feature_codec(**SMALL),
    "omni_filter": lambda: filter_codec("18", 8, 6, (4, 8, 8)),
    "factorised": lambda: image_codec("factorised", 6, 8),
    "scale_hyperprior": lambda: image_codec("scale_hyperprior", 6, 8),
    "mean_scale_hyperprior": lambda: image_codec("mean_scale_hyperprior", 6, 8, levels=3),
}


def quality_of(built):
    """(as `encode` takes it, as `forward` takes it for two images)."""
    return (43.21, {"quality": np.full(2, 0.4321, np.float32)}) if built.qualities else (None, {})


@pytest.fixture(scope="module", params=list(BUILT))
def frozen(request):
    built = BUILT[request.param]()
    variables = jax.jit(built.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.uint8))
    return bitstream.freeze(built, variables, images(2, 32, 32, 3))


def images(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def test_image_transforms_begin_as_a_wavelet_packet():
    """Orthonormal bands, none twice; smooth images survive what is cut away, noise does not."""
    windows = haar_cascade((12, 20, 24))
    for window, (inner, scale) in zip(windows, ((12, 0.25), (20, 1), (24, 4)), strict=True):
        matrix = window.reshape(-1, inner) / scale
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(inner), atol=1e-6)
    wide = haar_cascade((16,))[0]
    assert np.abs(wide).any(axis=(0, 1, 2)).sum() == 12  # all bands of RGB, and no more
    y, x = np.mgrid[:64, :64]
    smooth = 128 + 100 * np.sin(x / 30 + np.array([0, 0.2, 0.4])[:, None, None]) * np.cos(y / 40)
    smooth = smooth.transpose(1, 2, 0)[None].astype(np.float32)
    noise = np.random.default_rng(0).uniform(0, 255, smooth.shape).astype(np.float32)
    analysis, synthesis = ImageAnalysis(24, (16,) * 3), ImageSynthesis((16,) * 3)
    first = analysis.init(jax.random.key(0), smooth)
    second = synthesis.init(jax.random.key(1), jnp.zeros((1, 4, 4, 24)))
    errors = [
        np.sqrt(np.square(synthesis.apply(second, analysis.apply(first, image)) - image).mean())
        for image in (smooth, noise)
    ]
    assert errors[0] < 12 < 50 < errors[1]


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
    (output,) = frozen.codec.outputs
    decoded = bitstream.decode(frozen, streams, output, coder)
    quarter = tuple(-(-side // 4) for side in size)
    assert decoded.shape == ((2, *quarter, 8) if output == "feature" else batch.shape)
    np.testing.assert_allclose(decoded, result.outputs[output], rtol=1e-3, atol=1e-2)
    assert bitstream.encode(frozen, batch, "native", quality=quality) == streams


def encoded(frozen, batch):
    return bitstream.encode(frozen, batch, quality=quality_of(frozen.codec)[0])


def test_every_altered_byte_is_an_error(frozen):
    stream = encoded(frozen, images(1, 16, 16, 3))[0]
    (output,) = frozen.codec.outputs
    for at in range(0, len(stream), 3):
        altered = stream[:at] + bytes([stream[at] ^ 1]) + stream[at + 1 :]
        with pytest.raises(IcmError):
            bitstream.decode(frozen, [altered], output)


def test_latents_that_decode_differently_are_an_error(frozen):
    stream = container.unpack(encoded(frozen, images(1, 16, 16, 3))[0])
    other = container.pack(stream.header, [(stream.layers[0].strings, 0)])
    with pytest.raises(IcmError, match="did not decode to the latents"):
        bitstream.decode(frozen, [other], *frozen.codec.outputs)


def test_only_frozen_codecs_write_and_only_their_own_read(frozen):
    with pytest.raises(IcmError, match="freeze"):
        bitstream.encode(frozen.codec, images(1, 8, 8, 3))
    if "integer" in frozen.variables:
        with pytest.raises(IcmError, match="frozen already"):
            bitstream.freeze(frozen.codec, frozen.variables, images(2, 32, 32, 3))
    changed = jax.tree.map(lambda x: x + 1 if x.dtype.kind == "f" else x, frozen.variables)
    other = bitstream.FrozenCodec(frozen.codec, changed, frozen.tables)
    with pytest.raises(IcmError, match="decode with the model that wrote it"):
        bitstream.decode(other, encoded(frozen, images(1, 8, 8, 3)), *frozen.codec.outputs)
    with pytest.raises(IcmError, match="no output"):
        bitstream.decode(frozen, [], "picture")
    with pytest.raises(IcmError, match="uint8"):
        bitstream.encode(frozen, np.zeros((1, 8, 8, 3), np.float32))


def test_latents_that_are_not_finite_are_refused(frozen):
    params = jax.tree.map(lambda x: x * np.nan, frozen.variables["params"])
    other = bitstream.FrozenCodec(
        frozen.codec, dict(frozen.variables, params=params), frozen.tables
    )
    with pytest.raises(IcmError, match="not finite"):
        encoded(other, images(1, 8, 8, 3))


def test_saving_and_loading_keeps_every_bit(frozen, tmp_path):
    path = tmp_path / "codec.icmc"
    model_file.save(path, frozen)
    loaded = model_file.load(path, CODECS)
    assert loaded.fingerprint == frozen.fingerprint
    batch = images(1, 9, 12, 3)
    assert encoded(loaded, batch) == encoded(frozen, batch)
    assert [p.name for p in tmp_path.iterdir()] == ["codec.icmc"]
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]
    for damaged in (data[:middle], b"", flipped):
        path.write_bytes(damaged)
        with pytest.raises(IcmError, match=r"codec\.icmc"):
            model_file.load(path, CODECS)
    with pytest.raises(IcmError, match="absent"):
        model_file.load(tmp_path / "absent", CODECS)


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
    with pytest.raises(IcmError, match="the first 1 can still be decoded"):
        bitstream.decode(frozen, [cut], "image")


def test_a_package_without_a_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(model_file, "BOXED", tmp_path / "photo.icmc")
    with pytest.raises(IcmError, match="no model in the package; train one"):
        icm_jax.load()


def test_a_codec_file_says_what_it_is(frozen, tmp_path, monkeypatch):
    path = tmp_path / "codec.icmc"
    model_file.save(path, frozen, licence="CC0", description="for tests")
    about = model_file.describe(path)
    assert (about["licence"], about["description"]) == ("CC0", "for tests")
    assert about["fingerprint"] == frozen.fingerprint.hex()
    monkeypatch.setattr(model_file, "VERSION", 2)
    with pytest.raises(IcmError, match="of version 1, this icm_jax reads version 2"):
        model_file.load(path, CODECS)


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


def test_written_bytes_match_the_estimate():
    """Latents drawn from the model itself: 1 % + 32 bytes, side information included."""
    built = feature_codec(**SMALL)
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
        with pytest.raises(IcmError, match="quality from 0 to 100"):
            bitstream.encode(many, batch, quality=wrong)
    bits = [sum(bitstream.estimate(many, batch, quality=q).values())[0] for q in (0, 25.5, 100)]
    assert bits == sorted(bits) and bits[0] < bits[-1]
    header = bitstream.decode_latents(many, bitstream.encode(many, batch, quality=25.5)[0]).header
    assert header.quality == 2550


@pytest.mark.parametrize("kind", ["factorised", "mean_scale_hyperprior"])
def test_windows_leave_no_trace(kind):
    """An image in small windows: latents and pixels as in one piece, at seams as elsewhere."""
    built = image_codec(kind, 6, 8)
    batch = images(1, 201, 330, 3)
    variables = jax.jit(built.init)(jax.random.key(1), batch)
    frozen = bitstream.freeze(built, variables, batch[:, :64, :64])
    whole, cut = (bitstream.encode(frozen, batch, window=w)[0] for w in (1024, 112))
    one, other = (bitstream.decode_latents(frozen, data).latents["y"] for data in (whole, cut))
    assert (one != other).mean() < 1e-3 and np.abs(one - other).max() <= 1  # a tie in rounding
    pixels = [bitstream.decode(frozen, [whole], "image", window=w) for w in (1024, 96)]
    np.testing.assert_allclose(*pixels, atol=0.05)


@pytest.mark.parametrize("length", [1, 64, 65, 100, 257])
def test_spans_keep_every_place_once_and_its_halo(length):
    size, halo = 64, 16
    kept = []
    for start, begin, end in tiles.spans(length, min(size, length), halo):
        assert 0 <= start <= begin < end <= min(start + size, length)
        assert begin - start >= halo or start == 0
        assert start + size - end >= halo or end == length
        kept += range(begin, end)
    assert kept == list(range(length))


@pytest.fixture(scope="module")
def file_and_codec():
    """A colour image of 40 × 56 pixels in a file, and the codec that wrote it."""
    built = BUILT["mean_scale_hyperprior"]()
    batch = images(1, 40, 56, 3)
    variables = jax.jit(built.init)(jax.random.key(1), batch)
    frozen = bitstream.freeze(built, variables, batch)
    return frozen.compress(batch[0], 80), frozen


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


def test_a_full_disk_keeps_the_codec_that_was_there(file_and_codec, tmp_path, monkeypatch):
    _, frozen = file_and_codec
    path = tmp_path / "codec.icmc"
    path.write_bytes(b"earlier")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(IcmError, match="No space left"):
        model_file.save(path, frozen)
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_gain_interpolates_logarithms():
    gain = Gain(levels=3, channels=1)
    y = jnp.ones((3, 1, 1, 1))
    rows = {"log_gain": jnp.log(jnp.array([[1.0], [4.0], [9.0]])), "log_inverse": jnp.zeros((3, 1))}
    given = gain.apply({"params": rows}, y, jnp.array([0.25, 0.5, 0.875]))
    expected = [2.0, 4.0, np.exp(np.log(4) * 0.25 + np.log(9) * 0.75)]
    np.testing.assert_allclose(given.ravel(), expected, rtol=1e-6)


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
