"""Writes docs/scaling.md: plans of the published sizes for TPU slices, and weak scaling.

    python benchmarks/plan_scaling.py [--only hyperprior] [--kept plans.json]

Needs libtpu (pip install 'icm_jax[tpu]') and no TPU. With JAX_OPTIMIZATION_LEVEL=O1 in the
environment, as the document was made, the 17 programs take a core about an hour; without it they
take up to twenty minutes each and are a little better. What is done is kept in --kept, and the same
command goes on from there.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax

from icm_jax.engine import plan
from icm_jax.files import write_whole
from icm_jax.main import load_experiment

ROOT = pathlib.Path(__file__).resolve().parent.parent
SLICES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16")
GROWING = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
RUNS = {
    "hyperprior": ("hyperprior", "large", "*mean_scale_hyperprior", {"batch_size": 4096}),
    "scalable-coco": ("scalable", "coco", "*disentangled-0.013", {"batch_size": 4096}),
    "omni-stage1-4096": ("omni_icm", "imagenet", "*omni/stage1", {"batch_size": 4096}),
    "omni-stage1-32768": ("omni_icm", "imagenet", "*omni/stage1", {"batch_size": 32768}),
}
WEAK = ("hyperprior", 16)  # which of them, and images per device


def main() -> None:
    """Plans what is not kept yet, then writes the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names that begin so")
    parser.add_argument("--kept", default=str(ROOT / "runs" / "plans.json"))
    parser.add_argument("--out", default=str(ROOT / "docs" / "scaling.md"))
    options = parser.parse_args()
    kept = pathlib.Path(options.kept)
    done = json.loads(kept.read_text()) if kept.is_file() else {}
    kept.parent.mkdir(parents=True, exist_ok=True)
    level = str(jax.config.jax_optimization_level or "default")
    for name, topology, changes in cases():
        key = f"{name} {topology} {changes['batch_size']} {level}"
        if key in done or not name.startswith(options.only):
            continue
        print(key, file=sys.stderr, flush=True)
        plan.prepare_host(topology)
        experiment, scale, only, _ = RUNS[name]
        module = load_experiment(str(ROOT / "configs" / f"{experiment}.py"))
        run = plan.distinct(module.runs(module.get_config(scale)), only)[0]
        run = dataclasses.replace(run, **changes)
        record = plan.plan(run, plan.open_target(topology))
        done[key] = record | {"level": level, "case": name}
        write_whole(kept, json.dumps(done, indent=1).encode())
    write_whole(options.out, document(done).encode())
    print(f"{options.out}: {len(done)} programs")


def cases():
    """(name in RUNS, topology, changed fields of the run)."""
    for name, (*_, changes) in RUNS.items():
        for topology in SLICES:
            yield name, topology, changes
    name, each = WEAK
    for topology in GROWING:
        rows, columns = map(int, topology.partition(":")[2].split("x"))
        yield name, topology, {"batch_size": each * rows * columns}


def document(done: dict) -> str:
    """docs/scaling.md."""
    lines = [
        "# What the published sizes need on TPU slices",
        "",
        "Read off the training steps that libtpu compiled for these slices, without a TPU, by",
        "",
        "    JAX_OPTIMIZATION_LEVEL=O1 python benchmarks/plan_scaling.py",
        "",
        f"with JAX {jax.__version__}. Times are a roofline's: the least that the chip's published",
        "figures allow. One run and slice of one's own: `python -m icm_jax.main --config=...",
        "--mode=plan --topology=v5e:16x16`.",
        "",
        *(
            f"- `{name}`: `configs/{config}.py:{scale}`, run `{only.lstrip('*')}`"
            for name, (config, scale, only, _) in RUNS.items()
        ),
    ]
    weak = [own for own in done.values() if own["topology"] in GROWING and own["case"] == WEAK[0]]
    for topology in SLICES:
        own = [record for record in done.values() if record["topology"] == topology]
        if own:
            plan.prepare_host(topology)
            named = [record | {"run": record["case"]} for record in own]
            text = plan.describe(plan.open_target(topology), named)
            levels = sorted({record["level"] for record in own})
            lines += ["", f"## {topology}", "", text]
            lines += ["", f"Optimisation level of the compiler: {', '.join(levels)}."]
    if weak:
        lines += ["", "## Weak scaling", "", f"{WEAK[0]}, {WEAK[1]} images a device:", ""]
        lines += ["| devices | TFLOP of a device | sent by a device | peak |", "|---|---|---|---|"]
        for own in sorted(weak, key=lambda own: own["devices"]):
            sent = sum(own["sent"].values()) / 2**20
            cells = (own["devices"], f"{own['flops'] / 1e12:.3f}", f"{sent:.1f} MiB")
            lines.append(f"| {' | '.join(map(str, cells))} | {own['peak'] / plan.GIB:.2f} GiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
