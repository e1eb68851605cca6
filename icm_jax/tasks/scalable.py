"""Scalable coding for a frozen detector and for humans (Özyılkan et al. 2023, equation 2).

    L = bits per pixel of both layers + λ · (MSE(x, x_hat) + w · d(f, f_hat) + u · D(f, f_hat))

d is the mean squared error divided by the mean square of f: features of two detectors have
different scales, and with this a weight w means the same for both. MSE is on 0...255. D, which the
paper does not have (u = 0), is how far the outputs of the frozen tail on f_hat are from those on f,
in nats per 16 × 16 pixels (`detection.divergence`): the deeper in the network the distortion is
measured, the fewer bits a task takes (Harell et al. 2022), and of early features as those of
YOLOv3-tiny few directions matter to what follows.
"""

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax.codecs.codec import forward
from icm_jax.codecs.scalable import DETECTOR, LATENT
from icm_jax.data.fields import FieldError
from icm_jax.nets.detector import Part
from icm_jax.nets.yolo import build_detector
from icm_jax.tasks import views
from icm_jax.tasks.detection import divergence
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, apply, build_codec


def scalable_compression(config: ConfigDict) -> Task:
    """The task.

    Fields: detector (name and arguments, see `icm_jax.nets.yolo.DETECTORS`), classes; codec (see
    `build_codec`; it is also given the detector); lmbda (λ); feature_weight (w); output_weight (u);
    size (sides of the training views, a multiple of 32); straight_through.
    """
    detector = build_detector(config.detector, config.classes)
    codec = build_codec(dict(config.codec, detector=detector))
    if any(side % detector.grid for side in views.sides(config.size)):
        told = f"is {config.size}; the detector takes sides that are multiples of {detector.grid}"
        raise FieldError(("task", "size"), config.size, told)
    front, tail = Part(detector, end=detector.split), Part(detector, detector.split)
    weights = {"lambda": config.lmbda, "feature_weight": config.feature_weight}
    if config.get("output_weight"):
        weights["output_weight"] = config.output_weight

    def loss(variables, batch, key, step):
        del step
        keys = jax.random.split(key)
        image = views.cut(batch["image"], config.size, key=keys[0])
        x = image.astype(jnp.float32)
        f, _ = apply(front, variables, DETECTOR, x / 255.0, False)
        f = jax.lax.stop_gradient(f)
        inputs, rounds = {"image": image, "feature": f}, config.straight_through
        result = forward(
            codec, variables, inputs, x.shape[1:3], straight_through=rounds, key=keys[1]
        )
        f_hat, pixels = result.outputs["feature"], math.prod(views.sides(config.size))
        metrics = _rates(codec, result.bits, pixels)
        rate = sum(metrics.values())
        metrics["mse"] = jnp.square(x - result.outputs["image"]).mean(axis=(1, 2, 3)).mean()
        metrics["distortion_f"] = jnp.square(f - f_hat).mean() / (jnp.square(f).mean() + 1e-12)
        constants = variables["constants"]
        distortion = metrics["mse"] + constants["feature_weight"] * metrics["distortion_f"]
        if "output_weight" in weights:
            both = [apply(tail, variables, DETECTOR, given, False)[0] for given in (f, f_hat)]
            metrics["divergence"] = divergence(*both) * LATENT**2 / pixels
            distortion += constants["output_weight"] * metrics["divergence"]
        return rate + constants["lambda"] * distortion, Aux(metrics, {})

    def predict(variables, batch):
        return forward(codec, variables, batch, batch["image"].shape[1:3]).outputs

    return Task(
        init=lambda key, batch: codec.init(key, batch["image"]),
        loss=loss,
        predict=predict,
        groups=lambda name: FROZEN if name == DETECTOR else TRAIN,
        codec=codec,
        constants={name: jnp.float32(value) for name, value in weights.items()},
    )


def _rates(codec, bits, pixels: int) -> dict:
    """Bits per pixel of both layers, means over images."""
    return {
        name: sum(bits[s.name].mean() for s in codec.segments if s.layer == layer) / pixels
        for layer, name in enumerate(("bpp_base", "bpp_enhancement"))
    }
