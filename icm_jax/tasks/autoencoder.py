"""Training of the compressive autoencoder, alone or with a classifier on its code.

    L_codec = MSE + β · max(H(q) - H_t, 0)                    (docs/papers.md 1.1)
    L_joint = γ · L_codec + cross-entropy                     (docs/papers.md 1.4)

MSE is on 0...255; H(q) is the entropy of a symbol in bits, from the batch's histograms (one per
channel, as the range coder has tables per channel), and H_t what a target in bits per pixel leaves
to each.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from icm_jax.codecs.autoencoder import PART, relaxed
from icm_jax.codecs.codec import Codec, forward
from icm_jax.data.fields import FieldError
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.tasks import views
from icm_jax.tasks.task import TRAIN, Aux, Task, apply, build_codec, mean_of, merge

_CENTRES_WEIGHT = 0.1
"""Of the mean square of learned centres (Mentzer et al. 2018)."""


def autoencoder_compression(config: ConfigDict) -> Task:
    """The codec alone.

    Fields: codec, an autoencoder (see `build_codec`); target_bpp; beta (β); size (sides of the
    training views, a multiple of 8).
    """
    codec = build_autoencoder(config)

    def loss(variables, batch, key, step):
        del step
        x = views.cut(batch["image"], config.size, key=key).astype(jnp.float32)
        total, _, metrics, stats = codec_loss(codec, variables, x)
        return total, Aux(metrics, {"batch_stats": {PART: stats}})

    def predict(variables, batch):
        result = forward(codec, variables, batch, batch["image"].shape[1:3])
        return {"image": result.outputs["image"]}

    def init(key, batch):
        return codec.init(key, batch["image"])

    return Task(init, loss, predict, lambda name: TRAIN, codec, codec_constants(config))


def joint_classification(config: ConfigDict) -> Task:
    """The codec and a cResNet on its code.

    Fields: those of `autoencoder_compression`; variant and width of the cResNet; dtype; classes;
    crop (see `views.mild`); gamma (γ).
    """
    codec = build_autoencoder(config)
    tail = resnet.Tail(config.variant, config.width, 32, True, jnp.dtype(config.dtype))
    classifier: Any = nn.Dense(config.classes)  # Flax types `apply` as all that it may return

    def logits_of(variables, q, train):
        outputs, stats = apply(tail, variables, "tail", q, train)
        weights = {"params": variables["params"]["classifier"]}
        return classifier.apply(weights, resnet.global_pool(outputs[-1])), stats

    def init(key, batch):
        keys = jax.random.split(key, 3)
        variables = codec.init(keys[0], batch["image"])
        height, width = views.sides(config.size)
        channels = dict(codec.config[1])["channels"]
        q = jnp.zeros((1, height // 8, width // 8, channels))
        outputs, drawn = tail.init_with_output(keys[1], q, train=False)
        merge(variables, "tail", drawn)
        pooled = resnet.global_pool(outputs[-1])
        merge(variables, "classifier", classifier.init(keys[2], pooled))
        return variables

    def loss(variables, batch, key, step):
        del step
        x, _ = views.mild(batch["image"], config.size, crop=config.crop, key=key)
        of_codec, q, metrics, coded = codec_loss(codec, variables, x)
        logits, stats = logits_of(variables, q, True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        metrics["top1"] = mean_of(right, batch["valid"])
        total = variables["constants"]["gamma"] * of_codec + mean_of(losses, batch["valid"])
        return total, Aux(metrics, {"batch_stats": {PART: coded, "tail": stats}})

    def predict(variables, batch):
        q = batch.get("feature")
        if q is None:
            images = views.centre(batch["image"], config.size)
            q = forward(codec, variables, {"image": images}, images.shape[1:3]).outputs["feature"]
        return {"logits": logits_of(variables, q, False)[0]}

    constants = codec_constants(config) | {"gamma": jnp.float32(config.gamma)}
    return Task(init, loss, predict, lambda name: TRAIN, codec, constants, "feature")


def build_autoencoder(config: ConfigDict) -> Codec:
    """The codec of a task's field `codec`. Raises: IcmError for one that is no autoencoder."""
    codec = build_codec(config.codec)
    if codec.config[0] != PART:
        raise IcmError(
            f"{config.name} trains codecs named {PART!r}, by histograms of a code of few values; "
            f"{codec.config[0]!r} has none"
        )
    return codec


def codec_constants(config: ConfigDict) -> dict:
    """H_t and β for the collection `constants`. Raises: FieldError for a size that the code does
    not divide, or a target that is not positive."""
    if any(side % 8 for side in views.sides(config.size)):
        told = f"is {config.size}; the size of a view is a multiple of 8"
        raise FieldError(("task", "size"), config.size, told)
    if config.target_bpp <= 0:
        told = f"is {config.target_bpp}; it must be above 0"
        raise FieldError(("task", "target_bpp"), config.target_bpp, told)
    bits = config.target_bpp * 64 / config.codec.channels
    return {"target": jnp.float32(bits), "beta": jnp.float32(config.beta)}


def codec_loss(
    codec: Codec, variables: Mapping[str, Any], x: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], dict[str, Any]]:
    """(L_codec, q, metrics, new statistics) of x, float32 [N, H, W, 3] on 0...255."""
    constants = variables["constants"]
    x_hat, q, bits, stats = relaxed(codec, variables, x)
    mse = jnp.square(x - x_hat).mean()
    total = mse + constants["beta"] * jnp.maximum(bits - constants["target"], 0.0)
    fields = dict(codec.config[1])
    if fields["learned"]:
        values = variables["params"][PART]["quantiser"]["values"]
        total += _CENTRES_WEIGHT * jnp.square(values).mean()
    metrics = {"mse": mse, "bpp": bits * fields["channels"] / 64}
    return total, q, metrics, stats
