"""Stage 0 of Omni-ICM: the information filter alone, on features of a frozen head.

    L = bits per pixel + 128 · L1(f, f')                       (docs/papers.md 5.2, stage 0)

The head's BatchNorm statistics follow the data even then: those of an untrained head are arbitrary,
and stage 1 would hand the filter features of another scale.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.codecs.codec import Codec, forward
from icm_jax.nets import resnet
from icm_jax.tasks import views
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, apply, build_codec, require_output

L1_WEIGHT = 128.0


def filter_pretraining(config: ConfigDict) -> Task:
    """The task, for any codec of a head's features.

    Fields: variant, width, dtype, bn_groups (of the head); size, crop; codec, the filter (see
    `build_codec`). What it has beside the head is trained.

    Raises: IcmError for a codec that gives no feature.
    """
    codec = build_codec(config.codec)
    require_output(codec, "feature", "filter_pretraining")
    run = filtering(config, codec)

    def init(key, batch):
        # Stage 1 splits its key likewise: both begin with the same head and filter.
        return codec.init(jax.random.split(key)[0], views.centre(batch["image"][:1], config.size))

    def loss(variables, batch, key, step):
        del step
        keys = jax.random.split(key, 3)
        images, _ = views.mild(batch["image"], config.size, crop=config.crop, key=keys[0])
        passed = run(variables, images, True, keys[2])
        bpp = passed.bits.mean() / math.prod(views.sides(config.size))
        distance = jnp.abs(passed.f.astype(jnp.float32) - passed.feature).mean()
        stats = variables["batch_stats"] | {"head": passed.head_stats}
        metrics = {"bpp": bpp, "l1": distance}
        return bpp + L1_WEIGHT * distance, Aux(metrics, {"batch_stats": stats})

    def predict(variables, batch):
        images = views.centre(batch["image"], config.size)
        return {"feature": run(variables, images, False, None).feature}

    return Task(init, loss, predict, lambda name: FROZEN if name == "head" else TRAIN, codec)


class Passed(NamedTuple):
    """What head and filter make of images.

    Attributes:
      f: of the head, float [N, H/4, W/4, C]. feature: f', float32 of that shape.
      bits: float32 [N], of an image. head_stats: the head's new BatchNorm statistics.
    """

    f: jax.Array
    feature: jax.Array
    bits: jax.Array
    head_stats: dict


def filtering(config: ConfigDict, codec: Codec) -> Callable[..., Passed]:
    """(variables, images float32 [N, H, W, 3] on 0...255, train, key) -> `Passed`.

    With a key the prior sees noisy latents, the decoder straight-through rounded ones; without one
    both see rounded ones, as in a file. `train` is of the head's BatchNorm.
    """
    dtype = jnp.dtype(config.dtype)
    head = resnet.Head(config.variant, config.width, dtype, config.get("bn_groups", 0))

    def run(variables, images, train, key):
        f, stats = apply(head, variables, "head", ops.normalise(images), train)
        shape = images.shape[1:3]
        result = forward(codec, variables, {"feature": f}, shape, straight_through=True, key=key)
        bits = functools.reduce(jnp.add, result.bits.values())
        return Passed(f, result.outputs["feature"], bits, stats)

    return run
