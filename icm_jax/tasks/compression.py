"""Stage 2 of Omni-ICM: the feature codec, backbone and filter frozen.

    L = bits per pixel + λ · (d(f, f_hat) + Σ_i w_i · d(φ_i f, φ_i f_hat)),   i = layers 2 to 4

φ_i are the layers of the frozen tail (Feng et al. 2022, stage 2). d is the mean squared error
divided by the mean square of the target: features of two backbones have different scales, and with
this a λ means the same for both. `relative=False` gives the plain error.
"""

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax.codecs.codec import Codec, forward
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.tasks import views
from icm_jax.tasks.task import (
    FROZEN,
    TRAIN,
    Aux,
    Task,
    apply,
    build_codec,
    merge,
    require_output,
)


def compression(config: ConfigDict) -> Task:
    """The task, for any codec that takes "feature" in place of the image and gives it back.

    Fields: variant, width, dtype (of the tail); size, crop; filter, the codec whose output
    "feature" is f, and codec, which contains it (see `build_codec` of both); lmbda (λ);
    feature_weights (w_2, w_3, w_4); relative. What the codec has beside the filter is trained.

    Raises: IcmError for codecs that give no feature, or of which one does not contain the other.
    """
    tail = resnet.Tail(config.variant, config.width, dtype=jnp.dtype(config.dtype))
    inner, codec = filter_and_codec(config)
    pixels = math.prod(views.sides(config.size))

    def init(key, batch):
        keys = jax.random.split(key)
        image = views.centre(batch["image"][:1], config.size)
        variables = codec.init(keys[0], image)
        f = filtered(variables, image)
        merge(variables, "tail", tail.init(keys[1], f, train=False))
        return variables

    def filtered(variables, images):
        return forward(inner, variables, {"image": images}, images.shape[1:3]).outputs["feature"]

    def distance(target, given):
        target, given = target.astype(jnp.float32), given.astype(jnp.float32)
        error = jnp.square(target - given).mean()
        return error / (jnp.square(target).mean() + 1e-12) if config.relative else error

    def loss(variables, batch, key, step):
        del step
        keys = jax.random.split(key)
        images, _ = views.mild(batch["image"], config.size, crop=config.crop, key=keys[0])
        f = jax.lax.stop_gradient(filtered(variables, images))
        result = forward(codec, variables, {"feature": f}, images.shape[1:3], key=keys[1])
        f_hat = result.outputs["feature"]
        deep, _ = apply(tail, variables, "tail", f, False)
        deep_hat, _ = apply(tail, variables, "tail", f_hat, False)
        bpp = sum(bits.mean() for bits in result.bits.values()) / pixels
        errors = [distance(f, f_hat)]
        errors += [
            distance(jax.lax.stop_gradient(a), b) for a, b in zip(deep, deep_hat, strict=True)
        ]
        weighted = errors[0] + sum(
            w * e for w, e in zip(config.feature_weights, errors[1:], strict=True)
        )
        total = bpp + variables["constants"]["lambda"] * weighted
        return total, Aux({"bpp": bpp, "distortion_f": errors[0], "distortion": weighted}, {})

    def predict(variables, batch):
        images = views.centre(batch["image"], config.size)
        result = forward(codec, variables, {"image": images}, images.shape[1:3])
        return {"feature": result.outputs["feature"], "bits": sum(result.bits.values())}

    def groups(name):
        return TRAIN if name in codec.parts and name not in inner.parts else FROZEN

    return Task(init, loss, predict, groups, codec, {"lambda": jnp.float32(config.lmbda)})


def filter_and_codec(config: ConfigDict) -> tuple[Codec, Codec]:
    """The codecs of the fields filter and codec, found to fit."""
    inner, codec = build_codec(config.filter), build_codec(config.codec)
    for built in (inner, codec):
        require_output(built, "feature", "compression")
    lacking = set(inner.parts) - set(codec.parts)
    if lacking:
        raise IcmError(
            f"the codec {config.codec.name!r} has the parts {', '.join(codec.parts)}; it must "
            f"contain those of the filter, too: {', '.join(sorted(lacking))}"
        )
    return inner, codec
