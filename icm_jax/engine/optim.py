"""From a config to a learning-rate schedule and an optax chain."""

import jax
import optax

from icm_jax.errors import IcmError

OPTIMISERS = ("sgd", "adam", "adamw", "lars", "lamb")
SCHEDULES = ("constant", "cosine", "linear", "plateau")
SCALINGS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}
"""Rules for the learning rate of large batches: powers of the batch's size."""


def make_schedule(config, steps: int) -> optax.Schedule:
    """config: schedule, learning_rate, warmup_steps; warm-up is linear from 0, decay ends at 0.

    "plateau" is constant here: `icm_jax.engine.plateau` halves the rate.

    Raises: IcmError for an unknown schedule or a warm-up that is not shorter than the run.
    """
    if config.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise IcmError(f"unknown schedule {config.schedule!r}; choose one of {known}")
    if not 0 <= config.warmup_steps < steps and steps:
        raise IcmError(f"warmup_steps {config.warmup_steps} must be below the run's {steps} steps")
    rate, rest = config.learning_rate, max(steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "plateau": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def scaled(rate: float, batch: int, base: int, rule: str) -> float:
    """`rate`, given for batches of `base`, at another size: linear after Goyal et al. 2017, "sqrt"
    after Krizhevsky 2014 and, with LAMB, You et al. 2020.

    Raises: IcmError for an unknown rule or a base below 1.

    >>> scaled(0.1, 1024, 256, "linear"), scaled(0.1, 1024, 256, "sqrt")
    (0.4, 0.2)
    """
    if rule not in SCALINGS:
        raise IcmError(f"unknown rate_scaling {rule!r}; choose one of {', '.join(SCALINGS)}")
    if base < 1:
        raise IcmError(f"rate_batch is {base}; it is the batch size that learning rates are for")
    return rate * (batch / base) ** SCALINGS[rule]


def make_optimiser(config, steps: int, batch_size: int) -> optax.GradientTransformation:
    """config: name, weight_decay, clip_norm (0 = off) and the schedule's fields.

    Where it has `rate_scaling`, the learning rate is that for `config.rate_batch` images, `scaled`
    to the images of an update: batch_size, those of a step, times `config.accumulate`.

    With `config.accumulate` = k above 1, a step adds its gradients to a mean, and every k-th moves
    the parameters by it: k steps of B rows are one of k·B. Lengths and schedules count steps all
    the same: an update has the rate of the first of its k steps. Steps after the last whole k move
    nothing.

    Weight decay, and the layer-wise rates of LARS, leave out vectors: biases, BatchNorm, GDN's β.
    Raises: IcmError for an unknown optimiser, or if `accumulate` is below 1.
    """
    every = config.get("accumulate", 1)
    if every < 1:
        raise IcmError(f"train.accumulate is {every}; 1 moves the parameters at every step")
    by_step = make_schedule(config, steps)
    factor = scaled(
        1.0, batch_size * every, config.get("rate_batch", 256), config.get("rate_scaling", "none")
    )
    schedule = lambda updates: factor * by_step(updates * every)  # noqa: E731
    decay = config.weight_decay
    makers = {
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, matrices), optax.sgd(schedule, momentum=0.9)
        ),
        "adam": lambda: optax.adam(schedule),
        "adamw": lambda: optax.adamw(schedule, weight_decay=decay, mask=matrices),
        "lars": lambda: optax.lars(
            schedule, decay, weight_decay_mask=matrices, trust_ratio_mask=matrices
        ),
        "lamb": lambda: optax.lamb(schedule, weight_decay=decay, mask=matrices),
    }
    if config.name not in makers:
        raise IcmError(f"unknown optimiser {config.name!r}; choose one of {', '.join(makers)}")
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    chain = [*clip, makers[config.name]()]
    if every > 1:
        chain = [optax.MultiSteps(optax.chain(*chain), every).gradient_transformation()]
    return optax.chain(*chain)


def matrices(params):
    """Tree of bools: which parameters have two dimensions or more."""
    return jax.tree.map(lambda p: p.ndim > 1, params)
