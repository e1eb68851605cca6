"""Where the time of a run's training step goes on this machine, operation by operation.

    python benchmarks/profile_step.py --config=configs/omni_icm.py --only='*omni/stage1'
    python benchmarks/profile_step.py --config=configs/hyperprior.py --batch-size 8

Compiles the true step as `--mode=plan` does, feeds it random weights and random bytes, and prints
every operation above --least of the time of all of them: its share, kind and result, and the place
in the program that it comes from; then shares of the primitives of all. On a CPU several threads
may share one operation; its time is that of the thread that waits for it. XLA does not say where a
ynn_fusion comes from: convolutions and matrix products that YNNPACK computes.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import os
import pathlib
import re
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_xprof_traceme=true"
).strip()

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.engine import plan
from icm_jax.main import load_experiment

ENCLOSING = ("while", "call", "conditional")  # their time is that of what they hold


def main() -> None:
    """Compiles, runs, traces, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:scale")
    parser.add_argument("--only", default="*", help="pattern of runs, as for --mode=plan")
    parser.add_argument("--batch-size", type=int, default=0, help="instead of the config's")
    parser.add_argument("--steps", type=int, default=5, help="that are traced")
    parser.add_argument("--least", type=float, default=0.03, help="share that is named")
    options = parser.parse_args()
    path, _, scale = options.config.partition(":")
    module = load_experiment(path)
    config = module.get_config(scale) if scale else module.get_config()
    for run in plan.distinct(module.runs(config), options.only):
        if options.batch_size:
            run = dataclasses.replace(run, batch_size=options.batch_size)
        show(run, options)


def show(run, options) -> None:
    """Profiles one run's step."""
    step, arguments = plan.abstract_step(run, plan.open_target("local"))
    program = step.lower(*arguments).compile()
    state, batch, _ = jax.tree.map(filled, arguments)
    key = jax.random.key(0)
    state, metrics = program(state, batch, key)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(options.steps):
                state, metrics = program(state, batch, key)
            jax.block_until_ready((state, metrics))
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    described = dict(operations(program.as_text()))
    spent = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name and described.get(name, " ").split()[0] not in ENCLOSING:
            spent[name] += event["dur"] / 1e3 / options.steps
    total = sum(spent.values())
    device = jax.devices()[0].device_kind
    print(
        f"{run.name}, batch {run.batch_size}, {device}: {total:.1f} ms a step in {len(spent)} ops"
    )
    if not spent:
        raise SystemExit("error: this profiler names no operations; try a newer JAX")
    for name, own in spent.most_common():
        if own < options.least * total:
            break
        print(f"{own / total:6.1%}  {own:8.2f} ms  {described.get(name, name)}")
    kinds = collections.Counter()
    for name, own in spent.items():
        place = described.get(name, name).partition(" from ")[2]
        side = "backward" if "transpose(" in place else "forward" if "jvp(" in place else "neither"
        primitive = place.rpartition("/")[2] if "/" in place else re.sub(r"[._\d]+$", "", name)
        kinds[side, primitive] += own
    print("by primitive:")
    for (side, primitive), own in kinds.most_common():
        if own < options.least * total:
            break
        print(f"{own / total:6.1%}  {side} {primitive}")
    print(flush=True)


def filled(shape) -> jax.Array:
    """Random numbers for an abstract array: positive, as variances are, and far from overflow."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return None
    rng = np.random.default_rng(0)
    if shape.dtype == np.uint8:
        drawn = rng.integers(0, 256, shape.shape, np.uint8)
    elif jnp.issubdtype(shape.dtype, jnp.floating):
        drawn = np.asarray(rng.uniform(0.01, 0.05, shape.shape), shape.dtype)
    else:
        drawn = np.zeros(shape.shape, shape.dtype)
    return jax.device_put(drawn, shape.sharding)


def operations(text: str):
    """(name, "kind shape from place") of all operations of a compiled program."""
    within: dict[str, str] = {}  # of a fusion without a place, that of what it ends in
    body = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            body = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\([^)]*\)|\S+) ([\w\-]+)\(", line)
        if not found:
            continue
        name, shape, kind = found.groups()
        place, called = (re.search(p, line) for p in (r'op_name="([^"]*)"', r"calls=%?([\w.\-]+)"))
        place = place[1] if place else within.get(called[1], "") if called else ""
        within[body] = place or within.get(body, "")
        shape = re.sub(r"\{[^}]*\}", "", shape)
        yield name, f"{kind} {shape[:60]} from {place[-90:] or name}"


if __name__ == "__main__":
    main()
