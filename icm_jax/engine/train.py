"""The only training loop, in seven acts: mesh, data, task, optimiser, state, restore, steps.

Everything that happens at step t is a function of the run's config and t: the order of examples,
the random keys, the learning rate. So a run that was killed and started again ends in the same
bits, and the same code runs on one device and on many processes.
"""

import os
import pathlib
import sys
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm

from icm_jax import ops
from icm_jax.codecs.codec import forward
from icm_jax.compiled import give_back
from icm_jax.data import geometry, pipeline
from icm_jax.engine import checkpoint, frozen, optim, plateau, sharding
from icm_jax.engine.codes import open_source
from icm_jax.engine.log import Log, progress, short
from icm_jax.engine.run import CODEC, DONE, Run, claim, what_is_done
from icm_jax.engine.stopping import stop_request
from icm_jax.errors import IcmError
from icm_jax.files import make_folder, sealed, write_json
from icm_jax.nets.convolution import compiler_options
from icm_jax.nets.layers import BLOCK
from icm_jax.tasks import Task, build_task, views
from icm_jax.tasks.task import trained_part

DECODED_AT_ONCE = 32  # images
_decoded: dict[tuple, np.ndarray] = {}  # the newest result of decoded_split


class Training(NamedTuple):
    """What a run's steps are made of."""

    run: Run
    task: Task
    optimiser: optax.GradientTransformation
    mesh: jax.sharding.Mesh


def prepare(run: Run, task: Task, devices=None) -> Training:
    """The task with the run's optimiser and mesh, of all devices if none are given.

    Raises: IcmError if the batch or `run.fsdp` does not fit the devices, or as
      `optim.make_optimiser` does.
    """
    mesh = sharding.make_mesh(run.fsdp, devices)
    sharding.check_batch(mesh, run.batch_size)
    return Training(run, task, optim.make_optimiser(run.optim, run.steps, run.batch_size), mesh)


class TrainState(flax.struct.PyTreeNode):
    """step: int32 scalar; variables: params and other collections; ema: averaged params or {}."""

    step: jax.Array
    variables: Any
    opt_state: Any
    ema: Any


class Watched(TrainState):
    """The state of a run whose learning rate goes by the validation loss."""

    plateau: plateau.Plateau


