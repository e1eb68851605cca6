"""What a run needs, before it is paid for: the true training step compiled for devices not at hand.

The acts are those of `engine.train` up to the compiled step, with shapes in place of arrays. For a
TPU the program is made by libtpu for the topology that is named, so memory, FLOPs and collectives
are read off the very program that would run there. Step times are a roofline's lower bounds:
nothing is executed.
"""

import fnmatch
import json
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.codecs.codec import forward
from icm_jax.data import DATASETS, open_source, pipeline
from icm_jax.engine import optim, sharding
from icm_jax.engine.train import compiled_step, initial
from icm_jax.errors import IcmError, reason
from icm_jax.tasks import build_task

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one device: bfloat16 FLOP/s, bytes of memory, bytes/s of memory, bytes/s
    that it can send to its neighbours (half of the bidirectional figure), and where they stand."""

    flops: float
    memory: float
    memory_rate: float
    network_rate: float
    source: str


_TPU, _GPU = "cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _TPU + "v5e"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _TPU + "v5p"),
    "v6e": Chip(918e12, 32 * GIB, 1600e9, 400e9, _TPU + "v6e"),
}
GPUS = {
    "A100": Chip(312e12, 80e9, 2039e9, 300e9, _GPU + "a100"),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9, _GPU + "h100"),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9, _GPU + "h200"),
}
"""By what their names contain; SXM forms, without sparsity."""
RESERVED = 0.25 * GIB
"""Of the memory, for the system: XLA gives programs 15.75 GiB of a v5e's 16."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Target(NamedTuple):
    """Devices to compile for; `chip` is None where nothing is published of them."""

    name: str
    devices: list
    chip: Chip | None


def prepare_host(topology: str) -> None:
    """Settings that must be made before JAX looks for devices: this host plans on its CPU.

    Raises: IcmError for a topology that is not written as `open_target` wants it.
    """
    kind, _, shape = topology.partition(":")
    if kind == "local":
        return
    if kind != "cpu" and kind not in CHIPS:
        kinds = ", ".join(f"{name}:AxB" for name in CHIPS)
        raise IcmError(f"no topology {topology!r}; write {kinds} (chips), cpu:N or local")
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise IcmError(f"{topology!r} has no shape; write {kind}:16x16, say")
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={math.prod(map(int, shape.split('x')))}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    # Without these libtpu asks the cloud's metadata server who it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def open_target(topology: str) -> Target:
    """The devices of "v5e:16x16" (a TPU slice by its chips), "cpu:8" (virtual) or "local".

    Raises: IcmError without libtpu, or for a slice that there is not.
    """
    kind = topology.partition(":")[0]
    if kind in ("cpu", "local"):
        devices = jax.devices()
        named = [chip for name, chip in GPUS.items() if name in devices[0].device_kind]
        return Target(topology, devices, named[0] if named else None)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # JAX raises RuntimeError, NotImplementedError or its own
        raise IcmError(
            f"cannot describe {topology}: {reason(error)}. It needs libtpu (pip install "
            "'icm_jax[tpu]', or TPU_LIBRARY_PATH) and a slice that exists"
        ) from error
    return Target(topology, list(found.devices), CHIPS[kind])


def counted(run):
    """The task's config with the numbers of classes; the data is opened only if it must be."""
    known = DATASETS.get(run.data.name)
    config = run.task.copy_and_resolve_references()
    with config.unlocked():
        if known and known.classes is not None:
            config.classes, config.mask_classes = known.classes, known.mask_classes
        else:
            source = open_source(run.data, "train")
            config.classes, config.mask_classes = len(source.classes), len(source.mask_classes)
    return config


def abstract_step(run, target: Target):
    """(the jitted step, its arguments as shapes with places) of a run on a target.

    Raises: IcmError as `train.train` does for the same config.
    """
    mesh = sharding.make_mesh(run.fsdp, target.devices)
    sharding.check_batch(mesh, run.batch_size)
    task = build_task(counted(run))
    optimiser = optim.make_optimiser(run.optim, run.steps, run.batch_size)
    _, state = initial(task, optimiser, run, mesh)
    sizes = pipeline.layout(
        DATASETS[run.data.name].keys,
        run.batch_size,
        (run.data.canvas,) * 2,
        run.data.get("boxes", 0),
        run.data.get("coefficients", ""),
        "mask" in run.needs,
    )
    if run.decode_once:
        side = run.task.size
        image = jax.ShapeDtypeStruct((run.batch_size, side, side, 3), jnp.uint8)
        coded = jax.eval_shape(
            lambda v, x: forward(task.codec, v, {"image": x}, (side, side)).outputs["feature"],
            state.variables,
            image,
        )
        del sizes["image"]
        sizes["feature"] = coded.shape, coded.dtype
    places = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=places[0])
        for name, (shape, dtype) in sizes.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=places[1])
    return compiled_step(task, optimiser, run, mesh, state), (state, batch, key)


