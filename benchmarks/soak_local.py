"""Kills processes of a training run at random moments and looks at what comes of it.

    python benchmarks/soak_local.py --kills 10 --processes 4 --devices-per-process 2

Stage 1 of Omni-ICM at its smallest, for both arms, is trained with launch/local.py: once in peace,
once in one process, and once with a process killed (SIGKILL) again and again, after which the same
command is given anew. Prints how each run ended and after how many seconds, and the largest
relative differences of the losses and final metrics from those of the undisturbed run.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    """Runs, kills, compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices-per-process", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--folder", help="where runs are kept (default: a temporary folder)")
    options = parser.parse_args()
    folder = pathlib.Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    devices = options.processes * options.devices_per_process
    print(f"results in {folder}")
    began = time.monotonic()
    print(f"in peace: {finish(start(options, folder, 'peace'))}, {seconds(began)}")
    alone = argparse.Namespace(**vars(options) | {"processes": 1, "devices_per_process": devices})
    began = time.monotonic()
    print(f"one process: {finish(start(alone, folder, 'alone'))}, {seconds(began)}")
    rng, kills = random.Random(options.seed), 0
    while True:
        process = start(options, folder, "killed")
        if kills < options.kills:
            fell = disturb(process, folder / "killed", rng)
            if fell:
                kills += 1
                began = time.monotonic()
                print(f"kill {kills}: {fell}; all ended {finish(process)}, {seconds(began)} later")
                continue
        print(f"the rest: {finish(process)} after {kills} kills")
        break
    for name in ("killed", "alone"):
        loss, final = (compare(folder / "peace", folder / name, kind) for kind in ("log", "done"))
        print(f"{name} and in peace differ by {loss:.2g} in the losses, {final:.2g} in the end")


def start(options, folder: pathlib.Path, name: str) -> subprocess.Popen:
    """The launcher, with a work directory of that name."""
    command = [sys.executable, str(ROOT / "launch" / "local.py")]
    command += [f"--processes={options.processes}", f"--logs={folder / name}-logs"]
    command += [f"--devices-per-process={options.devices_per_process}", "--"]
    command += [f"--config={ROOT / 'configs' / 'omni_icm.py'}:tiny", f"--workdir={folder / name}"]
    command += [f"--config.data.path={folder / 'data'}", f"--config.stage1.steps={options.steps}"]
    command += ["--config.stage0.steps=0", "--config.pretrain.steps=0"]
    command += ["--config.stage1.learning_rate=1e-4"]  # rounding must not be amplified
    command += ["--config.stage2.lambdas=()", "--config.rgb.steps=4", "--config.train.log_every=1"]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def finish(process: subprocess.Popen) -> str:
    """Waits for the launcher: "with code N"."""
    return f"with code {process.wait()}"


def disturb(process: subprocess.Popen, workdir: pathlib.Path, rng) -> str:
    """Kills a process at a random moment; what it did, or "" if all was over before."""
    before, deadline = lines(workdir), time.monotonic() + rng.uniform(0, 20)
    while process.poll() is None:
        if lines(workdir) > before and time.monotonic() > deadline:
            break  # it has gone on by a step at least, so that there is an end to all this
        time.sleep(rng.uniform(0, 0.1))
    if process.poll() is not None:
        return ""
    told = workdir.with_suffix(".log").read_text().splitlines()
    (own,) = [line for line in told if " processes: " in line]
    pids = [int(pid) for pid in own.partition(": ")[2].split()]
    victim = rng.randrange(len(pids))
    os.kill(pids[victim], signal.SIGKILL)
    return f"process {victim} at {lines(workdir)} logged steps"


def logged(workdir: pathlib.Path) -> list[dict]:
    """All lines of all metrics.jsonl that are whole."""
    paths = sorted(workdir.glob("seed*/*/stage1/metrics.jsonl"))
    found = [line for path in paths for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in found if line.endswith("\n")]


def lines(workdir: pathlib.Path) -> int:
    """How many steps have been logged."""
    return len(logged(workdir))


def compare(one: pathlib.Path, other: pathlib.Path, kind: str) -> float:
    """The largest relative difference of losses ("log") or of final metrics ("done")."""
    if kind == "log":
        pairs = zip(logged(one), logged(other), strict=True)
    else:
        names = sorted(path.relative_to(one) for path in one.glob("seed*/**/done.json"))
        pairs = (
            [json.loads((folder / name).read_text())["metrics"] for folder in (one, other)]
            for name in names
        )
    return max(
        abs(b[key] - a[key]) / max(abs(a[key]), 1e-9)
        for a, b in pairs
        for key in a
        if key not in ("images_per_second", "input_wait", "device_wait")
    )


def seconds(began: float) -> str:
    """Seconds since then."""
    return f"{time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    main()
