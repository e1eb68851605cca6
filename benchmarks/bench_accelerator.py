"""Training steps and inference on one accelerator, ours beside PyTorch with the same networks.

    PYTHONPATH=. python benchmarks/bench_accelerator.py [--parts stage1 hyperprior evaluation]
    PYTHONPATH=. python benchmarks/bench_accelerator.py --tiny     # that all of it runs, on a CPU

    stage1       the step of the run omni/stage1 of configs/omni_icm.py:imagenet: ResNet-50 at
                 224 px, information filter, momentum encoder, queue of 65,536 keys, SGD
    hyperprior   the step of configs/hyperprior.py:large (N = 192, M = 320, mean and scale, 8 levels
                 of quality) on crops of 256×256 px, AdamW; in float32 and in bfloat16
    evaluation   that codec's analysis, rounding and synthesis of 512×768 px images, in both; and
                 ResNet-50 with 1,000 classes at 224 px, bfloat16

Each library runs in a process of its own, in turn; images are random bytes on the device, weights
are random. PyTorch computes through torch.compile (where a C compiler is found), channels-last,
cuDNN's autotuner, fused optimisers, and autocast around just those networks that compute in
bfloat16 in ours: ResNet, filter and projector, analysis and synthesis. All else is float32, of
which matrix units see TF32 in both: XLA's default, and PyTorch's once it is allowed for matrix
products.

Our side is in accelerator_cases.py, PyTorch's, with what differs, in accelerator_torch.py.

FLOPs are counted once, for both, on our forward pass: two per multiply-accumulate of a convolution
or matrix product, by `icm_jax.engine.cost`, three times that for a training step, and once more for
the momentum encoder. Views, the queue and updates are left out. The synthesis transform is counted
as its mirror, the analysis transform: the form in which we compute it would add taps that are zero.
"""

import argparse
import gzip
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from accelerator_cases import TINY, Sizes, ours

PARTS = ("stage1", "hyperprior", "evaluation")
BATCHES = {"stage1": 256, "hyperprior": 32, "codec": 16, "resnet": 256}
TRACED = 3  # steps under the profiler
LEAST = 0.03  # share of the time from which on an operation is listed
NAMES = {"icm_jax": "ours", "pytorch": "PyTorch"}


def device_of_jax() -> dict:
    """Name and peak of the device, FLOP/s in bfloat16 or None."""
    import jax

    from icm_jax.engine import plan

    chip = plan.open_target("local").chip
    return {"device": jax.devices()[0].device_kind, "peak": chip.flops if chip else None}


