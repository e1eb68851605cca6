"""Stage 1 of Omni-ICM: instance discrimination through the information filter.

    view q -> head -> f -> filter encoder -> y (+noise -> bits; rounded -> filter decoder) -> tail
           -> mean -> projector -> q            L = InfoNCE(q, k, negatives) + α · bits per pixel
    view k -> the same with the momentum weights, no gradient -> k

BatchNorm cannot leak between query and key: the key encoder normalises with an exponential moving
average of the query's running statistics (EMAN, Cai et al. 2021) instead of statistics of its
batch, so that a key depends on its own image alone; no shuffling between devices is needed.

Rate and decoder see y differently, as in docs/papers.md 5.2: the prior gets noisy latents, the
decoder straight-through rounded ones.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.codecs.codec import Codec, forward
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.nets.layers import Projector
from icm_jax.nets.resnet import global_pool
from icm_jax.tasks import views
from icm_jax.tasks.filter_pretraining import filtering
from icm_jax.tasks.task import TRAIN, Aux, Task, apply, build_codec, merge, require_output

NEGATIVES = ("queue", "batch", "both")


def info_nce(
    query: jax.Array, keys: jax.Array, queue: jax.Array, temperature: float, negatives: str
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE (Feng et al. 2022, stage 1): mean cross-entropy and top-1 of finding the right key.

    Negatives are of all devices, but each multiplies the queries with its own part of the keys and
    of the queue alone: it holds [N, (N + K) / devices] similarities, and sends [N, D] and [N].

    Args:
      query, keys: float32 [N, D], unit length; row i of both is the same image.
      queue: float32 [K/B, B, D], unit length. temperature: τ.
      negatives: "queue", "batch" (the other keys of the global batch) or "both".
    Returns: (loss, accuracy), float32 scalars.
    """
    positive = (query * keys).sum(axis=1) / temperature  # [N]
    everyone, others = ops.on_each_device(query / temperature), []
    if negatives != "queue":
        same = jnp.eye(len(query), dtype=bool)
        others.append(jnp.where(same, jnp.finfo(query.dtype).min, everyone @ keys.T))  # [N, N]
    if negatives != "batch":
        others.append(jnp.einsum("nd,sbd->nsb", everyone, queue))
    # One sum and one maximum for each kind: arrays that are split differently cannot be joined
    # without sending them.
    total, best = positive, jnp.full_like(positive, -jnp.inf)
    for logits in others:
        axes = tuple(range(1, logits.ndim))
        total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=axes))
        best = jnp.maximum(best, logits.max(axis=axes))
    return (total - positive).mean(), (positive >= best).astype(jnp.float32).mean()


