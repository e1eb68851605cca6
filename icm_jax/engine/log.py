"""What a run tells while it trains: metrics.jsonl, and TensorBoard's events where it can."""

import contextlib
import importlib.util
import json
import os
import pathlib
import time

import jax
import numpy as np

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
        if self._path.is_file() and jax.process_index() == 0:
            kept = [
                line
                for line in self._path.read_text().splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= first
            ]
            write_whole(self._path, "".join(kept).encode())

    def add(self, step: int, metrics: dict) -> None:
        """Keeps a step's metrics, still on the device."""
        self._pending.append((step, metrics))

    @contextlib.contextmanager
    def waiting(self, kind: str):
        """Counts the time within as waited for the "input" or for the "device"."""
        began = time.perf_counter()
        yield
        self._waited[kind] += time.perf_counter() - began

    def write(self) -> dict[str, float]:
        """Means since the last call.

        Raises: IcmError naming the first step that is not finite, or if the file cannot be written.
        """
        with self.waiting("device"):
            fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in fetched:
            for name in sorted(metrics, key=lambda name: (name != "loss", name)):
                if not np.isfinite(metrics[name]):
                    raise IcmError(
                        f"{name} is {metrics[name]} at step {step}; nothing was saved from then on."
                        " Lower the learning rate or set train.clip_norm, and run again to resume"
                    )
        step, names = fetched[-1][0], sorted(fetched[0][1])
        means = {n: float(np.mean([m[n] for _, m in fetched], dtype=np.float64)) for n in names}
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


def _tensorboard(folder: pathlib.Path):
    """clu's TensorBoard writer where TensorFlow is installed, else None."""
    if importlib.util.find_spec("tensorflow") is None or jax.process_index() > 0:
        return None
    from clu import metric_writers

    return metric_writers.SummaryWriter(os.fspath(folder))
