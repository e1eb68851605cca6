"""Codecs of a few channels, and random images for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from strangers.codec import checkerboard_codec
from strangers.feature_codec import plain_codec

from icm_jax.codecs import (
    autoencoder_codec,
    bitstream,
    feature_codec,
    filter_codec,
    image_codec,
    layered_codec,
    scalable_codec,
    space_channel_codec,
)
from icm_jax.nets.yolo import yolov3

UNOPTIMISED = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""For XLA_FLAGS: compiling takes a third of the time (of 18 s the second flag left 11), and a fifth
less again if a program is not cut up for threads, which other tests need."""
RNG = np.random.default_rng(0)
SEEDED = RNG.bit_generator.state
"""That every test begins with, whatever ran before it."""


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(0, scale, shape), jnp.float32)


FEATURE = dict(
    variant="10",
    width=8,
    filter_channels=6,
    filter_widths=(4, 8, 8),
    channels=5,
    widths=(4, 8),
    hyper_channels=4,
)
BUILT = {
    "omni_feature": lambda: feature_codec(**FEATURE),
    "omni_filter": lambda: filter_codec("10", 8, 6, (4, 8, 8)),
    "autoencoder": lambda: autoencoder_codec(6, 3, 6, True, 1),
    "factorised": lambda: image_codec("factorised", 6, 8),
    "scale_hyperprior": lambda: image_codec("scale_hyperprior", 6, 8),
    "mean_scale_hyperprior": lambda: image_codec(
        "mean_scale_hyperprior", (4, 6, 8, 5), 8, levels=3, last=3
    ),
    "space_channel": lambda: space_channel_codec(
        (8, 6), (2, 3, 3), 2, (1, 1, 1), (1, 1, 1), 4, 5, 4, levels=3
    ),
}
STRANGERS = {
    "checkerboard": lambda: checkerboard_codec(4, 5, levels=3),
    "plain_feature": lambda: plain_codec("10", 8, 6, (4, 8, 8), 5),
}
DETECTOR = yolov3(2, 1 / 32, 0.1)
LAYERS = dict(blocks=(1, 1, 1), base_blocks=(1, 1, 1), inner=4, hyper_channels=5, side=4)
SCALABLE = {
    "disentangled": lambda: scalable_codec("disentangled", 6, 5, 4, 2, DETECTOR),
    "split": lambda: scalable_codec("split", 6, 3, 5, 1, DETECTOR, "cheng2020"),
    "residual": lambda: scalable_codec("residual", 6, 4, 5, 2, DETECTOR),
    "conditional": lambda: layered_codec(
        "conditional", (8, 6), (2, 3), (2, 3), 2, DETECTOR, **LAYERS, levels=3, ahead=True
    ),
    "layered_split": lambda: layered_codec(
        "split", (8, 6), (2, 3), (3,), 2, DETECTOR, **LAYERS, through="image"
    ),
}


@functools.cache
def small_codec(name) -> bitstream.FrozenCodec:
    before, RNG.bit_generator.state = RNG.bit_generator.state, SEEDED
    built, batch = (BUILT | STRANGERS | SCALABLE)[name](), images(2, 32, 32, 3)
    frozen = bitstream.freeze(built, initial(built, batch), batch)
    RNG.bit_generator.state = before
    return frozen


def initial(built, batch):
    """Variables of a codec; a detector's are drawn here, for they take a minute to compile."""
    key = jax.random.key(1)
    shapes = jax.eval_shape(built.init, key, batch)
    if "detector" not in shapes["params"]:
        variables = jax.jit(built.init)(key, batch)
        if "space_channel" in variables["params"]:
            variables = looking_around(variables)
        if "checkerboard" in variables["params"]:  # as if trained: means and scales that differ
            variables["params"]["checkerboard"]["last_kernel"] *= 40
        return variables

    def drawn(path, leaf):
        if path[-1].key == "kernel":
            return RNG.normal(0, np.prod(leaf.shape[:3]) ** -0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    (name,) = set(built.parts) - {"detector"}
    own = jax.jit(lambda: built.init(key, batch)["params"][name])()
    detector = {name: {"detector": tree["detector"]} for name, tree in shapes.items()}
    variables = jax.tree_util.tree_map_with_path(drawn, detector)
    variables["params"][name] = looking_around(own) if name == "layered" else own
    return variables


def looking_around(variables):
    """Bottlenecks begin as the identity, and none would see its neighbours."""
    return jax.tree.map(lambda x: x if x.any() else x + 0.05, variables)


def quality_of(built):
    """(as `encode` takes it, as `forward` takes it for two images)."""
    return (43.21, {"quality": np.full(2, 0.4321, np.float32)}) if built.qualities else (None, {})


def images(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def encoded(frozen, batch):
    return bitstream.encode(frozen, batch, quality=quality_of(frozen.codec)[0])