def plan(run, target: Target) -> dict:
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
    state, batch, _ = arguments
    params = state.variables["params"]
    others = {k: v for k, v in state.variables.items() if k != "params"}
    record = {
        "run": run.name,
        "topology": target.name,
        "devices": len(target.devices),
        "batch": run.batch_size,
        "remat": run.get("remat", "none"),
        "fsdp": run.fsdp,
        "parameters": _bytes(params),
        "optimiser": _bytes(state.opt_state),
        "others": _bytes((others, state.ema)),
        "batch_bytes": _bytes(batch),
    }
    chip = target.chip
    if chip:
        record["memory"] = chip.memory - RESERVED
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))
        if not used:
            raise
        units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
        peak, memory = (float(n) * units[u] for n, u in (used.groups()[:2], used.groups()[2:]))
        return record | {"peak": peak, "memory": memory, "excess": peak - memory}
    size = compiled.memory_analysis()
    record["temporary"] = size.temp_size_in_bytes
    record["peak"] = (
        size.argument_size_in_bytes
        + size.output_size_in_bytes
        - size.alias_size_in_bytes
        + size.temp_size_in_bytes
        + size.generated_code_size_in_bytes
    )
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    record |= {"flops": cost["flops"], "bytes_accessed": cost["bytes accessed"]}
    if chip and record["peak"] > record["memory"]:  # compilers for GPUs do not mind
        record["excess"] = record["peak"] - record["memory"]
    program = compiled.as_text()
    record["sent"], record["largest"] = sent(program, record["devices"]), {}
    for own in collectives(program, record["devices"]):
        record["largest"][own.kind] = max(own.size, record["largest"].get(own.kind, 0))
    if chip:
        seconds = {
            "compute": record["flops"] / chip.flops,
            "traffic": record["bytes_accessed"] / chip.memory_rate,
            "network": sum(record["sent"].values()) / chip.network_rate,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        record |= seconds | {"seconds": seconds[bound], "bound": bound}
        record["images_per_second"] = run.batch_size / seconds[bound]
    return record


def _bytes(tree) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


class Collective(NamedTuple):
    """One collective operation of a program: its kind, the bytes of its whole result on a device,
    how many devices take part, and how often it runs in a step."""

    kind: str
    size: int
    group: int
    times: int


def collectives(text: str, devices: int) -> Iterator[Collective]:
    """Every collective operation of a program compiled for so many devices, from its HLO text."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    yield from _within(bodies, entry, 1, devices)


_DONE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def _within(bodies, name: str, times: int, devices: int) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        found = _DONE.search(line)
        if found:
            shapes, kind, start = found.groups()
            parts = [_shape_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
            one_to_one = kind == "collective-permute"
            if start and kind != "all-reduce":  # its result holds the operands, too
                parts = parts[1:2] if one_to_one else parts[len(parts) // 2 :]
            group = 2 if one_to_one else _group(line, devices)
            yield Collective(kind, sum(parts), group, times)
            continue
        loop = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
        inner = times * (int(loop[1]) if loop else 1)
        for called in _CALLED.findall(line):
            yield from _within(bodies, called, inner, devices)
        for called in (own for group in _BRANCHES.findall(line) for own in group.split(", ")):
            yield from _within(bodies, called.strip("% "), times, devices)


def _group(line: str, devices: int) -> int:
    """Devices in a group, which XLA writes in one of these ways: {{0,1},{2,3}}; {} for all;
    [groups,devices]<=[...]; mesh['a'=2,'b'=4] {'b'}, axes of a mesh or parts 'b':(before)size, also
    with device_ids=([2,4]T(1,0)) between, the order of its devices."""
    groups = line.partition("replica_groups=")[2]
    if re.match(r"\{\{", groups):
        return groups[: groups.index("}")].count(",") + 1
    if groups.startswith("{}"):
        return devices
    if compact := re.match(r"\[(\d+),(\d+)\]", groups):
        return int(compact[2])
    if mesh := re.match(r"\w*mesh\w*\[([^\]]*)\](?:, device_ids=\S+)?\s*\{([^}]*)\}", groups):
        sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sides[name] for name, part in parts)
    raise ValueError(f"cannot read the groups of {line.strip()[:200]}")


_WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}


def _shape_bytes(dtype: str, sides: str) -> int:
    bits = re.fullmatch(r"[su](\d+)", dtype)
    width = _WIDTHS.get(dtype) or (max(1, int(bits[1]) // 8) if bits else 1)
    return width * math.prod(int(side) for side in sides.split(",") if side)


def sent(text: str, devices: int) -> dict[str, float]:
    """{kind: bytes that a device sends in a step}, by rings: those move the least."""
    totals: dict[str, float] = {}
    for kind, size, group, times in collectives(text, devices):
        others = group - 1
        share = {
            "all-reduce": 2 * others / group,
            "reduce-scatter": others,  # its result is one part
            "collective-permute": 1,
        }.get(kind, others / group)
        totals[kind] = totals.get(kind, 0.0) + times * share * size
    return totals


def compare(run, target: Target) -> list[dict]:
    """The run's own plan first; then with other `remat` and `fsdp`, and with the largest batch."""
    records = [plan(run, target)]
    own = {"remat": run.get("remat", "none"), "fsdp": run.fsdp}
    shards = math.gcd(8, len(target.devices))
    for change in ({"remat": "convolutions"}, {"remat": "blocks"}, {"fsdp": shards}):
        if own | change != own:
            records.append(plan(_changed(run, **change), target))
    best = largest_batch(run, target, records[0])
    return records + ([best] if best and best["batch"] != run.batch_size else [])


def largest_batch(run, target: Target, record: dict) -> dict | None:
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
        found = plan(_changed(run, batch_size=rows * count), target)
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


def _changed(run, **fields):
    run = run.copy_and_resolve_references()
    with run.unlocked():
        run.update(fields)
    return run


def distinct(runs, pattern: str = "*") -> list:
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


def describe(target: Target, records: list[dict]) -> str:
    """Tables of the records, the figures they rest on, and advice for what does not fit."""
    chip = target.chip
    lines = [f"{target.name}: {len(target.devices)} devices"]
    if chip:
        lines[0] += (
            f" of {chip.flops / 1e12:.0f} TFLOP/s (bfloat16), {chip.memory / GIB:.0f} GiB at "
            f"{chip.memory_rate / 1e9:.0f} GB/s, sending {chip.network_rate / 1e9:.0f} GB/s "
            f"({chip.source})"
        )
    lines += ["", "Per device:", "", memory_table(records), "", "A step:", "", cost_table(records)]
    for record in records:
        if "excess" in record:
            lines += ["", advice(record)]
    return "\n".join(lines)


def advice(record: dict) -> str:
    """What would make a program fit that is too large."""
    much = f"{record['run']} at batch {record['batch']:,} needs {_size(record['excess'])} too much"
    ways = []
    if record["remat"] != "blocks":
        ways.append("--config.train.remat=blocks")
    ways.append(f"a batch of about {_fitting(record):,}")
    held = record["parameters"] + record["optimiser"]
    if held > 0.2 * record["peak"]:
        ways.append(f"--config.train.fsdp={math.gcd(8, record['devices'])}")
    return f"{much}: try {', or '.join(ways)}; --compare compiles these"


def _fitting(record: dict) -> int:
    """The batch that would fit if memory beside the state grew with it."""
    held = record["parameters"] + record["optimiser"] + record["others"]
    rows = record["batch"] / record["devices"]
    rows *= max(record["memory"] - held, 0) / max(record["peak"] - held, 1)
    return record["devices"] * 2 ** max(0, math.floor(math.log2(max(rows, 1))))


def memory_table(records: list[dict]) -> str:
    """Bytes of one device, as a Markdown table."""
    kept = ("parameters", "optimiser", "others", "batch_bytes", "temporary", "peak")
    rows = []
    for own in records:
        sizes = [_size(own.get(name)) for name in kept]
        room = own["memory"] - own["peak"] if "memory" in own else None
        sizes.append("" if room is None else ("" if room >= 0 else "-") + _size(abs(room)))
        rows.append([*_what(own), *sizes])
    heads = ("parameters", "optimiser", "other state", "batch", "within a step", "peak", "free")
    return _table([*_WHAT, *heads], rows)


def cost_table(records: list[dict]) -> str:
    """Work of one step on one device and the roofline's times, as a Markdown table."""
    rows = []
    for own in records:
        if "flops" not in own:
            continue
        kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in sorted(own["sent"].items()))
        row = [f"{own['flops'] / 1e12:.3g}", _size(own["bytes_accessed"]), kinds or "nothing"]
        if "seconds" in own:
            row += [f"{1e3 * own[name]:.3g} ms" for name in ("compute", "traffic", "network")]
            row += [own["bound"], f"{own['images_per_second']:,.0f}"]
        rows.append([*_what(own), *row])
    heads = ["TFLOP", "memory traffic", "sent"]
    if any("seconds" in own for own in records):
        heads += ["compute", "traffic", "network", "bound", "images/s at most"]
    return _table([*_WHAT, *heads], rows)


_WHAT = ("run", "batch", "remat", "fsdp")


def _what(own: dict) -> list[str]:
    return [own["run"], f"{own['batch']:,}", own["remat"], str(own["fsdp"])]


def _table(heads, rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _size(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
