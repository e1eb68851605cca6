"""The compressive autoencoder: its layers, its quantiser, its rate, and tasks that stand on it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from icm_jax.codecs import autoencoder_codec, bitstream
from icm_jax.codecs.autoencoder import relaxed
from icm_jax.codecs.codec import forward
from icm_jax.errors import IcmError
from icm_jax.main import load_experiment
from icm_jax.nets.autoencoder import Centres, CodeAnalysis, CodeSynthesis, MirrorConv
from icm_jax.tasks import build_task

RNG = np.random.default_rng(0)
AUTOENCODER = dict(name="autoencoder", width=4, channels=3, centres=5, learned=True, blocks=1)
CODE = dict(codec=AUTOENCODER)
IMAGE = dict(name="image", kind="factorised", width=4, channels=6)
RATE = dict(target_bpp=0.05, beta=100.0)
NETWORK = dict(width=2, size=16, crop=(1.0, 1.0), dtype="float32", classes=3)
BATCH = {
    "image": RNG.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8),
    "label": np.array([0, 1, 2, 1], np.int32),
    "valid": np.array([True, True, True, False]),
}


@pytest.mark.parametrize("kernel, stride, front", [(3, 1, 1), (5, 2, 1)])
def test_convolutions_see_mirrored_edges(kernel, stride, front):
    """NumPy's own mirroring, one product a place; and the gradient of the plain convolution."""
    network = MirrorConv(2, kernel, stride)
    x = RNG.normal(size=(2, 6, 8, 3)).astype(np.float32)
    variables = network.init(jax.random.key(0), x)
    variables["params"]["bias"] = jnp.asarray([0.5, -0.25])
    weights, bias = (np.asarray(variables["params"][k]) for k in ("kernel", "bias"))
    wide = np.pad(x, ((0, 0), *[(front, kernel // 2)] * 2, (0, 0)), mode="reflect")
    expected = np.zeros((2, 6 // stride, 8 // stride, 2))
    for row in range(expected.shape[1]):
        for column in range(expected.shape[2]):
            at = row * stride, column * stride
            window = wide[:, at[0] : at[0] + kernel, at[1] : at[1] + kernel]
            expected[:, row, column] = np.tensordot(window, weights, 3) + bias
    np.testing.assert_allclose(network.apply(variables, x), expected, rtol=1e-4, atol=1e-4)
    outward = jnp.asarray(RNG.normal(size=expected.shape), jnp.float32)

    def plain(kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            wide, kernel, (stride,) * 2, "VALID", dimension_numbers=numbers
        )
        return (y * outward).sum()

    own = jax.grad(lambda v: (network.apply(v, x) * outward).sum())(variables)["params"]["kernel"]
    np.testing.assert_allclose(own, jax.grad(plain)(weights), rtol=1e-3, atol=1e-3)


def test_the_quantiser_is_hard_forward_and_soft_backward():
    network = Centres(4, True)
    y = jnp.asarray(RNG.normal(0, 1.5, (2, 3, 4, 2)), jnp.float32)
    values = jnp.asarray([-1.7, -0.4, 0.3, 2.0])
    variables = {"params": {"values": values}}
    found = network.apply(variables, y)
    distances = np.abs(np.asarray(y)[..., None] - np.asarray(values))
    np.testing.assert_array_equal(found.symbols, distances.argmin(-1))
    np.testing.assert_allclose(found.q, np.asarray(values)[distances.argmin(-1)], atol=1e-6)
    shares = [np.bincount(np.ravel(found.symbols[..., c]), minlength=4) / 24 for c in range(2)]
    np.testing.assert_allclose(found.histogram, shares, atol=1e-6)

    def soft(y):
        weights = np.exp(-((np.asarray(y, np.float64)[..., None] - np.asarray(values)) ** 2))
        return (weights / weights.sum(-1, keepdims=True) * np.asarray(values)).sum(-1)

    slope = (soft(y + 1e-4) - soft(y - 1e-4)) / 2e-4
    given = jax.grad(lambda y: network.apply(variables, y).q.sum())(y)
    np.testing.assert_allclose(given, slope, atol=2e-3)
    np.testing.assert_array_equal(network.apply(variables, y, method="nearest"), found.symbols)
    np.testing.assert_allclose(
        network.apply(variables, found.symbols, method="take"), found.q, atol=1e-6
    )
    fixed = jax.grad(lambda v: Centres(4, False).apply(v, y).q.sum())(variables)
    assert np.abs(fixed["params"]["values"]).max() == 0


def test_autoencoders_begin_as_a_wavelet_packet_and_its_inverse():
    """With as many channels as 8×8 pixels have values nothing is lost but by the weights' noise."""
    x = np.random.default_rng(0).uniform(0, 255, (2, 16, 24, 3)).astype(np.float32)
    analysis, synthesis = CodeAnalysis(192, width=96, blocks=1), CodeSynthesis(width=96, blocks=1)
    y, _ = analysis.init_with_output(jax.random.key(0), x)
    x_hat, _ = synthesis.init_with_output(jax.random.key(1), y)
    assert np.abs(x_hat - x).mean() < 0.05 * x.std()


def test_bytes_are_those_of_the_histogram():
    """Skewed shares: 8 bits a byte of what -log2 says, and the code comes back exactly."""
    codec = autoencoder_codec(4, 3, 5, True, 1)
    images = RNG.integers(0, 256, (2, 128, 96, 3)).astype(np.uint8)
    variables = jax.jit(codec.init)(jax.random.key(0), images[:1])
    x = jnp.asarray(images, jnp.float32)
    _, q, bits, updated = jax.jit(lambda v: relaxed(codec, v, x))(variables)
    symbols = np.asarray(jax.jit(codec.analyse)(variables, {"image": images})["y"])
    shares = np.stack([(symbols == n).mean(axis=(0, 1, 2)) for n in range(5)], axis=1)
    entropy = -np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-12)), 0).sum(1)
    np.testing.assert_allclose(bits, entropy.mean(), rtol=1e-4)
    np.testing.assert_allclose(updated["histogram"], 0.99 / 5 + 0.01 * shares, atol=1e-6)
    trained = {**variables, "batch_stats": {"autoencoder": {"histogram": jnp.asarray(shares)}}}
    trained["batch_stats"]["autoencoder"]["histogram"] = jnp.asarray(shares, jnp.float32)
    frozen = bitstream.freeze(codec, trained, images)
    estimated = bitstream.estimate(frozen, images)["y"]
    np.testing.assert_allclose(estimated.sum(), entropy.sum() * 2 * 16 * 12, rtol=1e-3)
    streams = bitstream.encode(frozen, images)
    for stream, own in zip(streams, estimated, strict=True):
        assert abs(8 * len(stream) - own) < 0.01 * own + 256
    decoded = bitstream.decode(frozen, streams, "feature")
    np.testing.assert_allclose(decoded, q, atol=1e-5)
    result = forward(codec, trained, {"image": images}, (128, 96))
    np.testing.assert_allclose(
        bitstream.decode(frozen, streams, "image"), result.outputs["image"], atol=1e-2
    )


def test_the_rate_costs_only_above_its_target():
    fields = dict(CODE, **RATE, name="autoencoder_compression", size=16)
    task = build_task(ConfigDict(fields))
    constants = dict(task.constants)
    assert float(constants["target"]) == pytest.approx(0.05 * 64 / 3)
    variables = jax.jit(task.init)(jax.random.key(0), BATCH) | {"constants": constants}
    loss = jax.jit(lambda v: task.loss(v, BATCH, jax.random.key(1), 0))
    values = variables["params"]["autoencoder"]["quantiser"]["values"]
    regular = 0.1 * float(jnp.square(values).mean())
    for target in (0.0, 9.0):
        own = dict(variables, constants=dict(constants, target=jnp.float32(target)))
        total, aux = loss(own)
        bits = float(aux.metrics["bpp"]) * 64 / 3
        over = 100.0 * max(bits - target, 0.0)
        assert bits > 0.1
        np.testing.assert_allclose(total, float(aux.metrics["mse"]) + over + regular, rtol=1e-5)


def test_joint_training_moves_the_codec_and_a_frozen_one_stays():
    joint = dict(CODE, **RATE, **NETWORK, name="joint_classification", variant="c39", gamma=0.01)
    alone = dict(CODE, **NETWORK, name="classification", variant="c39")
    alone |= dict(frontend="code", mode="finetune")
    joint, alone = (build_task(ConfigDict(fields)) for fields in (joint, alone))
    variables = jax.jit(joint.init)(jax.random.key(0), BATCH)
    variables |= {"constants": dict(joint.constants)}
    trained = {n for n in variables["params"] if joint.groups(n) == "train"}
    assert trained == {"autoencoder", "tail", "classifier"}
    assert {n for n in trained if alone.groups(n) == "train"} == {"tail", "classifier"}

    def cross_entropy(params, gamma):
        constants = variables["constants"] | {"gamma": jnp.float32(gamma)}
        own = dict(variables, params=params, constants=constants)
        return joint.loss(own, BATCH, jax.random.key(1), 0)[0]

    gradient = jax.jit(jax.grad(cross_entropy))(variables["params"], 0.0)["autoencoder"]
    first = gradient["analysis"]["last"]["kernel"]
    assert np.abs(first).max() > 0  # through the quantiser
    assert np.abs(gradient["synthesis"]["last"]["kernel"]).max() == 0
    # In evaluation both read the same code, from an image or decoded before.
    image = {"image": BATCH["image"]}
    logits = [jax.jit(task.predict)(variables, image)["logits"] for task in (joint, alone)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    code = forward(joint.codec, variables, image, (16, 16)).outputs["feature"]
    given = jax.jit(alone.predict)(variables, {"feature": code})["logits"]
    np.testing.assert_allclose(given, logits[1], rtol=1e-4, atol=1e-5)


def test_networks_on_decoded_images_train_on_what_they_will_see():
    fields = dict(CODE, **NETWORK, name="classification", variant="18", mode="finetune")
    on_decoded, on_pixels = (
        build_task(ConfigDict(dict(fields, frontend=name))) for name in ("decoded", "pixels")
    )
    variables = jax.jit(on_decoded.init)(jax.random.key(0), BATCH)
    groups = {name: on_decoded.groups(name) for name in variables["params"]}
    assert groups == dict(autoencoder="frozen", head="train", tail="train", classifier="train")
    # Evaluation gives pictures that were decoded from files: they are taken as they are.
    logits = [jax.jit(task.predict)(variables, BATCH)["logits"] for task in (on_decoded, on_pixels)]
    np.testing.assert_allclose(*logits, rtol=1e-5)

    def loss(codec, task):
        own = dict(variables, params={**variables["params"], "autoencoder": codec})
        return task.loss(own, BATCH, jax.random.key(1), 0)[0]

    codec = variables["params"]["autoencoder"]
    value, gradient = jax.jit(jax.value_and_grad(lambda c: loss(c, on_decoded)))(codec)
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(gradient))
    assert abs(float(value) - float(jax.jit(lambda c: loss(c, on_pixels))(codec))) > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(codec=dict(AUTOENCODER, centres=1)), "no autoencoder of width 4"),
        (dict(codec=IMAGE), "trains codecs named 'autoencoder'"),
        ({"size": 20}, "multiple of 8"),
        ({"target_bpp": 0.0}, "target_bpp is .*above 0"),
    ],
)
def test_bad_autoencoder_configs_are_refused(change, message):
    fields = dict(CODE, **RATE, name="autoencoder_compression", size=16)
    with pytest.raises(IcmError, match=message):
        build_task(ConfigDict(fields | change))


