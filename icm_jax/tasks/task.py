"""What the loop knows of a task: a tuple of pure functions.

All networks of Omni-ICM lie in one flat dict of parameters, by these names: head, filter, tail,
projector, feature_codec, classifier, segmenter. Weights of a loss (α, λ) are values in the
collection `constants`: they are stored with the model, and runs that differ in them alone share
their compiled programs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from icm_jax import ops
from icm_jax.codecs.codec import Codec, forward
from icm_jax.codecs.feature import feature_codec
from icm_jax.errors import IcmError
from icm_jax.nets import resnet

TRAIN, FROZEN = "train", "frozen"


class Aux(NamedTuple):
    """metrics: name -> float32 scalar; collections: updated collections other than params."""

    metrics: dict[str, jax.Array]
    collections: dict[str, Any]


class Task(NamedTuple):
    """One learning problem.

    A batch holds "image"; in its place, tasks on decoded features also take "feature".

    Attributes:
      init: (key, batch) -> variables {"params": ..., other collections}.
      loss: (variables, batch, key, step) -> (float32 scalar, Aux).
      predict: (variables, batch) -> {name: array with a leading batch axis}.
      groups: top-level parameter name -> "train" or "frozen".
      codec: the codec that the task trains or stands on, or None.
      constants: weights of the loss, for the collection `constants` that `loss` reads.
    """

    init: Callable
    loss: Callable
    predict: Callable
    groups: Callable[[str], str]
    codec: Codec | None = None
    constants: Mapping[str, jax.Array] = MappingProxyType({})


def build_feature_codec(config) -> Codec:
    """The stage-2 codec that a task's config describes."""
    return feature_codec(
        config.variant,
        config.width,
        config.filter_channels,
        tuple(config.filter_widths),
        config.codec_channels,
        tuple(config.codec_widths),
        config.hyper_channels,
    )


class Trunk(NamedTuple):
    """Frontend and tail of a recognition task (pixels, or features decoded from the codec).

    Attributes:
      init: (key, images uint8 [N, H, W, 3]) -> variables.
      features: (variables, images or None, feature or None, train) -> (tail features, new stats).
      codec: the feature codec, or None for pixels.
    """

    init: Callable
    features: Callable
    codec: Codec | None


def build_trunk(config, output_stride: int = 32) -> Trunk:
    """Head and tail with the frontend `config.frontend`: "pixels" or "feature".

    From "feature", f_hat is what decoding would give, and no gradient flows into it.
    """
    if config.frontend not in ("pixels", "feature"):
        raise IcmError(f"unknown frontend {config.frontend!r}; choose pixels or feature")
    dtype = jnp.dtype(config.dtype)
    head = resnet.Head(config.variant, config.width, dtype)
    tail = resnet.Tail(config.variant, config.width, output_stride, dtype)
    codec = build_feature_codec(config) if config.frontend == "feature" else None

    def init(key, images):
        keys = jax.random.split(key)
        if codec is None:
            f, own = head.init_with_output(keys[0], ops.normalise(images[:1]), train=False)
            variables = {name: {"head": tree} for name, tree in own.items()}
        else:
            variables = codec.init(keys[0], images[:1])
            side = -(-images.shape[1] // 4), -(-images.shape[2] // 4)
            f = jnp.zeros((1, *side, resnet.feature_channels(config.variant, config.width)))
        merge(variables, "tail", tail.init(keys[1], f, train=False))
        return variables

    def features(variables, images, feature, train):
        stats = dict(variables["batch_stats"])
        if feature is None and codec is None:
            feature, stats["head"] = apply(head, variables, "head", ops.normalise(images), train)
        elif feature is None:
            shape = images.shape[1:3]
            result = forward(codec, variables, {"image": images}, shape)
            feature = jax.lax.stop_gradient(result.outputs["feature"])
        outputs, stats["tail"] = apply(tail, variables, "tail", feature, train)
        return outputs, stats

    return Trunk(init, features, codec)


def apply(module, variables, name: str, x, train: bool):
    """Runs a module with BatchNorm on its part of the variables: (output, its new statistics)."""
    own = {"params": variables["params"][name], "batch_stats": variables["batch_stats"][name]}
    if not train:
        return module.apply(own, x, train=False), own["batch_stats"]
    output, updated = module.apply(own, x, train=True, mutable=["batch_stats"])
    return output, updated["batch_stats"]


def merge(variables: dict, name: str, own: dict) -> None:
    """Puts a module's collections into the flat dict under `name`."""
    for collection, tree in own.items():
        variables.setdefault(collection, {})[name] = tree


def mean_of(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of float [N] over the rows that are valid (bool [N])."""
    weights = valid.astype(jnp.float32)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)
