"""Training steps, inference and coding on one accelerator, ours beside PyTorch where it is said.

    PYTHONPATH=. python benchmarks/bench_accelerator.py [--parts stage1 hyperprior ...]
    PYTHONPATH=. python benchmarks/bench_accelerator.py --tiny     # that all of it runs, on a CPU

    stage1       the step of the run omni/stage1 of configs/omni_icm.py:imagenet: ResNet-50 at
                 224 px, information filter, momentum encoder, queue of 65,536 keys, SGD
    hyperprior   the step of configs/hyperprior.py:large (N = 192, M = 320, mean and scale, 8 levels
                 of quality) on crops of 256×256 px, AdamW; in float32 and in bfloat16
    detection    the step of configs/yolov3.py:coco at 416 px, bfloat16; PyTorch is given less to do
    evaluation   that codec's analysis, rounding and synthesis of 512×768 px images, in both; and
                 ResNet-50 with 1,000 classes at 224 px, bfloat16
    coding       the model in the package: 512×768 px to .icm files and back, by phases; ours only
    coefficients ResNet-50 on RGB and the seven networks on DCT coefficients of configs/jpeg_dct.py
                 at 224 px, bfloat16, their inputs on the device or on the host; ours only

Each library runs in a process of its own, ours first; images are random bytes on the device, but
for coding, weights are random. PyTorch computes through torch.compile (where a C compiler is
found), channels-last, cuDNN's autotuner, fused optimisers, and autocast around just those networks
that compute in bfloat16 in ours: ResNet, filter and projector, analysis and synthesis, YOLOv3. All
else is float32, of which matrix units see TF32 in both: XLA's default, and PyTorch's once it is
allowed for matrix products. A line is printed as soon as a case is measured. No other program is
compiled meanwhile: XLA tries kernels on the device, and beside that equal work once took four times
as long (docs/gpu.md).

Our side is in accelerator_cases.py and accelerator_coding.py, PyTorch's, with what differs, in
accelerator_torch.py and accelerator_torch_detector.py.

FLOPs are counted once, for both, on our forward pass: two per multiply-accumulate of a convolution
or matrix product, by `icm_jax.engine.cost`, three times that for a training step, and once more for
the momentum encoder. Views, the queue and updates are left out. The synthesis transform is counted
as its mirror, the analysis transform: the form in which we compute it would add taps that are zero.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator

import numpy as np
from accelerator_cases import TINY, Case, Sizes, ours

TRAINING = ("stage1", "hyperprior", "detection")
PARTS = (*TRAINING, "evaluation", "coding", "coefficients")
BATCHES = dict(stage1=256, hyperprior=32, detection=32, codec=16, resnet=256, coefficients=256)
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


def child(library: str, sizes: Sizes, options) -> None:
    """Measures the cases of all parts and prints each, as soon as it is done, as a line of JSON."""
    if library == "icm_jax":
        import jax

        cases, wait, about = ours, jax.block_until_ready, device_of_jax()
    else:  # its CUDA libraries need not be those of JAX: only these processes import it
        import accelerator_torch

        cases, wait = accelerator_torch.pytorch, accelerator_torch.wait_for_torch
        about = {"compiled": accelerator_torch.compiles(options)}
    builds = [(part, build) for part in options.parts for build in cases(part, sizes, options)]
    kept = []
    for part, build in builds:
        try:
            began = time.perf_counter()
            found = build()
            about |= {"library": library, "build_seconds": time.perf_counter() - began}
            for case in found:
                record = about | measured(case, wait, options)
                print(json.dumps(record), flush=True)
                if options.profile and library == "icm_jax" and part in TRAINING:
                    kept.append((case, record))
            del found, case
        except Exception:  # the others are measured nevertheless
            print(f"{part}: {traceback.format_exc(limit=-3)}", file=sys.stderr, flush=True)
    for case, record in kept:  # last: tracing may leave something behind
        print(json.dumps(record | {"profile": profile(case.call, wait)}), flush=True)


def measured(case: Case, wait, options) -> dict:
    """The record of a case: medians over rounds, of which the last may begin within the budget."""

    def seconds(steps: int):
        began, result = time.perf_counter(), None
        for _ in range(steps):
            result = case.call()
        wait(result)
        return (time.perf_counter() - began) / steps, result

    first, result = seconds(1)
    if options.warmup:
        seconds(options.warmup)
    began, times, phases = time.perf_counter(), [], collections.defaultdict(list)
    while len(times) < options.rounds and time.perf_counter() - began < options.budget:
        if case.phases is not None:
            case.phases.clear()
        spent, result = seconds(options.steps)
        times.append(spent)
        for name, total in (case.phases or {}).items():
            phases[name].append(total / options.steps)
    record = {
        "case": case.name,
        "parameters": case.parameters,
        "value": float(result.mean()),  # the loss, or the mean of what came out
        "first_call_seconds": first,
        "step_seconds": float(np.median(times)),
        "images_per_second": case.images / float(np.median(times)),
        "batch": case.images,
        "flops": case.flops,
        **case.about,
    }
    if phases:
        record["phases"] = {name: float(np.median(own)) for name, own in phases.items()}
    return record


def records_of(library: str, options) -> Iterator[dict]:
    """What a child measures, as it comes; if it fails or is stopped, that is printed."""
    python = options.torch_python if library == "pytorch" else sys.executable
    command = [python, __file__, *sys.argv[1:], "--child", library]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout
    clock = threading.Timer(options.timeout, running.kill)
    clock.start()
    try:
        for line in running.stdout:
            if line.startswith('{"') and line.endswith("}\n"):
                yield json.loads(line)
    finally:
        clock.cancel()
        running.kill()
    if running.wait():
        print(f"{NAMES[library]}: failed or stopped after {options.timeout:.0f} s", flush=True)


def describe(record: dict) -> str:
    """Lines on one record."""
    name = NAMES[record["library"]] + ("" if record.get("compiled", True) else ", eager")
    images, seconds = record["images_per_second"], record["step_seconds"]
    line = f"{record['case']}, {name}: {images:,.1f} images/s, {1e3 * seconds:,.2f} ms"
    if record["flops"]:
        achieved, peak = record["flops"] * images, record.get("peak")
        line += f", {achieved / 1e12:.2f} TFLOP/s"
        line += f", {achieved / peak:.1%} of the peak" if peak else ""
    line += f"; batch {record['batch']}, {record['parameters']:,} parameters,"
    line += f" value {record['value']:.5g}, made in {record['build_seconds']:.1f} s,"
    line += f" first call {record['first_call_seconds']:.1f} s"
    if "phases" in record:
        parts = (f"{part} {1e3 * own:,.2f} ms" for part, own in record["phases"].items())
        line += "\n  " + ", ".join(parts)
    if record.get("rows_as_on_cpu") is False:
        line += "\n  TABLE ROWS DIFFER from those that the CPU computes"
    return line


def compare(kept: dict[str, dict[str, dict]]) -> str:
    """Lines on cases that belong together, from {case: {library: record}}."""
    lines = []
    for case, found in kept.items():
        if len(found) == 2:
            mine, theirs = (found[library]["images_per_second"] for library in NAMES)
            counts = {own["parameters"] for own in found.values()}
            same = "the same number" if len(counts) == 1 else "DIFFERENT NUMBERS"
            lines.append(f"{case}: ours / PyTorch {mine / theirs:.3f}; {same} of parameters")
    for case, found in kept.items():
        part, *rest = case.split(", ")
        pixels = kept.get(", ".join((part, "rgb", *rest[1:])))
        if part == "coefficients" and pixels:
            from bench_without_decoding import PAPER

            ratio = found["icm_jax"]["images_per_second"]
            ratio /= pixels["icm_jax"]["images_per_second"]
            paper = f"; {PAPER[rest[0]]:.2f} in the paper" if rest[0] in PAPER else ""
            lines.append(f"{case}: {ratio:.2f} × RGB{paper}")
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
    parser.add_argument("--coding-batches", type=int, nargs="+", default=[1, 16], metavar="IMAGES")
    parser.add_argument("--images", type=pathlib.Path, help="folder of pictures for coding")
    parser.add_argument("--warmup", type=int, default=3, help="steps after the first")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--budget", type=float, default=60, help="seconds for a case's rounds")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each library")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="what our training steps consist of")
    parser.add_argument("--tiny", action="store_true", help="small networks, batches of 4")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="file that gets a line a case")
    parser.add_argument("--child", choices=tuple(NAMES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        vars(options).update({f"{name}_batch": 4 for name in BATCHES}, coding_batches=[1, 4])
    if options.child:
        child(options.child, TINY if options.tiny else Sizes(), options)
        return
    kept: dict[str, dict[str, dict]] = {}
    for library in options.libraries:
        for record in records_of(library, options):
            if "profile" in record:
                print(describe_profile(record), flush=True)
            else:
                print(describe(record), flush=True)
            kept.setdefault(record["case"], {})[library] = record
            if options.json:
                with options.json.open("a") as file:
                    print(json.dumps(record), file=file)
    print(compare(kept))
    print("FLOPs: counted on our forward pass, for both libraries; the peak is bfloat16's")


if __name__ == "__main__":
    main()
