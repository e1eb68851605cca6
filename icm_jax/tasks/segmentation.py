"""Semantic segmentation: dilated tail, ASPP, on pixels or decoded features (docs/papers.md 1.3)."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from icm_jax.nets.deeplab import ASPP
from icm_jax.tasks import views
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, build_trunk, merge

IGNORE = 255


def segmentation(config: ConfigDict) -> Task:
    """The task; fields: the model's, mask_classes, frontend, aspp_rates, output_stride.

    Pixels with the id 255 are ignored.
    """
    trunk = build_trunk(config, config.output_stride)
    segmenter = ASPP(
        config.mask_classes, rates=tuple(config.aspp_rates), dtype=jnp.dtype(config.dtype)
    )

    def logits_of(variables, images, feature, train):
        features, stats = trunk.features(variables, images, feature, train)
        logits = segmenter.apply({"params": variables["params"]["segmenter"]}, features[-1])
        shape = (len(logits), *views.sides(config.size), config.mask_classes)
        return jax.image.resize(logits, shape, "bilinear"), stats

    def init(key, batch):
        keys = jax.random.split(key)
        images = views.centre(batch["image"][:1], config.size)
        variables = trunk.init(keys[0], images)
        features, _ = trunk.features(variables, images, None, False)
        merge(variables, "segmenter", segmenter.init(keys[1], features[-1]))
        return variables

    def loss(variables, batch, key, step):
        del step
        images, feature = None, batch.get("feature")
        if feature is None:
            images, masks = views.mild(
                batch["image"], config.size, batch["mask"], crop=config.crop, key=key
            )
        else:
            masks = views.centre(batch["mask"], config.size)
        assert masks is not None  # `mild` gives as many as it gets
        logits, stats = logits_of(variables, images, feature, True)
        known = ((masks != IGNORE) & batch["valid"][:, None, None]).astype(jnp.float32)
        labels = jnp.where(masks == IGNORE, 0, masks).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        count = jnp.maximum(known.sum(), 1.0)
        metrics = {"pixel_accuracy": (right * known).sum() / count}
        return (losses * known).sum() / count, Aux(metrics, {"batch_stats": stats})

    def predict(variables, batch):
        images = views.centre(batch["image"], config.size) if "image" in batch else None
        logits = logits_of(variables, images, batch.get("feature"), False)[0]
        return {"segments": jnp.argmax(logits, axis=-1).astype(jnp.int32)}

    def groups(name):
        return TRAIN if name == "segmenter" or name in trunk.parts else FROZEN

    return Task(init, loss, predict, groups, trunk.codec, reads=trunk.reads)
