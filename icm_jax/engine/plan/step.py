"""One step of a run: compiled as `engine.train` compiles it, and what its program costs."""

import dataclasses
import fnmatch
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from icm_jax.codecs.codec import forward
from icm_jax.data import DATASETS, geometry, label_keys, open_source, pipeline
from icm_jax.engine import sharding
from icm_jax.engine.cost import held
from icm_jax.engine.plan import hlo
from icm_jax.engine.plan.chips import GIB, RESERVED, Chip, Target
from icm_jax.engine.run import Run
from icm_jax.engine.train import TrainState, compiled_step, initial, prepare
from icm_jax.tasks import build_task


def counted(run: Run) -> ml_collections.ConfigDict:
    """The task's config with the numbers of classes; the data is opened only if it must be."""
    data = run.data if run.classes_of is None else run.classes_of
    known = DATASETS.get(data.name)
    config = run.task.copy_and_resolve_references()
    with config.unlocked():
        if known and known.classes is not None:
            config.classes, config.mask_classes = known.classes, known.mask_classes
        else:
            source = open_source(data, "train")
            config.classes, config.mask_classes = len(source.classes), len(source.mask_classes)
    return config


def abstract_step(
    run: Run, target: Target
) -> tuple[Any, tuple[TrainState, dict, jax.ShapeDtypeStruct]]:
    """(the jitted step, its arguments as shapes with places) of a run on a target.

    Raises: IcmError as `train.train` does for the same config.
    """
    training = prepare(run, build_task(counted(run)), target.devices)
    _, state = initial(training)
    spec = pipeline.batch_spec(run.data, run.batch_size, masks="mask" in run.needs)
    sizes = pipeline.layout(label_keys(run.data), spec)
    if run.decode_once:
        codec = training.task.codec
        assert codec
        size = geometry.sides(run.task.size)
        image = jax.ShapeDtypeStruct((run.batch_size, *size, 3), jnp.uint8)
        coded = jax.eval_shape(
            lambda v, x: forward(codec, v, {"image": x}, size).outputs["feature"],
            state.variables,
            image,
        )
        del sizes["image"]
        sizes["feature"] = coded.shape, coded.dtype
    places = sharding.batch_sharding(training.mesh), sharding.replicated(training.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=places[0])
        for name, (shape, dtype) in sizes.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=places[1])
    return compiled_step(training, state), (state, batch, key)


def plan(run: Run, target: Target) -> dict:
    """What one step of a run costs on one device of a target, read off its compiled program.

    Returns: a flat dict: run, topology, devices, batch, remat, fsdp; in bytes per device
      parameters, optimiser, others (statistics, averages, queue), batch_bytes, temporary
      (activations, gradients and whatever else lives within a step) and peak; "memory" that there
      is; flops and bytes_accessed of a device in a step; "sent": {kind of collective: bytes that a
      device sends} and "largest": {kind: bytes of the largest result}; seconds of "compute",
      "traffic" and "network", of which "seconds" is the largest and "bound" its name;
      images_per_second; and "excess", the bytes by which a program is too large. A TPU's is not
      made then, and what would be read off it left out.

    Raises: IcmError for a config that cannot be trained.
    """
    step, arguments = abstract_step(run, target)
    record = _kept(run, target, *arguments[:2])
    if target.chip:
        record["memory"] = target.chip.memory - RESERVED
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return record | _too_large(error)
    record |= _read_off(compiled, len(target.devices))
    if target.chip:
        if record["peak"] > record["memory"]:  # compilers for GPUs do not mind
            record["excess"] = record["peak"] - record["memory"]
        record |= _roofline(record, target.chip)
    return record


def _kept(run: Run, target: Target, state: TrainState, batch: dict) -> dict:
    """What a step is of, and the bytes of what it starts from."""
    others = {k: v for k, v in state.variables.items() if k != "params"}
    return {
        "run": run.name,
        "topology": target.name,
        "devices": len(target.devices),
        "batch": run.batch_size,
        "remat": run.remat,
        "fsdp": run.fsdp,
        "parameters": _bytes(state.variables["params"]),
        "optimiser": _bytes(state.opt_state),
        "others": _bytes((others, state.ema, getattr(state, "plateau", ()))),
        "batch_bytes": _bytes(batch),
    }


def _too_large(error: Exception) -> dict:
    """What a TPU's compiler tells of a program that it refuses for its size."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))
    if not used:
        raise error
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    peak, memory = (float(n) * units[u] for n, u in (used.groups()[:2], used.groups()[2:]))
    return {"peak": peak, "memory": memory, "excess": peak - memory}


def _read_off(compiled: Any, devices: int) -> dict:
    """A program's memory, work and messages."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    program = compiled.as_text()
    largest: dict[str, int] = {}
    for message in hlo.collectives(program, devices):
        largest[message.kind] = max(message.size, largest.get(message.kind, 0))
    return {
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "peak": held(compiled),
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "sent": hlo.sent(program, devices),
        "largest": largest,
    }


def _roofline(record: dict, chip: Chip) -> dict:
    """The least time of a step by each of a chip's limits, and which is the largest."""
    seconds = {
        "compute": record["flops"] / chip.flops,
        "traffic": record["bytes_accessed"] / chip.memory_rate,
        "network": sum(record["sent"].values()) / chip.network_rate,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    rate = record["batch"] / seconds[bound]
    return seconds | {"seconds": seconds[bound], "bound": bound, "images_per_second": rate}


def _bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compare(run: Run, target: Target) -> list[dict]:
    """The run's own plan first; then with other `remat` and `fsdp`, and with the largest batch."""
    records = [plan(run, target)]
    given = {"remat": run.remat, "fsdp": run.fsdp}
    shards = math.gcd(8, len(target.devices))
    for change in ({"remat": "convolutions"}, {"remat": "blocks"}, {"fsdp": shards}):
        if given | change != given:
            records.append(plan(dataclasses.replace(run, **change), target))
    best = largest_batch(run, target, records[0])
    return records + ([best] if best and best["batch"] != run.batch_size else [])


def largest_batch(run: Run, target: Target, record: dict) -> dict | None:
    """The plan with the most images per device, among powers of two, that fits; None if none does
    or nothing is known of the memory.

    Args:
      record: the plan of the run itself: what an image takes, and so where to look, is told by it
        and one more program.
    """
    if "memory" not in record:
        return None
    count = len(target.devices)
    rows = 2 ** round(math.log2(max(1, run.batch_size / count)))
    best = None
    while rows >= 1:
        found = plan(dataclasses.replace(run, batch_size=rows * count), target)
        fits = "excess" not in found and found["peak"] <= found["memory"]
        if not fits and best:
            return best
        if fits:
            best = found
            # Twice as much, as long as there is a chance that it fits.
            held = found["peak"] - found["temporary"]
            if held + 2 * found["temporary"] > 1.1 * found["memory"]:
                return best
            rows *= 2
        else:
            rows //= 2
    return best


def distinct(runs: Iterable[Run], pattern: str = "*") -> list[Run]:
    """Runs whose names match, without those that share a program with one before."""
    seen, found = set(), []
    for run in runs:
        if not fnmatch.fnmatch(run.name, pattern):
            continue
        task = dict(json.loads(run.task.to_json_best_effort()))
        data = {k: run.data.get(k) for k in ("name", "canvas", "boxes", "coefficients")}
        program = run.batch_size, run.optim.name, run.ema, run.fsdp, run.decode_once
        for weight in build_task(counted(run)).constants:
            task.pop(weight, None)
        key = json.dumps([task, data, program], sort_keys=True)
        if key not in seen:
            seen.add(key)
            found.append(run)
    return found