def momentum_at(step: jax.typing.ArrayLike, momentum: float) -> jax.Array:
    """min(momentum, t / (t + 10)): the key encoder begins as a copy of the query encoder.

    Without the warm-up a filter taken from pre-training would meet keys from an untrained one, and
    with a momentum of 0.999 keys would be normalised by initial statistics for thousands of steps.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(jnp.float32(momentum), step / (step + 10.0))


def contrastive(config: ConfigDict) -> Task:
    """The task; fields of `config`: variant, width, size, dtype, bn_groups, codec (the filter; see
    `build_codec`), projector_hidden, embedding, alpha, l1, negatives, queue, momentum, temperature.
    `l1` weighs L1(f, f'), which keeps the filter from forgetting what instances do not need to be
    told apart (docs/papers.md 5.2); the paper's own loss has l1 = 0.

    Raises: IcmError for an unknown kind of negatives or a codec without features, or if a batch
      does not divide the queue.
    """
    if config.negatives not in NEGATIVES:
        known = ", ".join(NEGATIVES)
        raise IcmError(f"unknown negatives {config.negatives!r}; choose one of {known}")
    codec = build_codec(config.codec)
    require_output(codec, "feature", "contrastive")
    init_networks, embed = embedding(config, codec)
    pixels = math.prod(views.sides(config.size))

    def init(key, batch):
        rows = len(batch["image"])
        if config.queue % rows:
            raise IcmError(f"the batch size {rows} does not divide the queue {config.queue}")
        keys = jax.random.split(key, 4)
        variables = init_networks(keys[:3], views.centre(batch["image"][:1], config.size))
        queue = jax.random.normal(keys[3], (config.queue // rows, rows, config.embedding))
        copy = jax.tree.map(jnp.copy, {"p": variables["params"], "s": variables["batch_stats"]})
        queue = {"keys": _unit(queue), "next": jnp.zeros((), jnp.int32)}
        return {**variables, "key_params": copy["p"], "key_stats": copy["s"], "queue": queue}

    def loss(variables, batch, key, step):
        keys = jax.random.split(key, 3)
        averaged = _key_encoder(variables, momentum_at(step, config.momentum))
        seen = [views.contrastive(batch["image"], config.size, key=key) for key in keys[:2]]
        query, passed, stats = embed(variables, seen[0], True, keys[2])
        positives = jax.lax.stop_gradient(embed(averaged, seen[1], False, None)[0])
        queue, constants = variables["queue"], variables["constants"]
        nce, accuracy = info_nce(
            query, positives, queue["keys"], config.temperature, config.negatives
        )
        bpp = passed.bits.mean() / pixels
        f = jax.lax.stop_gradient(passed.f).astype(jnp.float32)
        distance = jnp.abs(f - passed.feature).mean()
        total = nce + constants["alpha"] * bpp + constants["l1"] * distance
        metrics = {"bpp": bpp, "l1": distance, "info_nce": nce, "top1": accuracy}
        metrics["spread"] = query.std(axis=0).mean()
        collections = {"batch_stats": stats, "queue": _pushed(queue, positives)}
        collections |= {"key_params": averaged["params"], "key_stats": averaged["batch_stats"]}
        return total, Aux(metrics, collections)

    def predict(variables, batch):
        images = views.centre(batch["image"], config.size)
        return {"embedding": embed(variables, images, False, None)[0]}

    constants = {"alpha": jnp.float32(config.alpha), "l1": jnp.float32(config.l1)}
    return Task(init, loss, predict, lambda name: TRAIN, codec, constants)


def embedding(config: ConfigDict, codec: Codec) -> tuple[Callable, Callable]:
    """The networks, through the filter `codec`.

    Returns:
      (three keys, image uint8 [1, H, W, 3]) -> variables;
      (variables, images float32 [N, H, W, 3] on 0...255, train, key) -> (embedding float32 [N, D]
      of unit length, `Passed`, new BatchNorm statistics).
    """
    dtype = jnp.dtype(config.dtype)
    groups = config.get("bn_groups", 0)
    tail = resnet.Tail(config.variant, config.width, dtype=dtype, bn_groups=groups)
    projector = Projector(config.projector_hidden, config.embedding, dtype)
    through_filter = filtering(config, codec)

    def init(keys, image):
        variables = codec.init(keys[0], image)
        f = forward(codec, variables, {"image": image}, image.shape[1:3]).outputs["feature"]
        merge(variables, "tail", tail.init(keys[1], f, train=False))
        pooled = global_pool(apply(tail, variables, "tail", f, False)[0][-1])
        merge(variables, "projector", projector.init(keys[2], pooled))
        return variables

    def embed(variables, images, train, key):
        passed = through_filter(variables, images, train, key)
        features, stats = apply(tail, variables, "tail", passed.feature, train)
        stats = variables["batch_stats"] | {"head": passed.head_stats, "tail": stats}
        weights = {"params": variables["params"]["projector"]}
        given = projector.apply(weights, global_pool(features[-1]))
        return _unit(given.astype(jnp.float32)), passed, stats

    return init, embed


def _key_encoder(variables, momentum: jax.Array) -> dict:
    """The variables of the key encoder after this step, an average of the query encoder's."""
    follow = lambda old, new: momentum * old + (1 - momentum) * new  # noqa: E731
    params = jax.tree.map(follow, variables["key_params"], variables["params"])
    stats = jax.tree.map(follow, variables["key_stats"], variables["batch_stats"])
    return jax.lax.stop_gradient({"params": params, "batch_stats": stats})


def _pushed(queue, keys: jax.Array) -> dict:
    """The queue with a batch of keys, float32 [N, D], in place of its oldest one."""
    changed = jax.lax.dynamic_update_index_in_dim(queue["keys"], keys, queue["next"], axis=0)
    return {"keys": changed, "next": (queue["next"] + 1) % len(changed)}


def _unit(x):
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
