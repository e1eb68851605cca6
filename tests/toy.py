"""Least squares as a task, and a run of it: what the loop and the optimisers are tested on."""

import jax.numpy as jnp
import ml_collections

from icm_jax.engine.run import Run
from icm_jax.tasks.task import Aux, Task


def toy(scale=1.0):
    """Least squares on the mean colour; `frozen` must not move."""

    def init(key, batch):
        del key, batch
        return {"params": {"w": {"v": jnp.zeros((3,))}, "frozen": {"v": jnp.ones((2,))}}}

    def loss(variables, batch, key, step):
        del key
        x = batch["image"].astype(jnp.float32).mean(axis=(1, 2)) / 255.0
        error = x @ variables["params"]["w"]["v"] - 1.0 + variables["params"]["frozen"]["v"].sum()
        bad = jnp.where(step == 5, jnp.float32(scale), 1.0)
        return jnp.square(error).mean() * bad, Aux({}, {})

    return Task(init, loss, None, lambda name: "train" if name == "w" else "frozen")


def toy_run(**changes):
    run = dict(
        name="run",
        seed=0,
        data=dict(canvas=4),
        batch_size=2,
        steps=8,
        log_every=2,
        save_every=2,
        ema=0.9,
        optim=dict(
            name="sgd",
            learning_rate=0.1,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=0.0,
        ),
    )
    run |= {"task": {}} | changes
    configs = {name: ml_collections.ConfigDict(run[name]) for name in ("task", "data", "optim")}
    return Run(**(run | configs))