def train(run: Run, base: str | os.PathLike) -> dict:
    """Trains one run in `base`/run.name, or resumes it, or returns at once if it is done.

    `base` is the work directory, where also lie the earlier runs of `run.start` that name no other.

    Returns: the metrics of the last logging interval.

    Raises:
      IcmError: unusable config, data or batch, a folder of another run, a loss that is not finite
        (named with its step; the last good checkpoint is kept), or a checkpoint that cannot be
        written.
    """
    folder = pathlib.Path(base) / run.name
    make_folder(folder)
    claim(folder, run, jax.process_index() == 0)
    done = what_is_done(folder)
    if sharding.as_first(jax.process_index() == 0 and whole(run, base)):
        return done["metrics"] if done else {}
    source = open_source(run.data, "train")
    held_out = plateau.held_out(run) if plateau.asked(run) else None
    task = build_task(complete(run, source))
    training = prepare(run, task)
    start = [(checkpoint.load_variables(given.folder(base)), given.parts) for given in run.start]
    standing = any(given.codec for given in run.start)
    codec = frozen.load_codec(run, base) if standing else None
    if codec is not None:
        start = [
            (frozen.with_file(earlier, codec), (*parts, *frozen.parts_of(codec)))
            if given.codec
            else (earlier, parts)
            for (earlier, parts), given in zip(start, run.start, strict=True)
        ]
    features = decoded_split(codec, source, run) if run.decode_once else None
    with checkpoint.manager(folder, period=run.keep_every) as checkpoints:
        state, first = make_state(training, checkpoints, start)
        if not run.steps and not checkpoints.all_steps():
            checkpoint.save(checkpoints, 0, state)
        spec = pipeline.batch_spec(
            run.data,
            run.batch_size,
            masks="mask" in run.needs,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        validate = held_out and plateau.validation(training, state, held_out, spec)
        order = dict(seed=run.seed, start=first, stop=run.steps)
        batches = pipeline.batches(source, spec, **order, features=features)
        done = loop(training, state, first, batches, checkpoints, folder, validate)
    if jax.process_index() == 0:
        if run.codec_file is not None:
            trained = checkpoint.read_variables(folder, done["step"])
            frozen.write_codec(task.codec, trained, run, base)
        write_json(folder / DONE, sealed(done))
        if held_out:
            told = f"{run.name} is what it was at step {done['best_step']} of {done['step']}"
            print(f"{told}, where its validation loss was lowest", file=sys.stderr)
    sharding.as_first(True)  # nobody goes on before that is written
    return done["metrics"]


def whole(run: Run, base: str | os.PathLike) -> bool:
    """Whether a run has finished, and done.json and its codec file can be read; a damaged one is
    named: it is written anew from the newest checkpoint."""
    folder = pathlib.Path(base) / run.name
    if not (folder / DONE).is_file():
        return False
    damage = "" if what_is_done(folder) else f"{folder / DONE} is damaged"
    if run.codec_file is not None and not damage and not (folder / CODEC).is_file():
        damage = "it has no codec file"
    elif run.codec_file is not None and not damage:
        try:
            frozen.load_codec(run, base)
        except IcmError as error:
            damage = str(error)
    if damage:
        print(f"{run.name} is finished anew from its newest checkpoint: {damage}", file=sys.stderr)
    return not damage


def decoded_split(codec: frozen.FrozenCodec | None, source, run: Run) -> np.ndarray:
    """What a codec file's decoder gives for every image of a source, in order: float32
    [n, H/4, W/4, C]. It sees the very integers that a file would hold; only the file is left out.

    It stays in the memory of each host, 4·n·H/4·W/4·C bytes; the next task on the same codec finds
    it there. Every process computes all of it, on one device and in the same batches, so that it
    does not depend on how many there are.
    """
    size = geometry.sides(run.task.size)
    if codec is None:
        raise IcmError(f"{run.name} is to decode once, but no `start` of it has codec=True")
    name = (codec.fingerprint, run.data.to_json_best_effort(), size)
    if name in _decoded:
        return _decoded[name]
    _decoded.clear()

    @jax.jit
    def decode(variables, images):
        inputs = {"image": views.centre(images, size)}
        return forward(codec.codec, variables, inputs, size).outputs["feature"]

    boxed = pipeline.batch_spec(run.data, DECODED_AT_ONCE, masks=False, outlines=0)
    spec = boxed if boxed.boxes else pipeline.image_spec(run.data, DECODED_AT_ONCE)
    batches = pipeline.in_order(source, spec)
    total = -(-source.length // DECODED_AT_ONCE)
    hidden = jax.process_index() > 0
    bar = tqdm.tqdm(batches, f"{run.name} decoding", total, unit="batch", disable=hidden)
    rows = [np.asarray(decode(codec.on_device, batch["image"])) for batch in bar]
    _decoded[name] = np.concatenate(rows)[: source.length]
    return _decoded[name]


def complete(run: Run, source) -> ml_collections.ConfigDict:
    """The config of a run's task with the numbers of classes that its data, here the source, or
    those of `run.classes_of` have."""
    config = run.task.copy_and_resolve_references()
    if run.classes_of is not None:
        source = open_source(run.classes_of, "validation")
    with config.unlocked():
        config.classes, config.mask_classes = len(source.classes), len(source.mask_classes)
    return config


def make_state(training: Training, checkpoints, start=()) -> tuple[TrainState, int]:
    """(state on the mesh, its step): the newest whole checkpoint, or a fresh state.

    Restoring goes: own checkpoint; else `task.init`, then parts of earlier runs named in `start`,
    then `run.weights`, but for the parts of the codec that the run stands on.
    """
    run, task, _, mesh = training
    init, abstract = initial(training)
    saved, step = checkpoint.restore_newest(checkpoints, abstract)
    if saved is not None:
        return saved, step
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    compiled = jax.jit(init, out_shardings=shardings, compiler_options=quickly(mesh))
    state = compiled(jax.random.key(run.seed), dict(task.constants))
    variables = state.variables
    for earlier, prefixes in start:
        variables = copy_parts(variables, earlier, prefixes)
    if run.weights:
        variables = frozen.started(variables, run, task.codec)
    if start or run.weights:
        trained = trained_part(task, variables["params"])
        ema = jax.tree.map(jnp.copy, trained) if run.ema else {}
        state = state.replace(variables=variables, ema=ema)
        state = jax.jit(lambda s: s, out_shardings=shardings)(state)
    return state, 0


def quickly(mesh) -> dict | None:
    """Compiler options of a program that runs once, of many random numbers: on CPUs LLVM's full
    optimisation takes twice as long and more, for the same numbers but for rounding (with JAX 0.10
    the same bits). XLA_FLAGS go before."""
    option = "xla_backend_optimization_level"
    asked = option in os.environ.get("XLA_FLAGS", "")
    return None if asked or mesh.devices.flat[0].platform != "cpu" else {option: 1}


def initial(training: Training):
    """((key, constants) -> a fresh state, that state's shapes and places on the mesh)."""
    run, task, optimiser, mesh = training
    shape = (run.batch_size, *geometry.sides(run.data.canvas), 3)

    def init(key, constants):
        variables = task.init(key, {"image": jnp.zeros(shape, jnp.uint8)})
        variables |= {"constants": constants} if constants else {}
        trained = trained_part(task, variables["params"])
        ema = jax.tree.map(jnp.copy, trained) if run.ema else {}
        state = jnp.zeros((), jnp.int32), variables, optimiser.init(trained), ema
        if plateau.asked(run):
            return Watched(*state, plateau.begin(task, variables))
        return TrainState(*state)

    shapes = jax.eval_shape(init, jax.random.key(0), dict(task.constants))
    shardings = sharding.state_shardings(mesh, shapes)
    abstract = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        shardings,
    )
    return init, abstract


def copy_parts(variables: dict, earlier: dict, prefixes) -> dict:
    """`variables` with the subtrees "collection/name" taken from another run's variables.

    Parts that neither side has (a network without BatchNorm) are passed over.

    Raises: IcmError if only one side has a part, or if shapes differ.
    """
    variables = {name: dict(tree) for name, tree in variables.items()}
    for prefix in prefixes:
        collection, name = prefix.split("/")
        given, fresh = (tree.get(collection, {}).get(name) for tree in (earlier, variables))
        if given is None and fresh is None:
            continue
        if given is None or fresh is None:
            raise IcmError(f"cannot start from an earlier run: only one side has {prefix!r}")
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (given, fresh)]
        if shapes[0] != shapes[1]:
            raise IcmError(f"cannot start from an earlier run: {prefix!r} has another shape there")
        variables[collection][name] = given
    return variables


