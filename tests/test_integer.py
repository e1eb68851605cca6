"""Integer hyper-synthesis: one result everywhere, close to the float network it was made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icm_jax.errors import IcmError
from icm_jax.nets import entropy_parameters, integer

RNG = np.random.default_rng(3)
CHANNELS, LATENT = 6, 5
RANGES = [integer.Range(0, 63, 1.0)] * LATENT
RANGES += [integer.Range(-(1 << 15), 1 << 15, 1 / entropy_parameters.MEAN_STEPS)] * LATENT


def integers(params, z):
    """A hyper-synthesis with means as a frozen codec holds it."""
    weights = entropy_parameters.hyper_synthesis_weights(params, LATENT)
    return integer.quantise(entropy_parameters.HYPER_SYNTHESIS, weights, {"z": z}, RANGES)


def run_integers(layers, z):
    return integer.run(entropy_parameters.HYPER_SYNTHESIS, layers, {"z": z})


@pytest.fixture(scope="module")
def stack():
    """(float parameters, sample inputs, integer stack) of a hyper-synthesis with means."""
    module = entropy_parameters.HyperSynthesis(CHANNELS, LATENT, mean=True)
    z = RNG.integers(-6, 7, (3, 4, 5, CHANNELS)).astype(np.float32)
    params = jax.device_get(module.init(jax.random.key(0), z)["params"])
    params["Conv_0"]["kernel"] = params["Conv_0"]["kernel"] * 5  # a range of scales and means
    return module, params, z, integers(params, z)


def in_python(nodes, arrays, inputs):
    """The definition in NumPy's 64-bit integers: nothing can overflow or be reordered here."""
    values = {}
    for name, value in inputs.items():
        shift = arrays[name]["shift"].astype(np.int64) if name in arrays else 4
        sixteenths = np.rint(np.asarray(value, np.float64) * 16).astype(np.int64)
        values[name] = np.clip((sixteenths + 2**shift // 2) // 2**shift, -127, 127)
    for node in nodes:
        layer = {name: value.astype(np.int64) for name, value in arrays[node.name].items()}
        parts = [values[name] for name in node.inputs]
        h, w = (min(part.shape[axis] for part in parts) for axis in (1, 2))
        x = np.concatenate([part[:, :h, :w] for part in parts], axis=-1)
        side = layer["kernel"].shape[0]
        padded = np.pad(x, ((0, 0), *[(side // 2,) * 2] * 2, (0, 0)))
        acc = np.zeros((len(x), h, w, len(layer["bias"])), np.int64) + layer["bias"]
        for row, column in np.ndindex(side, side):
            acc += padded[:, row : row + h, column : column + w] @ layer["kernel"][row, column]
        a = (acc + (2 ** layer["first"]) // 2) // 2 ** layer["first"]
        factor = np.where(a < 0, layer.get("negative", layer["multiplier"]), layer["multiplier"])
        y = (a * factor + (2 ** layer["second"]) // 2) // 2 ** layer["second"]
        y = np.clip(y, layer["low"], layer["high"])
        if node.up:
            blocks = y.reshape(len(y), h, w, 2, 2, -1)
            y = np.moveaxis(blocks, 3, 2).reshape(len(y), 2 * h, 2 * w, -1)
        values[node.name] = y
    return y


def test_equals_its_definition_in_wide_integers(stack):
    *_, layers = stack
    for scale in (1, 10, 1000):  # the last far outside of the sample: clipped
        z = RNG.normal(0, 3 * scale, (2, 3, 4, CHANNELS)).round().astype(np.float32)
        given = jax.jit(run_integers)(layers, z)
        assert given.dtype == jnp.int32
        np.testing.assert_array_equal(
            given, in_python(entropy_parameters.HYPER_SYNTHESIS, layers, {"z": z})
        )


@pytest.mark.parametrize(
    "side, channels", [(1, 1024), (1, 2000), (3, 113), (3, 300), (5, 41), (5, 81)]
)
def test_no_sum_leaves_what_floats_count_exactly(side, channels):
    """The largest numbers there are, odd sums far beyond 2^24 among them."""
    x = RNG.choice([-127, 126, 127], (1, 6, 7, channels)).astype(np.int8)
    kernel = RNG.choice([-128, 127], (side, side, channels, 3)).astype(np.int8)
    x[0, :4], kernel[..., 0] = 127, 127
    kernel[0, 0, 0, 0] = 126
    given = jax.jit(integer._convolved)(x, kernel)
    padded = np.pad(x.astype(np.int64), ((0, 0), *[(side // 2,) * 2] * 2, (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))
    np.testing.assert_array_equal(given, np.einsum("nhwcij,ijcf->nhwf", views, kernel.astype(int)))


ONE = (integer.Node("a", ("x",)),)
CONTEXT = (
    integer.Node("up", ("z",), "leaky_relu", True, 4 * 6),
    integer.Node("around", ("y",), "", False, 6, 5),
    integer.Node("joint", ("up", "around", "known"), "leaky_relu", False, 8, 1),
    integer.Node("last", ("joint",), "", False, 2 * LATENT, 1),
)


def test_a_context_model_equals_its_definition_and_follows_its_floats():
    """Two branches of other sides and steps, 1×1, 3×3 and 5×5, leaky ReLU, depth to space."""
    module = entropy_parameters.EntropyParameters(CONTEXT, LATENT, mean=True)
    inputs = {
        "z": RNG.integers(-6, 7, (2, 3, 4, CHANNELS)).astype(np.float32),
        "y": (RNG.normal(0, 40, (2, 5, 7, LATENT)) / 16).round(4).astype(np.float32),
        "known": RNG.integers(0, 2, (2, 5, 7, LATENT)).astype(np.float32),
    }
    inputs["y"] = np.rint(inputs["y"] * 16) / np.float32(16)
    params = jax.device_get(module.init(jax.random.key(0), inputs)["params"])
    params["last_kernel"] = params["last_kernel"] * 3
    arrays = integer.quantise(CONTEXT, module.weights(params), inputs, RANGES)
    assert (arrays["y"]["shift"] < 4).all() and "z" not in arrays and "negative" in arrays["joint"]
    run = jax.jit(lambda arrays, inputs: integer.run(CONTEXT, arrays, inputs))
    for scale in (1, 64, 2**20):  # the last beyond all that inputs can say
        scaled = {name: value * np.float32(scale) for name, value in inputs.items()}
        given = run(arrays, scaled)
        assert given.shape == (2, 5, 7, 2 * LATENT) and given.dtype == jnp.int32
        expected = in_python(CONTEXT, arrays, scaled)
        np.testing.assert_array_equal(given, expected)
    real = np.asarray(module.apply({"params": params}, inputs))
    given = np.asarray(run(arrays, inputs))
    spread = real.std()
    assert np.abs(given[..., :LATENT] - real[..., :LATENT].clip(0, 63)).mean() < 0.3 + 0.03 * spread
    assert np.abs(given[..., LATENT:] / 16 - real[..., LATENT:]).mean() < 1 / 32 + 0.03 * spread


def test_follows_the_float_network(stack):
    module, params, z, layers = stack
    real = np.asarray(module.apply({"params": params}, z))
    given = np.asarray(run_integers(layers, jnp.asarray(z)))
    index, mean = given[..., :LATENT], given[..., LATENT:] / entropy_parameters.MEAN_STEPS
    assert index.min() >= 0 and index.max() <= 63
    spread = real.std()
    assert np.abs(index - real[..., :LATENT].clip(0, 63)).mean() < 0.25 + 0.02 * spread
    assert np.abs(mean - real[..., LATENT:]).mean() < 1 / 32 + 0.02 * spread


def test_is_the_same_in_every_way_of_running(stack):
    """Batch size, compilation, matmul precision and device count, where floats do move."""
    module, params, z, layers = stack
    expected = np.asarray(run_integers(layers, jnp.asarray(z)))
    run = jax.jit(run_integers)
    single = np.concatenate([run(layers, z[row : row + 1]) for row in range(len(z))])
    np.testing.assert_array_equal(single, expected)
    np.testing.assert_array_equal(run(layers, np.tile(z, (5, 1, 1, 1)))[:3], expected)
    with jax.default_matmul_precision("bfloat16"), jax.disable_jit():
        np.testing.assert_array_equal(run_integers(layers, jnp.asarray(z)), expected)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tiled = jax.device_put(np.tile(z, (2 * len(jax.devices()), 1, 1, 1)), rows)
    np.testing.assert_array_equal(run(layers, tiled)[:3], expected)
    # The float network moves table rows when it is computed from bfloat16 weights.
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16).astype(jnp.float32), params)
    moved = module.apply({"params": half}, z)
    assert (jnp.round(moved) != jnp.round(module.apply({"params": params}, z))).any()


def test_whatever_the_weights_sums_stay_in_32_bits():
    for scale in (1e-6, 1.0, 300.0):
        kernel = RNG.normal(0, scale, (3, 3, 8, 8))
        bias = RNG.normal(0, 50 * scale, 8)
        weights = {"a": integer.Weights(kernel, bias)}
        z = RNG.integers(-127, 128, (1, 3, 3, 8)).astype(np.float32)
        made = integer.quantise(ONE, weights, {"x": z}, [integer.Range(0, 63, 20 * scale)] * 8)
        for row in (made["a"][name] for name in ("multiplier", "first", "second")):
            assert (row >= 0).all()
        assert made["a"]["multiplier"].max() < 2**15
        given = np.asarray(integer.run(ONE, made, {"x": jnp.asarray(z)}))
        real = np.asarray(integer.run_float(ONE, weights, {"x": z})["a"]) / (20 * scale)
        assert np.abs(given - real.clip(0, 63)).max() < 1


def test_channels_that_say_nothing_stop_no_freezing():
    """As of an untrained network, or of channels that training has left: what is seen of them is
    next to nothing beside what their weights could give."""
    nodes = (integer.Node("a", ("x",), "relu", up=True), integer.Node("b", ("a",)))
    weights = {
        "a": integer.Weights(RNG.normal(0, 1, (3, 3, 2, 8)), np.full(8, 1e-7)),
        "b": integer.Weights(RNG.normal(0, 1, (3, 3, 2, 3)), np.full(3, 5.0)),
    }
    nothing = {"x": np.zeros((1, 4, 4, 2), np.float32)}
    made = integer.quantise(nodes, weights, nothing, [integer.Range(0, 63, 1.0)] * 3)
    given = integer.run(nodes, made, {"x": jnp.zeros((1, 4, 4, 2))})
    assert made["a"]["multiplier"].max() < 2**15 and (np.asarray(given) == 5).all()


@pytest.mark.parametrize("change, message", [(np.nan, "not finite"), (1e9, "too large")])
def test_weights_that_cannot_be_converted_are_refused(change, message):
    weights = {"a": integer.Weights(np.full((3, 3, 2, 2), change), np.zeros(2))}
    with pytest.raises(IcmError, match=message):
        integer.quantise(
            ONE, weights, {"x": np.ones((1, 2, 2, 2))}, [integer.Range(0, 63, 1.0)] * 2
        )
