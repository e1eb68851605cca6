"""Damages the work directory of an experiment at random, and gives its command again.

    python benchmarks/faults.py --runs 200

The experiment is one codec of configs/hyperprior.py:tiny. It is trained once in peace. Then each
run takes the work directory as it was after 4 of 6 steps or after the report, does one thing to it
(flips a bit, overwrites 200 bytes, cuts, empties or removes a file, or fills it with noise; half of
the files are those of checkpoints, most others the run's), or kills a process (SIGKILL) while it
saves a checkpoint.
The same experiment, on what that leaves, must end in the codec, weights and scores of the
undisturbed one, or say in one line why it cannot go on. Of metrics.jsonl, lines that are none are
left out with a line; a digit that became another one is not noticed ("other log"). Prints each run
and a table; exits with 1 if a run ended in anything else.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

import icm_jax
from icm_jax.engine import checkpoint
from icm_jax.engine.log import read_log
from icm_jax.engine.run import CODEC, read_records, what_is_done
from icm_jax.errors import IcmError
from icm_jax.main import keeps_programs, load_experiment, run_experiment

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN = pathlib.PurePath("seed0", "factorised")
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
STOPPED = 4  # of 6 steps, one checkpoint a step
TIMED = ("images_per_second", "input_wait", "device_wait", "encode_ms", "decode_ms")
OUTCOMES = ("same", "same, one line", "refused, one line", "same, other log", "WRONG")


@dataclasses.dataclass
class Outcome:
    """How a run ended: one of `OUTCOMES`, and what it said."""

    kind: str
    said: str


def main() -> int:
    """Trains in peace, damages, trains again, counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0, help="of all faults")
    parser.add_argument("--folder", help="where work directories are kept (default: temporary)")
    parser.add_argument("--once", help=argparse.SUPPRESS)  # the process that is killed
    options = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", UNOPTIMISED)
    quiet()
    if options.once:
        train(pathlib.Path(options.once))
        return 0
    folder = pathlib.Path(options.folder or tempfile.mkdtemp())
    keep_programs(folder / "compiled")
    expected, counted = prepare(folder), collections.Counter()
    for number in range(options.first, options.first + options.runs):
        name, place, outcome = disturbed(folder, expected, options.seed, number)
        counted[name, outcome.kind] += 1
        print(f"{number}: {name}, {place}: {outcome.kind}; {outcome.said}", flush=True)
    print(table(counted))
    return int(any(kind == "WRONG" for _, kind in counted))


