"""Classification with the tail on pixels or on decoded features (Omni-ICM, stage 3)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from icm_jax.codecs.codec import Codec
from icm_jax.errors import IcmError
from icm_jax.nets.resnet import global_pool
from icm_jax.tasks import views
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, Trunk, build_trunk, mean_of, merge


def classification(config: ConfigDict) -> Task:
    """The task; fields: the model's, classes, frontend (see `build_trunk`), mode.

    mode "finetune" trains the tail and the classifier (from pixels the head, too); "linear" trains
    the classifier alone, on BatchNorm's running statistics.
    """
    if config.mode not in ("finetune", "linear"):
        raise IcmError(f"unknown mode {config.mode!r}; choose finetune or linear")
    trunk = build_trunk(config)
    init, classify = classifier_on(trunk, config.classes, config.size)
    tuned = config.mode == "finetune"

    def logits_of(variables, batch, key):
        images, feature = None, batch.get("feature")
        if feature is None and key is None:
            images = views.centre(batch["image"], config.size)
        elif feature is None:
            images, _ = views.mild(batch["image"], config.size, crop=config.crop, key=key)
        train = tuned and key is not None
        return classify(variables, images, feature, train)

    def groups(name):
        return TRAIN if name == "classifier" or (tuned and name in trunk.parts) else FROZEN

    return classifier_task(init, logits_of, groups, trunk.codec, trunk.reads)


def classifier_on(trunk: Trunk, classes: int, size: views.Size) -> tuple[Callable, Callable]:
    """A dense layer on the mean over space of a trunk's last feature.

    Args: size: of views, a number or (height, width).

    Returns: (key, batch) -> variables; and (variables, images or None, feature or None, train) ->
      (logits float32 [N, classes], the new batch_stats), as of `Trunk.features`.
    """
    classifier: Any = nn.Dense(classes)  # Flax types `apply` as all that it may return

    def init(key, batch):
        keys = jax.random.split(key)
        images = views.centre(batch["image"][:1], size)
        variables = trunk.init(keys[0], images)
        features, _ = trunk.features(variables, images, None, False)
        merge(variables, "classifier", classifier.init(keys[1], global_pool(features[-1])))
        return variables

    def classify(variables, images, feature, train):
        features, stats = trunk.features(variables, images, feature, train)
        weights = {"params": variables["params"]["classifier"]}
        return classifier.apply(weights, global_pool(features[-1])), stats

    return init, classify


def classifier_task(
    init: Callable,
    logits_of: Callable,
    groups: Callable[[str], str],
    codec: Codec | None = None,
    reads: str = "image",
) -> Task:
    """A task of cross-entropy.

    Args:
      init, groups, codec, reads: as of `Task`.
      logits_of: (variables, batch, key or None for evaluation) -> (float32 [N, classes], the new
        batch_stats).
    """

    def loss(variables, batch, key, step):
        del step
        logits, stats = logits_of(variables, batch, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        total = mean_of(losses, batch["valid"])
        return total, Aux({"top1": mean_of(right, batch["valid"])}, {"batch_stats": stats})

    def predict(variables, batch):
        return {"logits": logits_of(variables, batch, None)[0]}

    return Task(init, loss, predict, groups, codec, reads=reads)
