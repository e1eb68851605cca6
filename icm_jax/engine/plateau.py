"""The schedule "plateau": a learning rate that goes by the loss on the validation split.

That is the task's own, over the same images with the same random keys each time: a function of the
weights alone, averaged ones where the run keeps them, whatever the number of processes. When it has
not fallen `patience` times in a row, the rate is halved, at most `HALVINGS` times; when it then has
not again, the run ends. What the run gives is what it was where the loss was lowest (Özyılkan et
al. 2023; docs/papers.md 3.4).

All that is remembered is part of the run's state, so a resumed run goes on with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.data import pipeline
from icm_jax.data.sources import Source
from icm_jax.engine import sharding
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import Run
from icm_jax.errors import IcmError
from icm_jax.nets.convolution import compiler_options
from icm_jax.tasks.task import Task, trained_part

HALVINGS = 5


class Plateau(flax.struct.PyTreeNode):
    """What has come of a run's validations.

    Attributes:
      lowest: float32 scalar, the lowest loss; inf before the first.
      step: int32 scalar, where that was. variables: those of that step, without frozen parameters.
      waited: int32 scalar, validations since then, or since the rate was halved, without a lower.
      stalls: int32 scalar, how often that was `patience`: at each of the first `HALVINGS` the rate
        was halved, at the next the run ended.
    """

    lowest: jax.Array
    step: jax.Array
    variables: Any
    waited: jax.Array
    stalls: jax.Array


def asked(run: Run) -> bool:
    """Whether a run goes by plateau."""
    return run.optim.get("schedule") == "plateau"


def held_out(run: Run) -> Source:
    """The split that such a run goes by. Raises: IcmError that says so if there is none."""
    try:
        return open_source(run.data, "validation")
    except IcmError as error:
        raise IcmError(
            f"{run.name} goes by the loss on the validation split (schedule plateau): {error}"
        ) from error


def begin(task: Task, variables: dict) -> Plateau:
    """Before the first validation."""
    zero = jnp.zeros((), jnp.int32)
    own = jax.tree.map(jnp.copy, changing(task, variables))
    return Plateau(jnp.float32(jnp.inf), zero, own, zero, zero)


def changing(task: Task, variables: dict) -> dict:
    """The variables without the parameters that a task leaves as they are."""
    return variables | {"params": trained_part(task, variables["params"])}


def judged(
    plateau: Plateau, loss: jax.Array, step: jax.Array, variables: dict, patience: int
) -> Plateau:
    """After a validation that gave `loss`, a float32 scalar, at a step, with the `changing`
    variables."""
    better = loss < plateau.lowest
    lowest, at, kept = jax.tree.map(
        lambda new, old: jnp.where(better, new, old),
        (loss, step, variables),
        (plateau.lowest, plateau.step, plateau.variables),
    )
    waited = jnp.where(better, 0, plateau.waited + 1)
    stalled = waited >= patience
    stalls = plateau.stalls + stalled.astype(jnp.int32)
    return Plateau(lowest, at, kept, jnp.where(stalled, 0, waited), stalls)


def rate(plateau: Plateau) -> jax.Array:
    """What the learning rate is multiplied with: float32 scalar."""
    return jnp.ldexp(jnp.float32(1), -plateau.stalls)


def ended(state: Any) -> bool:
    """Whether a run is over by its state; never under another schedule."""
    return hasattr(state, "plateau") and int(state.plateau.stalls) > HALVINGS


def given(state: Any) -> dict:
    """The variables that a run would give if it ended at this state: with averaged parameters where
    it keeps them."""
    return {**state.variables, "params": {**state.variables["params"], **state.ema}}


def final(state: Any) -> Any:
    """The state with the variables that the run gives: those of the lowest loss, under another
    schedule the last ones."""
    if not hasattr(state, "plateau"):
        return state.replace(variables=given(state))
    kept = state.plateau.variables
    params = {**state.variables["params"], **kept["params"]}
    return state.replace(variables={**kept, "params": params})


def outcome(state: Any) -> dict[str, int]:
    """{"best_step"}, the step whose variables the run gives; {} under another schedule."""
    return {"best_step": int(state.plateau.step)} if hasattr(state, "plateau") else {}


def validation(
    training: Any, state: Any, source: Source, spec: pipeline.BatchSpec
) -> Callable[[Any], tuple[Any, dict]]:
    """state -> (state with its `Plateau` after a validation, {"validation_loss", "halvings"}).

    The images are whole batches of the shuffled split: `plateau.examples` (0: all) and as many more
    as fill the last. `task.loss` sees them as in training, each batch with a key of its own, at the
    step at which the run ends at the latest.

    Args:
      training: an `icm_jax.engine.train.Training`. state: gives the places of the result, and is
        donated, as each that is judged. source: the validation split. spec: of training batches.
    """
    run, task, _, mesh = training
    config = run.optim.plateau
    examples = min(config.get("examples", 0) or source.length, source.length)
    count = -(-examples // run.batch_size)
    spec = dataclasses.replace(spec, crop=pipeline.WHOLE)
    options = compiler_options(mesh.devices.flat[0].platform)
    alike = sharding.replicated(mesh)

    def loss_of(variables, batch, number):
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        with ops.traced_on(mesh):
            return task.loss(variables, batch, key, jnp.int32(run.steps))[0]

    def judge(state, loss):
        own = changing(task, given(state))
        found = judged(state.plateau, loss, state.step, own, config.patience)
        halvings = jnp.minimum(found.stalls, HALVINGS)
        return state.replace(plateau=found), {"validation_loss": loss, "halvings": halvings}

    loss_of = jax.jit(loss_of, out_shardings=alike, compiler_options=options)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    judge = jax.jit(judge, donate_argnums=0, out_shardings=(places, alike))

    def validate(state):
        losses = []
        batches = pipeline.batches(source, spec, seed=run.seed, stop=count)
        for number, batch in enumerate(batches):
            placed = sharding.global_batch(mesh, batch)
            loss = loss_of(given(state), placed, np.int32(number))
            losses.append(float(loss))
        state, found = judge(state, np.float32(np.mean(losses)))
        return state, {name: value.item() for name, value in jax.device_get(found).items()}

    return validate
