"""What the loop knows of a task: a tuple of pure functions.

All networks of Omni-ICM lie in one flat dict of parameters, by these names: head, filter, tail,
projector, feature_codec, classifier, segmenter, pyramid, box_head, mask_head. Weights of a loss
(α, λ) are values in the collection `constants`: they are stored with the model, and runs that
differ in them alone share their compiled programs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.codecs import CODECS
from icm_jax.codecs.codec import Codec, forward
from icm_jax.errors import IcmError
from icm_jax.nets import resnet

TRAIN, FROZEN = "train", "frozen"


class Aux(NamedTuple):
    """metrics: name -> float32 scalar; collections: updated collections other than params."""

    metrics: Mapping[str, jax.Array | float]
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
      reads: the output of the codec that `predict` takes where images come as files: "image", or
        "feature".
    """

    init: Callable
    loss: Callable
    predict: Callable
    groups: Callable[[str], str]
    codec: Codec | None = None
    constants: Mapping[str, jax.Array] = MappingProxyType({})
    reads: str = "image"


def build_codec(config: Mapping[str, Any]) -> Codec:
    """The codec that a task's field `codec` tells: {"name": one of `CODECS`, arguments of it}.

    Raises: IcmError for a name that is not there, or as the codec's builder does.
    """
    fields = dict(config)
    name = fields.pop("name")
    if name not in CODECS:
        raise IcmError(f"unknown codec {name!r}; choose one of {', '.join(CODECS)}")
    return CODECS[name](**fields)


def trained_part(task: Task, params: Mapping[str, Any]) -> dict:
    """The top-level parameters that a task trains."""
    return {name: tree for name, tree in params.items() if task.groups(name) == TRAIN}


def require_output(codec: Codec, output: str, task: str) -> None:
    """Raises: IcmError if a codec has no such output, which a task needs."""
    if output not in codec.outputs:
        raise IcmError(
            f"the codec {codec.config[0]!r} gives {', '.join(codec.outputs)} and no {output}; "
            f"{task} needs one"
        )


class Trunk(NamedTuple):
    """Frontend and tail of a recognition task.

    Attributes:
      init: (key, images uint8 [N, H, W, 3]) -> variables.
      features: (variables, images or None, feature or None, train) -> (tail features, new stats).
      codec: what the frontend decodes, or None for pixels.
      parts: names of the parameters that are not the codec's.
      reads: of `Task`.
    """

    init: Callable
    features: Callable
    codec: Codec | None
    parts: tuple[str, ...]
    reads: str


FRONTENDS = {"pixels": "image", "feature": "feature", "code": "feature", "decoded": "image"}
"""Frontend -> what its trunk reads: an image, or the feature of a codec."""


def build_trunk(config: ConfigDict, output_stride: int = 32) -> Trunk:
    """Head and tail with the frontend `config.frontend`.

    "pixels": the image; "feature": f_hat of the codec `config.codec` (see `build_codec`); "code":
    its code, for cResNets; "decoded": the image that it decodes. Codecs give what decoding would
    give, and no gradient flows into them. `config.stride_in_1x1` (see `resnet.Block`) is, if it is
    not given, as published: true of "code" and "decoded" (Torfason et al. count it so).

    Raises: IcmError for an unknown frontend, or a codec without the output.
    """
    if config.frontend not in FRONTENDS:
        raise IcmError(
            f"unknown frontend {config.frontend!r}; choose one of {', '.join(FRONTENDS)}"
        )
    reads = FRONTENDS[config.frontend]
    codec = None if config.frontend == "pixels" else build_codec(config.codec)
    if codec:
        require_output(codec, reads, f"the frontend {config.frontend!r}")
    dtype = jnp.dtype(config.dtype)
    groups = config.get("bn_groups", 0)
    head = resnet.Head(config.variant, config.width, dtype, groups)
    in_1x1 = config.get("stride_in_1x1", config.frontend in ("code", "decoded"))
    tail = resnet.Tail(config.variant, config.width, output_stride, in_1x1, dtype, groups)
    sees_pixels = reads == "image"

    def init(key, images):
        keys = jax.random.split(key)
        variables = codec.init(keys[0], images[:1]) if codec else {}
        if sees_pixels:
            f, drawn = head.init_with_output(keys[0], ops.normalise(images[:1]), train=False)
            merge(variables, "head", drawn)
        else:
            f = jax.eval_shape(lambda v: decoded(v, images[:1]), variables)
            f = jnp.zeros(f.shape, f.dtype)
        merge(variables, "tail", tail.init(keys[1], f, train=False))
        return variables

    def decoded(variables, images):
        assert codec
        result = forward(codec, variables, {"image": images}, images.shape[1:3])
        return jax.lax.stop_gradient(result.outputs[reads])

    def features(variables, images, feature, train):
        stats = dict(variables["batch_stats"])
        if sees_pixels:  # in evaluation files are decoded before
            images = decoded(variables, images).clip(0, 255) if codec and train else images
            feature, stats["head"] = apply(head, variables, "head", ops.normalise(images), train)
        elif feature is None:
            feature = decoded(variables, images)
        outputs, stats["tail"] = apply(tail, variables, "tail", feature, train)
        return outputs, stats

    parts = ("head", "tail") if sees_pixels else ("tail",)
    return Trunk(init, features, codec, parts, reads)


def apply(
    module: Any, variables: Mapping[str, Any], name: str, x: jax.Array, train: bool
) -> tuple[Any, Any]:
    """Runs a module with BatchNorm on its part of the variables: (output, its new statistics)."""
    part = {"params": variables["params"][name], "batch_stats": variables["batch_stats"][name]}
    if not train:
        return module.apply(part, x, train=False), part["batch_stats"]
    output, updated = module.apply(part, x, train=True, mutable=["batch_stats"])
    return output, updated["batch_stats"]


def merge(variables: dict, name: str, collections: Mapping[str, Any]) -> None:
    """Puts a module's collections into the flat dict under `name`."""
    for collection, tree in collections.items():
        variables.setdefault(collection, {})[name] = tree


def mean_of(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of float [N] over the rows that are valid (bool [N])."""
    weights = valid.astype(jnp.float32)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)
