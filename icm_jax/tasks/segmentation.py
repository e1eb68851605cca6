"""Semantic segmentation: dilated tail, ASPP, on pixels or decoded features (docs/papers.md 1.3)."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from icm_jax.nets.deeplab import ASPP
from icm_jax.tasks import views
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, build_trunk, merge

IGNORE = 255
LINES = 32
"""Of a label map, whose logits are interpolated together."""


def segmentation(config: ConfigDict) -> Task:
    """The task; fields: the model's, mask_classes, frontend, aspp_rates, output_stride.

    Pixels with the id 255 are ignored. Views of `size` are learned from; `predict` takes images,
    or features, of any size and gives "logits" on the network's own grid, float32 [N, h, w,
    mask_classes], from which `at_pixels` has the pixels.
    """
    trunk = build_trunk(config, config.output_stride)
    segmenter = ASPP(
        config.mask_classes, rates=tuple(config.aspp_rates), dtype=jnp.dtype(config.dtype)
    )

    def logits_of(variables, images, feature, train):
        features, stats = trunk.features(variables, images, feature, train)
        return segmenter.apply({"params": variables["params"]["segmenter"]}, features[-1]), stats

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
        logits = jax.image.resize(logits, (*masks.shape, config.mask_classes), "bilinear")
        known = ((masks != IGNORE) & batch["valid"][:, None, None]).astype(jnp.float32)
        labels = jnp.where(masks == IGNORE, 0, masks).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        count = jnp.maximum(known.sum(), 1.0)
        metrics = {"pixel_accuracy": (right * known).sum() / count}
        return (losses * known).sum() / count, Aux(metrics, {"batch_stats": stats})

    def predict(variables, batch):
        logits, _ = logits_of(variables, batch.get("image"), batch.get("feature"), False)
        return {"logits": logits}

    def groups(name):
        return TRAIN if name == "segmenter" or name in trunk.parts else FROZEN

    return Task(init, loss, predict, groups, trunk.codec, reads=trunk.reads)


def at_pixels(
    logits: jax.Array, sides: jax.Array, stride: float, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """The class of each pixel of a label map, by bilinear interpolation between logits.

    Args:
      logits: float32 [h, w, K], in whose corner the image lies. sides: float32 [2], of the image in
        pixels, as the network saw it. stride: such pixels per element of the logits.
      rows, columns: float32 [H], [W], centres of the label map's pixels, in the network's.

    Returns: uint8 [H, W].
    """

    def between(at, side):
        """The elements before and behind, and how far from the first one: as jax.image.resize and
        torch's interpolate see them, whatever lies beyond the image."""
        last = jnp.ceil(side / stride) - 1.0
        at = jnp.clip(at / stride - 0.5, 0.0, last)
        first = jnp.floor(at)
        both = (x.astype(jnp.int32) for x in (first, jnp.minimum(first + 1.0, last)))
        return *both, at - first

    before, behind, share = between(columns, sides[1])
    share = share[None, :, None]
    across = (1 - share) * logits[:, before] + share * logits[:, behind]

    def line(place):
        before, behind, share = place
        mixed = (1 - share) * across[before] + share * across[behind]
        return jnp.argmax(mixed, axis=-1).astype(jnp.uint8)

    # Some lines at a time: all logits of a large label map would take gigabytes.
    return jax.lax.map(line, between(rows, sides[0]), batch_size=LINES)
