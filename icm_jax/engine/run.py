"""The entries of an experiment's list of runs, as the files in `configs/` make them."""

import ml_collections

from icm_jax.data import data_fields

OWN_RATE = ("plateau", "rate_scaling", "rate_batch")
"""Settings of the learning rate that not every experiment has; see `icm_jax.engine.optim`."""


def make_run(
    config: ml_collections.ConfigDict,
    stage: ml_collections.ConfigDict,
    *,
    name: str,
    seed: int,
    task: dict,
    weight_decay: float,
    labels: dict,
    **own,
) -> ml_collections.ConfigDict:
    """One run; `engine.train.train` and `measure.evaluate.evaluate` tell its fields.

    Args:
      config: the experiment; `data` and what all runs share in `train`: batch_size, log_every,
        save_every, clip_norm, fsdp, remat, accumulate, ema.
      stage: what is this run's own: optimiser, learning_rate, warmup_steps, steps, and if it is not
        as for the others batch_size (0: as for the others) and schedule (cosine); it may be
        config.train itself.
      labels: curve, arm and point of the records.
      own: further fields, or others than the defaults: no start, nothing needed but images, nothing
        evaluated, data and steps of the config.
    """
    train = config.train
    optim = dict(
        name=stage.optimiser,
        learning_rate=stage.learning_rate,
        schedule=stage.get("schedule", "cosine"),
        warmup_steps=stage.warmup_steps,
        weight_decay=weight_decay,
        clip_norm=train.clip_norm,
        accumulate=train.accumulate,
    )
    optim |= {field: train[field] for field in OWN_RATE if field in train}
    fields = dict(
        name=name,
        seed=seed,
        task=task,
        data=config.data.to_dict(),
        optim=optim,
        batch_size=stage.get("batch_size", 0) or train.batch_size,
        steps=stage.get("steps"),
        log_every=train.log_every,
        save_every=train.save_every,
        fsdp=train.fsdp,
        remat=train.remat,
        ema=train.ema,
        start=(),
        decode_once=False,
        needs=(),
        evaluate=(),
        labels=labels,
    )
    fields |= own
    return ml_collections.ConfigDict(fields | {"data": data_fields(fields["data"])})