def quiet() -> None:
    """As the command is."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity(logging.ERROR)


def keep_programs(folder: pathlib.Path | None) -> None:
    """Compiles what every run needs once."""
    if keeps_programs():
        jax.config.update("jax_compilation_cache_dir", folder and str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1 if folder else 1.0)
        compilation_cache.reset_cache()


def train(workdir: pathlib.Path, **options) -> None:
    """The experiment, from the beginning or from what is there, with evaluation and report."""
    experiment = load_experiment(ROOT / "configs" / "hyperprior.py")
    config = experiment.get_config("tiny")
    config.model.kinds, config.qualities, config.files = ("factorised",), (50,), {"jpeg": (10,)}
    config.train.save_every = config.train.log_every = 1
    with contextlib.redirect_stdout(None):
        run_experiment(config, experiment.runs(config), workdir, **options)


def prepare(folder: pathlib.Path) -> dict:
    """Makes `folder`/peace and `folder`/stopped. Returns: what the former ended in."""
    train(folder / "peace")
    original = checkpoint.save

    def save(checkpoints, step, state):
        original(checkpoints, step, state)
        if step == STOPPED - 1:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(checkpoint, "save", save), contextlib.suppress(SystemExit):
        train(folder / "stopped")
    return result(folder / "peace")


def result(workdir: pathlib.Path) -> dict:
    """What does not depend on the clock of what a finished experiment left."""
    folder = workdir / RUN
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.load_variables(folder))
    weights = hashlib.sha256()
    for path, leaf in leaves:
        weights.update(f"{path}".encode() + np.asarray(leaf).tobytes())
    log = read_log(folder / "metrics.jsonl")
    records = read_records(folder)
    kept = [{k: v for k, v in line.items() if k not in TIMED} for line in [*log, *records]]
    return {
        "codec": icm_jax.load(folder / CODEC).fingerprint.hex(),
        "weights": weights.hexdigest(),
        "done": what_is_done(folder),
        "metrics": kept[: len(log)],
        "scores": kept[len(log) :],
    }


def disturbed(folder: pathlib.Path, expected: dict, seed: int, number: int):
    """(name of a fault, where it was, how the run ended that was damaged by it)."""
    rng = random.Random(f"{seed} {number}")
    workdir = folder / "disturbed"
    shutil.rmtree(workdir, ignore_errors=True)
    name = rng.choice([*FAULTS, "kill while saving"])
    if name == "kill while saving":
        place = kill(folder, workdir, rng)
    else:
        state = rng.choice(["stopped", "peace"])
        shutil.copytree(folder / state, workdir)
        path = pick(workdir, rng)
        FAULTS[name](path, rng)
        place = f"{path.relative_to(workdir).as_posix()} of the run {state}"
    return name, place, again(workdir, expected)


def kill(folder: pathlib.Path, workdir: pathlib.Path, rng: random.Random) -> str:
    """Trains in another process, which is killed while it saves."""
    command = [sys.executable, __file__, "--once", str(workdir)]
    environment = dict(os.environ)
    if keeps_programs():
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    which, delay = rng.randrange(1, 7), rng.uniform(0, 0.1)
    while process.poll() is None:
        if list((workdir / RUN / "checkpoints").glob(f"{which}.*tmp*")):
            break
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()
    there = sorted(path.name for path in (workdir / RUN / "checkpoints").iterdir())
    return f"step {which}, {delay:.3f} s after its beginning, leaving {', '.join(there)}"


def pick(workdir: pathlib.Path, rng: random.Random) -> pathlib.Path:
    """A file that is not empty: of a checkpoint, of the run beside them, or of the report."""
    kinds: dict[str, list[pathlib.Path]] = {"checkpoints": [], "run": [], "report": []}
    for path in sorted(workdir.rglob("*")):
        if path.is_file() and path.stat().st_size:
            beside = "run" if path.is_relative_to(workdir / RUN) else "report"
            kinds["checkpoints" if "checkpoints" in path.parts else beside].append(path)
    there = {kind: files for kind, files in kinds.items() if files}
    shares = {"checkpoints": 0.5, "run": 0.4, "report": 0.1}
    (kind,) = rng.choices(list(there), [shares[kind] for kind in there])
    return rng.choice(there[kind])


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwrite(path: pathlib.Path, rng: random.Random) -> None:
    """Noise in place of 200 bytes, or of all if there are fewer."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(content) - 200))
    length = len(content[start : start + 200])
    content[start : start + length] = rng.randbytes(length)
    path.write_bytes(content)


FAULTS = {
    "a bit": flip,
    "200 bytes": overwrite,
    "cut": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "empty": lambda path, rng: os.truncate(path, 0),
    "missing": lambda path, rng: path.unlink(),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
}


def again(workdir: pathlib.Path, expected: dict) -> Outcome:
    """Trains on what is there, and reads what comes of it, as a later run would."""
    refused, found = "", {}
    try:
        with errors() as said:
            train(workdir)
            found = result(workdir)
    except IcmError as error:
        refused = str(error)
    except BaseException as error:  # what it must not end in
        return Outcome("WRONG", f"{type(error).__name__}: {error}")
    lines = list(dict.fromkeys([*said, *refused.splitlines()]))  # a log is read here once more
    text = " | ".join(lines).replace(f"{workdir}/", "")
    if len(lines) > 1:
        return Outcome("WRONG", f"{len(lines)} lines: {text[:500]}")
    if refused:
        return Outcome("refused, one line", text)
    differing = {name for name in expected if found[name] != expected[name]}
    if differing == {"metrics"} and text:  # lines of the log are lost, and it is said
        return Outcome("same, one line", text)
    if differing:
        kind = "same, other log" if differing == {"metrics"} else "WRONG"
        return Outcome(kind, f"other {', '.join(differing)}; {text}")
    return Outcome("same, one line" if text else "same", text)


@contextlib.contextmanager
def errors() -> Iterator[list[str]]:
    """Within, standard error, also that of libraries, goes to the list."""
    said: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with open(2, "w", closefd=False) as printed, contextlib.redirect_stderr(printed):
                yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
            said += [line for line in lines if line.strip() and "%|" not in line]  # no bars


def table(counted: collections.Counter) -> str:
    """Faults down, outcomes across, in Markdown."""
    rows = [["fault", *OUTCOMES], ["---"] * (1 + len(OUTCOMES))]
    for name in [*FAULTS, "kill while saving"]:
        rows.append([name, *(str(counted[name, kind]) for kind in OUTCOMES)])
    sums = [sum(n for (_, k), n in counted.items() if k == kind) for kind in OUTCOMES]
    rows.append(["all", *map(str, sums)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
