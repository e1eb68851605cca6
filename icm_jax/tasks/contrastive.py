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

import jax
import jax.numpy as jnp

from icm_jax import ops
from icm_jax.codecs.codec import forward
from icm_jax.codecs.feature import filter_codec, filtered
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.nets.layers import Projector
from icm_jax.nets.resnet import global_pool
from icm_jax.tasks import views
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, apply, merge

NEGATIVES = ("queue", "batch", "both")
PARTS = ("head", "filter", "tail", "projector")
L1_WEIGHT = 128.0  # of filter pre-training (docs/papers.md 5.2, stage 0)


def info_nce(query, keys, queue, temperature: float, negatives: str):
    """InfoNCE (Feng et al. 2022, stage 1): mean cross-entropy and top-1 of finding the own key.

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
        own = jnp.eye(len(query), dtype=bool)
        others.append(jnp.where(own, jnp.finfo(query.dtype).min, everyone @ keys.T))  # [N, N]
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


def momentum_at(step, momentum: float) -> jax.Array:
    """min(momentum, t / (t + 10)): the key encoder begins as a copy of the query encoder.

    Without the warm-up a filter taken from pre-training would meet keys from an untrained one, and
    with a momentum of 0.999 keys would be normalised by initial statistics for thousands of steps.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(jnp.float32(momentum), step / (step + 10.0))


def contrastive(config) -> Task:
    """The task; fields of `config`: variant, width, size, crop, dtype, bn_groups, filter_channels,
    filter_widths, projector_hidden, embedding, alpha, l1, negatives, queue, momentum, temperature,
    pretrain_filter. `l1` weighs L1(f, f'), which keeps the filter from forgetting what instances
    do not need to be told apart (docs/papers.md 5.2); the paper's own loss has l1 = 0.

    `pretrain_filter` trains the filter alone, by bits + 128 · L1(f, f') on frozen weights of the
    backbone. The head's BatchNorm statistics follow the data even then: those of an untrained head
    are arbitrary, and stage 1 would hand the filter features of another scale.

    Raises: IcmError for an unknown kind of negatives, or if a batch does not divide the queue.
    """
    if config.negatives not in NEGATIVES:
        raise IcmError(f"unknown negatives {config.negatives!r}; choose one of {NEGATIVES}")
    dtype = jnp.dtype(config.dtype)
    bn_groups = config.get("bn_groups", 0)
    head = resnet.Head(config.variant, config.width, dtype, bn_groups)
    tail = resnet.Tail(config.variant, config.width, dtype=dtype, bn_groups=bn_groups)
    projector = Projector(config.projector_hidden, config.embedding, dtype)
    codec = filter_codec(
        config.variant,
        config.width,
        config.filter_channels,
        tuple(config.filter_widths),
        config.dtype,
    )
    pixels = math.prod(views.sides(config.size))

    def init(key, batch):
        if config.queue % len(batch["image"]):
            raise IcmError(
                f"the batch size {len(batch['image'])} does not divide the queue {config.queue}"
            )
        keys = jax.random.split(key, 4)
        image = views.centre(batch["image"][:1], config.size)
        variables = codec.init(keys[0], image)
        f = filtered(codec, variables, {"image": image})
        merge(variables, "tail", tail.init(keys[1], f, train=False))
        pooled = global_pool(apply(tail, variables, "tail", f, False)[0][-1])
        merge(variables, "projector", projector.init(keys[2], pooled))
        slots = config.queue // len(batch["image"]), len(batch["image"])
        queue = jax.random.normal(keys[3], (*slots, config.embedding))
        copy = jax.tree.map(jnp.copy, {"p": variables["params"], "s": variables["batch_stats"]})
        return {
            **variables,
            "key_params": copy["p"],
            "key_stats": copy["s"],
            "queue": {"keys": _unit(queue), "next": jnp.zeros((), jnp.int32)},
        }

    def embed(variables, images, train, key):
        """(embedding [N, D], bits [N], f, f', statistics) of images on 0...255."""
        stats = dict(variables["batch_stats"])
        x = ops.normalise(images)
        f, stats["head"] = apply(head, variables, "head", x, train)
        result = forward(
            codec, variables, {"feature": f}, images.shape[1:3], straight_through=True, key=key
        )
        passed = result.outputs["feature"]
        features, stats["tail"] = apply(
            tail, variables, "tail", passed, train and not config.pretrain_filter
        )
        pooled = global_pool(features[-1])
        embedding = projector.apply({"params": variables["params"]["projector"]}, pooled)
        return _unit(embedding.astype(jnp.float32)), result.bits["y"], f, passed, stats

    def loss(variables, batch, key, step):
        keys = jax.random.split(key, 3)
        m = momentum_at(step, config.momentum)
        follow = lambda old, new: m * old + (1 - m) * new  # noqa: E731
        momentum = jax.lax.stop_gradient(
            {
                "params": jax.tree.map(follow, variables["key_params"], variables["params"]),
                "batch_stats": jax.tree.map(
                    follow, variables["key_stats"], variables["batch_stats"]
                ),
            }
        )
        if config.pretrain_filter:
            query_view, _ = views.mild(batch["image"], config.size, crop=config.crop, key=keys[0])
        else:
            query_view = views.contrastive(batch["image"], config.size, key=keys[0])
        query, bits, f, passed, stats = embed(variables, query_view, True, keys[2])
        bpp = bits.mean() / pixels
        metrics = {"bpp": bpp}
        queue = variables["queue"]
        if config.pretrain_filter:
            distance = jnp.abs(f.astype(jnp.float32) - passed).mean()
            total = bpp + L1_WEIGHT * distance
            metrics["l1"] = distance
        else:
            key_view = views.contrastive(batch["image"], config.size, key=keys[1])
            positives = jax.lax.stop_gradient(embed(momentum, key_view, False, None)[0])
            nce, accuracy = info_nce(
                query, positives, queue["keys"], config.temperature, config.negatives
            )
            distance = jnp.abs(jax.lax.stop_gradient(f).astype(jnp.float32) - passed).mean()
            constants = variables["constants"]
            total = nce + constants["alpha"] * bpp + constants["l1"] * distance
            metrics |= {"l1": distance}
            metrics |= {"info_nce": nce, "top1": accuracy, "spread": query.std(axis=0).mean()}
            queue = {
                "keys": jax.lax.dynamic_update_index_in_dim(
                    queue["keys"], positives, queue["next"], axis=0
                ),
                "next": (queue["next"] + 1) % len(queue["keys"]),
            }
        collections = {
            "batch_stats": stats,
            "key_params": momentum["params"],
            "key_stats": momentum["batch_stats"],
            "queue": queue,
        }
        return total, Aux(metrics, collections)

    def predict(variables, batch):
        images = views.centre(batch["image"], config.size)
        return {"embedding": embed(variables, images, False, None)[0]}

    def groups(name):
        return TRAIN if name == "filter" or not config.pretrain_filter else FROZEN

    constants = {"alpha": jnp.float32(config.alpha), "l1": jnp.float32(config.l1)}
    return Task(init, loss, predict, groups, codec, constants)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