REMAT = {
    "none": None,
    "convolutions": jax.checkpoint_policies.dots_saveable,
    "blocks": jax.checkpoint_policies.save_only_these_names(BLOCK),
}
"""What the forward pass leaves for the backward pass: all it needs, the results of convolutions and
matrix products, or those of whole blocks; the rest is computed again."""


def make_step(task: Task, optimiser, run):
    """The pure step (state, batch, key) -> (state, metrics); frozen parts get no gradient. Of a run
    it takes remat, ema and optim.accumulate."""
    remat = run.remat

    def step(state: TrainState, batch, key):
        params = state.variables["params"]
        trained: Any = trained_part(task, params)  # a dict throughout, which optax's types forget

        def loss_of(trained):
            variables = {**state.variables, "params": {**params, **trained}}
            return task.loss(variables, batch, jax.random.fold_in(key, state.step), state.step)

        if REMAT[remat]:
            loss_of = jax.checkpoint(loss_of, policy=REMAT[remat])
        (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, opt_state = optimiser.update(gradients, state.opt_state, trained)
        if isinstance(state, Watched):
            rate = plateau.rate(state.plateau)
            updates = jax.tree.map(lambda update: rate * update, updates)
        trained = optax.apply_updates(trained, updates)
        averaged = state.ema
        if run.ema:
            updated = (state.step + 1) % run.optim.get("accumulate", 1) == 0
            share = jnp.where(updated, jnp.float32(1 - run.ema), 0.0)
            averaged = optax.incremental_update(trained, averaged, share)
        variables = {**state.variables, **aux.collections, "params": {**params, **trained}}
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients), **aux.metrics}
        changed = dict(variables=variables, opt_state=opt_state, ema=averaged)
        return state.replace(step=state.step + 1, **changed), metrics

    return step


def compiled_step(training: Training, state):
    """`make_step` under jit; `state` gives the places of its own result, and is donated."""
    run, task, optimiser, mesh = training
    pure = make_step(task, optimiser, run)

    def step(*arguments):
        with ops.traced_on(mesh):
            return pure(*arguments)

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def loop(
    training: Training, state, first: int, batches, checkpoints, folder, validate=None
) -> dict:
    """Runs steps first ... run.steps - 1 with logging, saving and a clean stop on a signal.

    While a step runs, the next batch is put on the devices, and the step before is waited for, so
    that no more than three batches are there.

    Args:
      validate: of a run by plateau, see `plateau.validation`; it may end the run sooner.

    Returns: what done.json holds.
    """
    run, _, _, mesh = training
    step_of = compiled_step(training, state)
    key = jax.jit(lambda: jax.random.key(run.seed), out_shardings=sharding.replicated(mesh))()
    log, bar = Log(folder, first, run.batch_size), progress(run.name, first, run.steps)
    metrics, measured, judged = log.newest, {}, {}
    end = first if plateau.ended(state) else run.steps
    placed = (sharding.global_batch(mesh, batch) for batch in batches)
    batch = next(placed, None) if first < end else None
    if batch is not None:
        step_of = step_of.lower(state, batch, key).compile()
        give_back()  # before the step takes as much and more
    with bar, stop_request() as stopping:
        for step in range(first + 1, end + 1):
            before = measured
            with log.waiting("device"):  # some backends run a step before they return
                state, measured = step_of(state, batch, key)
            with log.waiting("input"):
                batch = next(placed, None)
            with log.waiting("device"):
                jax.block_until_ready(before)
            log.add(step, measured)
            bar.update()
            last, stop, found = step == end, stopping(), {}
            if validate and (last or step % run.optim.plateau.interval == 0):
                with log.apart(measured):
                    state, found = validate(state)
                judged, last = found, last or plateau.ended(state)
            saves = last or step % run.save_every == 0 or stop
            if saves or found or step % run.log_every == 0:
                metrics = log.write(found)
                bar.set_postfix_str(short(metrics | judged) + log.starving)
            if saves:
                checkpoint.save(checkpoints, step, plateau.final(state) if last else state)
            if last:
                break
            if stop:
                checkpoint.wait(checkpoints)
                bar.close()
                print(f"stopped at step {step} of {run.name}; state is saved", file=sys.stderr)
                raise SystemExit(128 + stop)
    checkpoint.wait(checkpoints)
    return {"step": int(state.step), "metrics": metrics} | plateau.outcome(state)
