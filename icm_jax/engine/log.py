"""What a run tells while it trains: metrics.jsonl, and TensorBoard's events where it can."""

import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np
import tqdm

from icm_jax.errors import IcmError
from icm_jax.files import write_whole

WAITS = ("input", "device")
STARVING = 0.1  # of the time: more waiting for batches is said


class Log:
    """metrics.jsonl of a run: means over intervals, without lines of steps that were undone.

    From the second interval on a line has images_per_second, and as shares of the interval's time
    input_wait, in which the loop waited for the next batch, and device_wait, for results of steps.
    Where the former is above `STARVING` and the latter, more or faster cores would make it faster,
    and `starving` says so.
    """

    def __init__(self, folder: pathlib.Path, first: int, batch_size: int):
        self._path, self._batch_size = folder / "metrics.jsonl", batch_size
        self._pending: list[tuple[int, dict]] = []
        self._since: float | None = None
        self._waited: dict[str, float] = dict.fromkeys(WAITS, 0.0)  # seconds since the last line
        self.starving = ""
        self._writer = _tensorboard(folder)
        self.newest = self._go_on(first)

    def _go_on(self, first: int) -> dict[str, float]:
        """Leaves the lines up to the step at which the run goes on, and says what is lacking.

        Returns: the metrics of the last one.
        """
        there = read_log(self._path) if jax.process_index() == 0 else []
        kept = [line for line in there if line["step"] <= first]
        if there and not first:
            print(
                f"{self._path.parent} has no checkpoint, it begins again; it had got to step "
                f"{there[-1]['step']}",
                file=sys.stderr,
            )
        if first and jax.process_index() == 0 and [x["step"] for x in kept[-1:]] != [first]:
            print(f"{self._path} lacks lines before step {first}; they are lost", file=sys.stderr)
        if self._path.is_file() and jax.process_index() == 0:
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        timed = ("step", "images_per_second", *(f"{kind}_wait" for kind in WAITS))
        return {name: value for name, value in (kept or [{}])[-1].items() if name not in timed}

    def add(self, step: int, metrics: dict) -> None:
        """Keeps a step's metrics, still on the device."""
        self._pending.append((step, metrics))

    @contextlib.contextmanager
    def waiting(self, kind: str):
        """Counts the time within as waited for the "input" or for the "device"."""
        began = time.perf_counter()
        yield
        self._waited[kind] += time.perf_counter() - began

    @contextlib.contextmanager
    def apart(self, measured: dict):
        """Waits for a step's results; the time within is then no part of the interval."""
        with self.waiting("device"):
            jax.block_until_ready(measured)
        began = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - began

    def write(self, found: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
        """Means since the last call, and what was `found` at the last step besides.

        Raises: IcmError naming the first step that is not finite, or if the file cannot be written.
        """
        with self.waiting("device"):
            fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in [*fetched, (fetched[-1][0], found)]:
            for name in sorted(metrics, key=lambda name: (name != "loss", name)):
                if not np.isfinite(metrics[name]):
                    raise IcmError(
                        f"{name} is {metrics[name]} at step {step}; nothing was saved from then on."
                        " Lower the learning rate or set train.clip_norm, with another --workdir"
                    )
        step, names = fetched[-1][0], sorted(fetched[0][1])
        means = {n: float(np.mean([m[n] for _, m in fetched], dtype=np.float64)) for n in names}
        means |= found
        line = {"step": step, **means}
        now = time.perf_counter()
        if self._since is not None:  # the first interval would count compilation
            spent = now - self._since
            line["images_per_second"] = self._batch_size * len(fetched) / spent
            waits = {kind: seconds / spent for kind, seconds in self._waited.items()}
            line |= {f"{kind}_wait": share for kind, share in waits.items()}
            starving = waits["input"] > max(STARVING, waits["device"])
            self.starving = " input-bound" if starving else ""
        self._since, self._pending = now, []
        self._waited = dict.fromkeys(WAITS, 0.0)
        if jax.process_index() == 0:
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # half a line is left out when the run goes on
                raise IcmError(
                    f"cannot write {self._path}: {error.strerror or error}. Checkpoints are kept: "
                    "once there is room, or the storage is back, the same command resumes"
                ) from error
        if self._writer:
            self._writer.write_scalars(step, means)
        return means


def progress(name: str, first: int, steps: int) -> tqdm.tqdm:
    """A bar of a run's steps, on the first process."""
    return tqdm.tqdm(
        total=steps,
        initial=first,
        desc=name,
        unit="step",
        disable=jax.process_index() > 0,
        mininterval=1.0,
    )


def short(metrics: dict) -> str:
    """What the bar says of them."""
    return " ".join(
        f"{name}={value:.3g}" for name, value in metrics.items() if name != "gradient_norm"
    )


def read_log(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl; none if it is not there.

    A last one that a killed run left unfinished is left out; so are damaged ones, and how many is
    said on standard error.
    """
    if not path.is_file():
        return []
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise IcmError(f"cannot read {path}: {error.strerror or error}") from error
    found = [line for line in map(_line, lines) if line]
    if len(found) < len(lines):
        print(
            f"{path}: {len(lines) - len(found)} of {len(lines)} lines are damaged and left out",
            file=sys.stderr,
        )
    return found


def _line(text: bytes) -> dict:
    """A line of metrics; {} if it is none."""
    try:
        line = json.loads(text)
        fits = isinstance(line["step"], int) and "loss" in line
        return line if fits and all(type(value) in (int, float) for value in line.values()) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _tensorboard(folder: pathlib.Path):
    """clu's TensorBoard writer where TensorFlow is installed, else None."""
    if importlib.util.find_spec("tensorflow") is None or jax.process_index() > 0:
        return None
    from clu import metric_writers

    return metric_writers.SummaryWriter(os.fspath(folder))
