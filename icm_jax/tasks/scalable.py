"""Scalable coding for a frozen detector and for humans (Özyılkan et al. 2023, equation 2).

    L = bits per pixel of both layers + λ · (v · MSE(x, x_hat) + w · d(f, f_hat) + u · D(f, f_hat))

d is the mean squared error divided by the mean square of f: features of two detectors have
different scales, and with this a weight w means the same for both. MSE is on 0...255, v = 1. D,
which the paper does not have (u = 0), is how far the outputs of the frozen tail on f_hat are from
those on f, in nats per 16 × 16 pixels (`detection.divergence`): the deeper in the network the
distortion is measured, the fewer bits a task takes (Harell et al. 2022), and of early features as
those of YOLOv3-tiny few directions matter to what follows.

A codec with qualities sees every λ between two ends, as in `image_compression`. Where it begins as
a trained picture codec, the picture's transforms may be kept as they are (`fixed`), and the picture
is not looked at in training (v = 0); nor is the feature where the base is kept, too (w = u = 0):
what is left is the rate, of which the enhancement's prior learns what the base has told it.
"""

import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icm_jax.codecs.codec import Outputs, forward
from icm_jax.codecs.scalable import DETECTOR, LATENT
from icm_jax.data.fields import FieldError
from icm_jax.errors import IcmError
from icm_jax.nets.detector import Part
from icm_jax.nets.yolo import build_detector
from icm_jax.tasks import views
from icm_jax.tasks.detection import divergence
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, apply, build_codec


def scalable_compression(config: ConfigDict) -> Task:
    """The task.

    Fields: detector (name and arguments, see `icm_jax.nets.yolo.DETECTORS`), classes; codec (see
    `build_codec`; it is also given the detector); lambdas (λ, or its ends); feature_weight (w),
    output_weight (u), picture_weight (v); fixed (parameters that stay, as "layered/picture/gain");
    size (sides of the training views, a multiple of 32); straight_through.

    Raises: IcmError for λ that are not one or, of a codec with qualities, two.
    """
    detector = build_detector(config.detector, config.classes)
    codec = build_codec(dict(config.codec, detector=detector))
    front, tail = Part(detector, end=detector.split), Part(detector, detector.split)
    weights = _checked_weights(config, codec, detector)
    looks, fixed = weights["picture_weight"] > 0, tuple(config.get("fixed", ()))
    feels = weights["feature_weight"] + weights["output_weight"] > 0
    wanted = ["image"] * looks + ["feature"] * feels
    seen = codec._replace(outputs=Outputs(**{name: codec.outputs[name] for name in wanted}))

    def loss(variables, batch, key, step):
        del step
        keys, constants = jax.random.split(key, 3), variables["constants"]
        variables = {**variables, "params": kept(variables["params"], fixed)}
        image = views.cut(batch["image"], config.size, key=keys[0])
        x = image.astype(jnp.float32)
        f, _ = apply(front, variables, DETECTOR, x / 255.0, False)
        f = jax.lax.stop_gradient(f)
        inputs, lmbda = {"image": image, "feature": f}, jnp.exp(constants["log_lambdas"])
        if codec.qualities:
            inputs["quality"], lmbda = views.qualities(keys[2], constants["log_lambdas"], len(x))
        rounds, shape = config.straight_through, x.shape[1:3]
        result = forward(seen, variables, inputs, shape, straight_through=rounds, key=keys[1])
        pixels = math.prod(views.sides(config.size))
        found = _rates(codec, result.bits, pixels)
        rate, distortion = sum(found.values()), 0.0
        if looks:
            found["mse"] = jnp.square(x - result.outputs["image"]).mean(axis=(1, 2, 3))
            distortion += constants["picture_weight"] * found["mse"]
        if feels:
            found["distortion_f"] = _relative(f, f_hat := result.outputs["feature"])
            distortion += constants["feature_weight"] * found["distortion_f"]
            if weights["output_weight"]:
                both = [apply(tail, variables, DETECTOR, given, False)[0] for given in (f, f_hat)]
                found["divergence"] = divergence(*both) * LATENT**2 / pixels
                distortion += constants["output_weight"] * found["divergence"]
        even = jnp.sqrt(jnp.exp(constants["log_lambdas"][-1]) / lmbda)
        total = ((rate + lmbda * distortion) * even).mean()
        return total, Aux({name: value.mean() for name, value in found.items()}, {})

    def predict(variables, batch):
        return forward(codec, variables, batch, batch["image"].shape[1:3]).outputs

    return Task(
        init=lambda key, batch: codec.init(key, batch["image"]),
        loss=loss,
        predict=predict,
        groups=lambda name: FROZEN if name == DETECTOR else TRAIN,
        codec=codec,
        constants={name: jnp.asarray(value, jnp.float32) for name, value in weights.items()},
    )


def _checked_weights(config: ConfigDict, codec, detector) -> dict:
    """Of the loss, by name, once the fields are found to fit the codec and the detector."""
    if any(side % detector.grid for side in views.sides(config.size)):
        told = f"is {config.size}; the detector takes sides that are multiples of {detector.grid}"
        raise FieldError(("task", "size"), config.size, told)
    ends = [float(value) for value in config.lambdas]
    if len(ends) != 1 + codec.qualities:
        told = f"is {config.lambdas!r}; give one λ, and to a codec with qualities the two ends of λ"
        raise FieldError(("task", "lambdas"), config.lambdas, told)
    weights = {"log_lambdas": np.log(ends), "feature_weight": config.feature_weight}
    optional = dict(output_weight=0.0, picture_weight=1.0)
    return weights | {name: config.get(name, value) for name, value in optional.items()}


def _relative(f, f_hat):
    """Squared error of a feature over its mean square, float32 [N]."""
    return jnp.square(f - f_hat).mean(axis=(1, 2, 3)) / (jnp.square(f).mean() + 1e-12)


def _rates(codec, bits, pixels: int) -> dict:
    """Bits per pixel of both layers, float32 [N]."""
    return {
        name: sum(bits[s.name] for s in codec.segments if s.layer == layer) / pixels
        for layer, name in enumerate(("bpp_base", "bpp_enhancement"))
    }


def kept(params, fixed: tuple[str, ...]):
    """Parameters through which no gradient flows to those below the paths `fixed`.

    Raises: IcmError for a path that leads to none.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path in fixed:
        below = [name for name in flat if name == path or name.startswith(path + "/")]
        if not below:
            raise IcmError(f"task.fixed has {path!r}, where no parameters lie")
        flat |= {name: jax.lax.stop_gradient(flat[name]) for name in below}
    return flax.traverse_util.unflatten_dict(flat, sep="/")
