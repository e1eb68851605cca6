"""Rate and distortion of image codecs: L = bits per pixel + λ · D.

D is the mean squared error on 0...255 over pixels and channels, or 1 - MS-SSIM, or both: MSE +
ms_ssim_weight · (1 - MS-SSIM). In the field's lists of λ (docs/papers.md 6.2) 1 - MS-SSIM weighs
1,220 to 1,330 times as much as MSE.

A codec with qualities sees every λ between the ends of `lambdas`: the examples of a batch have
qualities q at equal distances from a random start, modulo 1, and log λ goes linearly with q. An
example's loss is then divided by sqrt(λ / λ_max): else the highest rates, whose losses are the
largest, drown the gradients of the others.
"""

import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.codecs.codec import Codec, forward
from icm_jax.data.fields import FieldError
from icm_jax.errors import IcmError
from icm_jax.tasks import views
from icm_jax.tasks.task import TRAIN, Aux, Task, build_codec, require_output


def image_compression(config: ConfigDict) -> Task:
    """The task, for any codec with the output "image".

    Fields: codec (see `build_codec`); lambdas (λ, or its ends); metric (mse, ms_ssim or both) and
    ms_ssim_weight (of both); size (sides of the training views); straight_through.

    Raises: IcmError for an unknown metric, a codec without images, or λ that are not positive or
      not one or two.
    """
    codec = build_codec(config.codec)
    lambdas = [float(value) for value in config.lambdas]
    weights = _checked_weights(config, codec, lambdas)

    def loss(variables, batch, key, step):
        del step
        keys = jax.random.split(key, 3)
        x = views.cut(batch["image"], config.size, key=keys[0])
        inputs = {"image": x}
        ends = variables["constants"]["log_lambdas"]
        if codec.qualities:
            inputs["quality"], lmbda = views.qualities(keys[1], ends, len(x))
        else:
            lmbda = jnp.exp(ends)
        shape = x.shape[1:3]
        result = forward(
            codec, variables, inputs, shape, straight_through=config.straight_through, key=keys[2]
        )
        x, x_hat = x.astype(jnp.float32), result.outputs["image"]
        mse = jnp.square(x - x_hat).mean(axis=(1, 2, 3))
        distortion = weights[0] * mse
        if weights[1]:
            distortion += weights[1] * (1.0 - ops.ms_ssim(x, x_hat))
        bpp = functools.reduce(jnp.add, result.bits.values()) / math.prod(shape)
        total = ((bpp + lmbda * distortion) * jnp.sqrt(jnp.exp(ends[-1]) / lmbda)).mean()
        metrics = {"bpp": bpp.mean(), "mse": mse.mean(), "distortion": distortion.mean()}
        metrics["psnr"] = (20 * jnp.log10(255.0) - 10 * jnp.log10(mse)).mean()
        return total, Aux(metrics, {})

    def predict(variables, batch):
        result = forward(codec, variables, batch, batch["image"].shape[1:3])
        return {"image": result.outputs["image"]}

    return Task(
        init=lambda key, batch: codec.init(key, batch["image"]),
        loss=loss,
        predict=predict,
        groups=lambda name: TRAIN,
        codec=codec,
        constants={"log_lambdas": jnp.log(jnp.asarray(lambdas, jnp.float32))},
    )


def _checked_weights(config: ConfigDict, codec: Codec, lambdas: list[float]) -> tuple[float, float]:
    """Of the mean squared error and of MS-SSIM, once all fields are found to fit the codec."""
    require_output(codec, "image", "image_compression")
    weights = {"mse": (1.0, 0.0), "ms_ssim": (0.0, 1.0), "both": (1.0, config.ms_ssim_weight)}
    if config.metric not in weights:
        raise IcmError(f"unknown metric {config.metric!r}; choose one of {', '.join(weights)}")
    if min(lambdas, default=0) <= 0 or len(lambdas) != 1 + codec.qualities:
        told = (
            f"is {config.lambdas!r} for a codec {'with' if codec.qualities else 'without'} "
            "qualities: give the two ends of λ to a codec of several quality levels, and one λ to "
            "a codec of one; all positive"
        )
        raise FieldError(("task", "lambdas"), config.lambdas, told)
    if weights[config.metric][1] and min(views.sides(config.size)) < 176:
        told = f"is {config.size}; MS-SSIM needs views of at least 176 pixels"
        raise FieldError(("task", "size"), config.size, told)
    return weights[config.metric]
