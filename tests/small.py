"""Codecs of a few channels, and random images for them."""

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.codecs import bitstream, feature_codec, filter_codec, image_codec

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(0, scale, shape), jnp.float32)


FEATURE = dict(
    variant="18",
    width=8,
    filter_channels=6,
    filter_widths=(4, 8, 8),
    channels=5,
    widths=(4, 8),
    hyper_channels=4,
)
BUILT = {
    "omni_feature": lambda: feature_codec(**FEATURE),
    "omni_filter": lambda: filter_codec("18", 8, 6, (4, 8, 8)),
    "factorised": lambda: image_codec("factorised", 6, 8),
    "scale_hyperprior": lambda: image_codec("scale_hyperprior", 6, 8),
    "mean_scale_hyperprior": lambda: image_codec(
        "mean_scale_hyperprior", (4, 6, 8, 5), 8, levels=3, last=3
    ),
}


def small_codec(name) -> bitstream.FrozenCodec:
    built, batch = BUILT[name](), images(2, 32, 32, 3)
    return bitstream.freeze(built, jax.jit(built.init)(jax.random.key(1), batch), batch)


def quality_of(built):
    """(as `encode` takes it, as `forward` takes it for two images)."""
    return (43.21, {"quality": np.full(2, 0.4321, np.float32)}) if built.qualities else (None, {})


def images(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def encoded(frozen, batch):
    return bitstream.encode(frozen, batch, quality=quality_of(frozen.codec)[0])
