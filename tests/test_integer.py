"""Integer hyper-synthesis: one result everywhere, close to the float network it was made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icm_jax.errors import IcmError
from icm_jax.nets import integer, transforms

RNG = np.random.default_rng(3)
CHANNELS, LATENT = 6, 5


@pytest.fixture(scope="module")
def stack():
    """(float parameters, sample inputs, integer stack) of a hyper-synthesis with means."""
    module = transforms.HyperSynthesis(CHANNELS, LATENT, mean=True)
    z = RNG.integers(-6, 7, (3, 4, 5, CHANNELS)).astype(np.float32)
    params = jax.device_get(module.init(jax.random.key(0), z)["params"])
    params["Conv_0"]["kernel"] = params["Conv_0"]["kernel"] * 5  # a range of scales and means
    return module, params, z, transforms.integer_hyper_synthesis(params, z, mean=True)


def in_python(layers, x):
    """The definition in NumPy's 64-bit integers: nothing can overflow or be reordered here."""
    x = np.clip(x, -127, 127).astype(np.int64)
    for number, up in enumerate((True, True, False)):
        layer = {name: value.astype(np.int64) for name, value in layers[f"layer_{number}"].items()}
        n, h, w, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        acc = np.zeros((n, h, w, len(layer["bias"])), np.int64) + layer["bias"]
        for row, column in np.ndindex(3, 3):
            acc += padded[:, row : row + h, column : column + w] @ layer["kernel"][row, column]
        for bits, factor in ((layer["first"], layer["multiplier"]), (layer["second"], 1)):
            acc = (acc + (2**bits) // 2) // 2**bits * factor
        x = np.clip(acc, layer["low"], layer["high"])
        if up:
            x = (
                x.reshape(n, h, w, 2, 2, -1)
                .transpose(0, 1, 3, 2, 4, 5)
                .reshape(n, 2 * h, 2 * w, -1)
            )
    return x


def test_equals_its_definition_in_wide_integers(stack):
    *_, layers = stack
    for scale in (1, 10, 1000):  # the last far outside of the sample: clipped
        z = RNG.normal(0, 3 * scale, (2, 3, 4, CHANNELS)).round().astype(np.float32)
        given = jax.jit(transforms.run_hyper_synthesis)(layers, z)
        assert given.dtype == jnp.int32
        np.testing.assert_array_equal(given, in_python(layers, z))


def test_follows_the_float_network(stack):
    module, params, z, layers = stack
    real = np.asarray(module.apply({"params": params}, z))
    given = np.asarray(transforms.run_hyper_synthesis(layers, jnp.asarray(z)))
    index, mean = given[..., :LATENT], given[..., LATENT:] / transforms.MEAN_STEPS
    assert index.min() >= 0 and index.max() <= 63
    spread = real.std()
    assert np.abs(index - real[..., :LATENT].clip(0, 63)).mean() < 0.25 + 0.02 * spread
    assert np.abs(mean - real[..., LATENT:]).mean() < 1 / 32 + 0.02 * spread


def test_is_the_same_in_every_way_of_running(stack):
    """Batch size, compilation, matmul precision and device count, where floats do move."""
    module, params, z, layers = stack
    expected = np.asarray(transforms.run_hyper_synthesis(layers, jnp.asarray(z)))
    run = jax.jit(transforms.run_hyper_synthesis)
    single = np.concatenate([run(layers, z[row : row + 1]) for row in range(len(z))])
    np.testing.assert_array_equal(single, expected)
    np.testing.assert_array_equal(run(layers, np.tile(z, (5, 1, 1, 1)))[:3], expected)
    with jax.default_matmul_precision("bfloat16"), jax.disable_jit():
        np.testing.assert_array_equal(
            transforms.run_hyper_synthesis(layers, jnp.asarray(z)), expected
        )
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
        layers = [integer.FloatLayer(kernel, bias, False, False)]
        z = RNG.integers(-127, 128, (1, 3, 3, 8)).astype(np.float32)
        made = integer.quantise(layers, z, [integer.Range(0, 63, 20 * scale)] * 8)
        for row in (made["layer_0"][name] for name in ("multiplier", "first", "second")):
            assert (row >= 0).all()
        assert made["layer_0"]["multiplier"].max() < 2**15
        given = np.asarray(integer.run(made, jnp.asarray(z), [False]))
        real = integer.run_float(layers, z)[0] / (20 * scale)
        assert np.abs(given - real.clip(0, 63)).max() < 1


@pytest.mark.parametrize("change, message", [(np.nan, "not finite"), (1e9, "too large")])
def test_weights_that_cannot_be_converted_are_refused(change, message):
    layers = [integer.FloatLayer(np.full((3, 3, 2, 2), change), np.zeros(2), False, False)]
    with pytest.raises(IcmError, match=message):
        integer.quantise(layers, np.ones((1, 2, 2, 2)), [integer.Range(0, 63, 1.0)] * 2)
