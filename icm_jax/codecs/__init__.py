"""Codecs: nets and priors wired into segments."""

from icm_jax.codecs.autoencoder import autoencoder_codec
from icm_jax.codecs.compressai import compressai_codec
from icm_jax.codecs.feature import feature_codec, filter_codec
from icm_jax.codecs.hyperprior import image_codec
from icm_jax.codecs.layered import layered_codec
from icm_jax.codecs.scalable import scalable_codec
from icm_jax.codecs.space_channel import space_channel_codec

CODECS = {
    "omni_filter": filter_codec,
    "omni_feature": feature_codec,
    "image": image_codec,
    "space_channel": space_channel_codec,
    "compressai": compressai_codec,
    "autoencoder": autoencoder_codec,
    "scalable": scalable_codec,
    "layered": layered_codec,
}
"""Name -> builder; a builder called twice with equal arguments returns the same Codec."""
