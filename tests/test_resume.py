"""Runs on the real data path: killed, resumed, on other devices, in several processes."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import UNOPTIMISED

from icm_jax.engine import checkpoint, sharding
from icm_jax.errors import IcmError

# optax's and orbax's own code neither keeps to strict promotion nor is free of deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = pathlib.Path(__file__).parent / "train_worker.py"


def worker(base, *, devices=1, fsdp=1, wait=True, extra=(), **overrides):
    """Runs a small stage 1 in a process of its own; returns the finished or running process."""
    flags = f"--xla_force_host_platform_device_count={devices} {UNOPTIMISED}"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    if jax.__version_info__ >= (0, 6):  # see main.keeps_programs
        environment["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(base).parent / "compiled")
    environment["XLA_FLAGS"] = flags
    given = json.dumps(dict(overrides, fsdp=fsdp))
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(base), given, *map(str, extra)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return process


def losses(base):
    lines = (pathlib.Path(base) / "run" / "metrics.jsonl").read_text().splitlines()
    timed = ("images_per_second", "input_wait", "device_wait")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def undisturbed(folder):
    worker(folder / "whole")
    return folder / "whole"


def test_a_killed_run_ends_in_the_same_bits(folder, undisturbed):
    base, kills = folder / "killed", 0
    for delay in (0.05, 0.6):
        process = worker(base, wait=False)
        log = base / "run" / "metrics.jsonl"
        before = log.read_text() if log.is_file() else ""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if log.is_file() and log.read_text() != before:
                break
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills > 0
    worker(base)
    assert losses(base) == losses(undisturbed)
    one, other = (checkpoint.load_variables(b / "run") for b in (base, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def terminated(process, base, number=signal.SIGTERM) -> str:
    """What a run printed that got a signal once it had logged a step."""
    log = base / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not log.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_the_same(folder, undisturbed, number):
    base = folder / f"stopped by {number}"
    process = worker(base, wait=False)
    output = terminated(process, base, number)
    assert "state is saved" in output and process.returncode == 128 + number
    assert "Traceback" not in output
    worker(base)
    one, other = (checkpoint.load_variables(b / "run") for b in (base, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_two_devices_give_the_same_losses(folder, undisturbed):
    base = folder / "devices"
    worker(base, devices=2)
    same_losses(base, undisturbed)


@pytest.fixture(scope="module")
def stopped_on_eight(folder):
    """A run of eight devices, its parameters sharded, that SIGTERM stopped on its way."""
    base = folder / "eight"
    process = worker(base, devices=8, fsdp=4, wait=False, save_every=1)
    output = terminated(process, base)
    assert "state is saved" in output, output[-3000:]
    return base


@pytest.mark.parametrize("devices", [1, 4])
def test_a_checkpoint_of_eight_devices_goes_on_on_fewer(stopped_on_eight, undisturbed, devices):
    base = shutil.copytree(stopped_on_eight, stopped_on_eight.with_name(f"eight_on_{devices}"))
    assert len(losses(base)) < len(losses(undisturbed))
    worker(base, devices=devices)
    same_losses(base, undisturbed)


def test_two_processes_pass_over_what_is_damaged_and_give_the_same_losses(
    stopped_on_eight, undisturbed
):
    """Each has four devices, and checks half of the files."""
    base = shutil.copytree(stopped_on_eight, stopped_on_eight.with_name("processes"))
    older, newer = sorted(int(path.name) for path in (base / "run" / "checkpoints").iterdir())
    largest = max(
        (base / "run" / "checkpoints" / str(newer)).rglob("*"), key=lambda path: path.stat().st_size
    )
    altered = bytearray(largest.read_bytes())
    altered[len(altered) // 2] ^= 1
    largest.write_bytes(altered)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [worker(base, devices=4, wait=False, extra=(address, 2, p)) for p in range(2)]
    outputs = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)[-3000:]
    said = [output.count(f"it goes on from step {older}") for output in outputs]
    assert said == [1, 0] and (base / "run" / f"damaged-{newer}").is_dir()
    same_losses(base, undisturbed)


def same_losses(base, undisturbed):
    for given, expected in zip(losses(base), losses(undisturbed), strict=True):
        for name in expected:
            np.testing.assert_allclose(
                given[name], expected[name], rtol=2e-3, atol=2e-4, err_msg=name
            )


def test_a_finished_run_is_not_run_again(undisturbed):
    before = (undisturbed / "run" / "metrics.jsonl").stat().st_mtime_ns
    worker(undisturbed)
    assert (undisturbed / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_parameters_are_sharded_over_their_largest_fitting_side():
    mesh = sharding.make_mesh(2)
    shapes = {
        "big": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32),
        "odd": jax.ShapeDtypeStruct((65, 129), jnp.float32),
        "small": jax.ShapeDtypeStruct((4, 4), jnp.float32),
        "queue": jax.ShapeDtypeStruct((3, 4, 5), jnp.float32),
    }
    specs = {k: tuple(v.spec) for k, v in sharding.state_shardings(mesh, shapes).items()}
    assert specs.pop("queue") == (None, ("data", "fsdp"), None)  # as the rows of batches
    assert specs == {"big": (None, None, "fsdp"), "odd": (None, None), "small": (None, None)}
    with pytest.raises(IcmError, match="does not divide"):
        sharding.make_mesh(3)
    with pytest.raises(IcmError, match="batch_size is 3"):
        sharding.check_batch(mesh, 3)