def test_the_experiment_has_networks_on_pixels_and_the_arm_that_is_trained_jointly():
    module = load_experiment(pathlib.Path(__file__).parents[1] / "configs" / "cresnet.py")
    tasks = {run.name: run.task for run in module.runs(module.get_config("imagenet"))}
    assert tasks["seed0/joint-0.1"].variant == "c51"  # though c39 is an arm, too
    assert tasks["seed0/p50"].frontend == "pixels"
    assert [name for name in tasks if "p50" in name] == ["seed0/p50"]  # of three points
    config = module.get_config("demo")
    config.arms, config.joint.steps, config.segment.steps = ("p50", "c51"), 100, 100
    config.points = ((0.33, 16),)
    runs = {run.name.partition("/")[2]: run for run in module.runs(config)}
    starts = {name: [start.run for start in run.start] for name, run in runs.items()}
    assert starts["p50"] == [] and starts["p50-d"] == ["seed0/p50"]
    assert starts["joint-d-0.33"] == ["seed0/joint-0.33"]
    assert runs["joint-d-0.33"].start[0].codec and "label" not in runs["joint-d-0.33"].needs
    config.codecs = "elsewhere"  # DeepLab alone, on what was trained on other data
    there = {run.name.partition("/")[2]: run.start for run in module.runs(config)}
    assert list(there) == ["p50-d", "c51-d-0.33", "joint-d-0.33"]
    assert {start.workdir for starts in there.values() for start in starts} == {"elsewhere"}
    config.segment.steps = 0
    with pytest.raises(IcmError, match=r"--config\.codecs is for DeepLab: give data"):
        module.runs(config)
    config.codecs = ""
    config.arms = ("p50",)
    assert module.notes(config) == ["No joint training: the arms have no c51."]
    assert [run.name for run in module.runs(config)][-1] == "seed0/autoencoder-0.33"