def profile(call, wait) -> list[dict]:
    """What the GPU's time goes to in some calls: families of operations, the longest first.

    Returns: of each name (numbers at its end left out) its share of the time of all kernels, its
      seconds and calls per step, and where in the program the longest of its kind comes from;
      nothing where no device was traced.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                result = call()
            wait(result)
        traces = sorted(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(traces[-1].read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("ph") == "M"]
    devices = {
        event["pid"]
        for event in named
        if event["name"] == "process_name" and event["args"]["name"].startswith("/device:GPU")
    }
    streams = {
        (event["pid"], event["tid"])
        for event in named
        if event["name"] == "thread_name" and event["args"]["name"].startswith("Stream")
    }
    families: dict[str, list[dict]] = {}
    for event in events:
        on_stream = (event.get("pid"), event.get("tid")) in streams
        if event.get("ph") == "X" and on_stream and event["pid"] in devices:
            families.setdefault(re.sub(r"(_\d+)+$", "", event["name"]), []).append(event)
    total = sum(event["dur"] for own in families.values() for event in own)
    found = []
    for name, own in families.items():
        microseconds = sum(event["dur"] for event in own)
        arguments = max(own, key=lambda event: event["dur"]).get("args", {})
        origin = arguments.get("tf_op") or arguments.get("hlo_op", "")
        found.append(
            {
                "name": name,
                "share": microseconds / total,
                "seconds": microseconds / 1e6 / TRACED,
                "calls": len(own) / TRACED,
                "longest": origin,
            }
        )
    return sorted(found, key=lambda own: -own["share"])


def child(library: str, part: str, sizes: Sizes, options) -> None:
    """Measures the cases of a part and prints each, as soon as it is done, as a line of JSON."""
    if library == "icm_jax":
        import jax

        cases, wait, about = ours, jax.block_until_ready, device_of_jax()
    else:  # its CUDA libraries need not be those of JAX: only these processes import it
        import accelerator_torch

        cases, wait = accelerator_torch.pytorch, accelerator_torch.wait_for_torch
        about = {"compiled": accelerator_torch.compiles(options)}
    for case in cases(part, sizes, options):
        began = time.perf_counter()
        result = case.call()
        wait(result)
        first = time.perf_counter() - began
        for _ in range(options.warmup):
            result = case.call()
        wait(result)
        times = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            for _ in range(options.steps):
                result = case.call()
            wait(result)
            times.append((time.perf_counter() - began) / options.steps)
        record = about | {
            "case": case.name,
            "parameters": case.parameters,
            "value": float(result.mean()),  # the loss, or the mean of what was predicted
            "first_call_seconds": first,
            "step_seconds": float(np.median(times)),
            "images_per_second": case.images / float(np.median(times)),
            "batch": case.images,
            "flops": case.flops,
        }
        if options.profile and library == "icm_jax" and part != "evaluation":
            record["profile"] = profile(case.call, wait)
        print(json.dumps(record), flush=True)


def records_of(library: str, part: str, options) -> list[dict]:
    """Runs a child; what it measured, though it may have failed later, which is then printed."""
    python = options.torch_python if library == "pytorch" else sys.executable
    command = [python, __file__, *sys.argv[1:], "--child", library, part]
    try:
        done = subprocess.run(command, capture_output=True, timeout=options.timeout)
        output, errors, problem = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, errors, problem = late.stdout, late.stderr, f"stopped after {late.timeout:.0f} s"
    if problem:
        last = "\n".join((errors or b"").decode(errors="replace").splitlines()[-8:])
        print(f"{NAMES[library]}, {part}: failed ({problem})\n{last}", flush=True)
    lines = (output or b"").decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"') and line.endswith("}")]


def describe(found: dict[str, dict]) -> str:
    """Lines on one case, from {library: record}."""
    flops, peak = (found.get("icm_jax", {}).get(name) for name in ("flops", "peak"))
    lines = []
    for library, own in found.items():
        name = NAMES[library] + ("" if own.get("compiled", True) else ", eager")
        line = f"  {name:15} {own['images_per_second']:10,.1f} images/s"
        line += f" {1e3 * own['step_seconds']:9,.1f} ms"
        if flops:
            achieved = flops * own["images_per_second"]
            line += f" {achieved / 1e12:7.2f} TFLOP/s"
            line += f" {achieved / peak:6.1%} of the peak" if peak else ""
        line += f"; batch {own['batch']}, {own['parameters']:,} parameters,"
        line += f" value {own['value']:.5g}, first call {own['first_call_seconds']:.1f} s"
        lines.append(line)
    if len(found) == 2:
        mine, theirs = (found[library]["images_per_second"] for library in NAMES)
        counts = {own["parameters"] for own in found.values()}
        same = "the same number" if len(counts) == 1 else "DIFFERENT NUMBERS"
        lines.append(f"  ours / PyTorch  {mine / theirs:10.3f}; {same} of parameters")
    return "\n".join(lines)


def describe_profile(record: dict) -> str:
    """A table of the operations that take most, and how busy the device is."""
    rows = record["profile"]
    if not rows:
        return "  profile: no events of a GPU in the trace"
    busy = sum(row["seconds"] for row in rows) / record["step_seconds"]
    lines = [f"  kernels take {busy:.0%} of the measured step; of their time:"]
    lines += [f"  {'share':>6} {'calls':>6}  name; where its longest call comes from"]
    for row in rows:
        if row["share"] >= LEAST:
            share = f"{row['share']:6.1%} {row['calls']:6.0f}"
            lines.append(f"  {share}  {row['name'][:90]}; {row['longest'][-120:]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of the codec")
    parser.add_argument("--libraries", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    for name, size in BATCHES.items():
        parser.add_argument(f"--{name}-batch", type=int, default=size, metavar="IMAGES")
    parser.add_argument("--warmup", type=int, default=3, help="steps after the first")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each process")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="what our training steps consist of")
    parser.add_argument("--tiny", action="store_true", help="small networks, batches of 4")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="file for all numbers")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        vars(options).update({f"{name}_batch": 4 for name in BATCHES})
    if options.child:
        child(*options.child, TINY if options.tiny else Sizes(), options)
        return
    kept: dict[str, dict[str, dict]] = {}
    for part in options.parts:
        found: dict[str, dict[str, dict]] = {}
        for library in options.libraries:
            for record in records_of(library, part, options):
                found.setdefault(record["case"], {})[library] = record
        for case, own in found.items():
            device = own.get("icm_jax", {}).get("device")
            print(f"{case}" + (f" on {device}" if device else ""))
            print(describe(own), flush=True)
            if "profile" in own.get("icm_jax", {}):
                print(describe_profile(own["icm_jax"]), flush=True)
        kept |= found
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1))
    if any("flops" in own.get("icm_jax", {}) for own in kept.values()):
        print("FLOPs: counted on our forward pass, for both libraries; the peak is bfloat16's")


if __name__ == "__main__":
    main()
