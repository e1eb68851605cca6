"""The loop on the real data path: resume, kill, devices, processes, bad states."""

import gc
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from PIL import Image
from small import UNOPTIMISED

from icm_jax.codecs import bitstream, feature_codec
from icm_jax.data.sources import Source
from icm_jax.engine import checkpoint, log, optim, sharding, train
from icm_jax.engine.run import Run, Start, claim
from icm_jax.errors import IcmError
from icm_jax.tasks.task import Aux, Task

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


def test_sigterm_saves_and_the_rest_is_the_same(folder, undisturbed):
    base = folder / "stopped"
    process = worker(base, wait=False)
    log = base / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not log.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "state is saved" in output and process.returncode != 0
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
    process = worker(base, devices=8, fsdp=4, wait=False)
    log = base / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not log.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
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
    """Each has four devices; the first one tells the other that the only checkpoint is none."""
    base = shutil.copytree(stopped_on_eight, stopped_on_eight.with_name("processes"))
    kept = [int(path.name) for path in (base / "run" / "checkpoints").iterdir()]
    for file in (base / "run" / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\0" * (file.stat().st_size // 2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [worker(base, devices=4, wait=False, extra=(address, 2, p)) for p in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-3000:]
    assert kept and all((base / "run" / f"damaged-{step}").is_dir() for step in kept)
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


def toy(scale=1.0):
    """Least squares on the mean colour; `frozen` must not move."""

    def init(key, batch):
        del key, batch
        return {"params": {"w": {"v": jnp.zeros((3,))}, "frozen": {"v": jnp.ones((2,))}}}

    def loss(variables, batch, key, step):
        del key
        x = batch["image"].astype(jnp.float32).mean(axis=(1, 2)) / 255.0
        error = x @ variables["params"]["w"]["v"] - 1.0 + variables["params"]["frozen"]["v"].sum()
        bad = jnp.where(step == 5, jnp.float32(scale), 1.0)
        return jnp.square(error).mean() * bad, Aux({}, {})

    return Task(init, loss, None, lambda name: "train" if name == "w" else "frozen")


def toy_run(**changes):
    run = dict(
        name="run",
        seed=0,
        data=dict(canvas=4),
        batch_size=2,
        steps=8,
        log_every=2,
        save_every=2,
        ema=0.9,
        optim=dict(
            name="sgd",
            learning_rate=0.1,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=0.0,
        ),
    )
    run |= {"task": {}} | changes
    configs = {name: ml_collections.ConfigDict(run[name]) for name in ("task", "data", "optim")}
    return Run(**(run | configs))


def toy_batches(first, stop):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (stop, 2, 4, 4, 3)).astype(np.uint8)
    for step in range(first, stop):
        yield {"image": images[step]}


def toy_fit(folder, run, task, source=toy_batches):
    folder.mkdir(parents=True, exist_ok=True)
    training = train.prepare(run, task)
    with checkpoint.manager(folder) as checkpoints:
        state, first = train.make_state(training, checkpoints)
        train.loop(training, state, first, source(first, run.steps), checkpoints, folder)
        return train.make_state(training, checkpoints)


def test_steps_equal_gradient_descent_by_hand(tmp_path):
    state, step = toy_fit(tmp_path, toy_run(), toy())
    w, ema = np.zeros(3), np.zeros(3)
    trace = np.zeros(3)
    for batch in toy_batches(0, 8):
        x = batch["image"].mean(axis=(1, 2)) / 255.0
        gradient = 2 * ((x @ w + 1.0)[:, None] * x).mean(axis=0)
        trace = gradient + 0.9 * trace
        w = w - 0.1 * trace
        ema = 0.9 * ema + 0.1 * w
    assert step == 8
    np.testing.assert_allclose(state.variables["params"]["w"]["v"], w, rtol=1e-4)
    np.testing.assert_allclose(state.ema["w"]["v"], ema, rtol=1e-4)
    np.testing.assert_array_equal(state.variables["params"]["frozen"]["v"], [1, 1])


@pytest.mark.parametrize("fsdp", [1, 2])
def test_the_step_is_compiled_once(tmp_path, monkeypatch, fsdp):
    steps, original = [], train.compiled_step
    monkeypatch.setattr(
        train, "compiled_step", lambda *given: steps.append(original(*given)) or steps[-1]
    )
    for until in (4, 8):  # also where the state comes from a checkpoint
        toy_fit(tmp_path, toy_run(steps=until, fsdp=fsdp), toy())
    assert [step._cache_size() for step in steps] == [1, 1]


@pytest.mark.parametrize("slow", ["input", "device"])
def test_the_log_says_who_is_waited_for(tmp_path, capfd, slow):
    def batches(first, stop):
        for batch in toy_batches(first, stop):
            time.sleep(0.05 if slow == "input" else 0.0)
            yield batch

    def loss(variables, batch, key, step):
        total, aux = toy().loss(variables, batch, key, step)
        rounds = 400 if slow == "device" else 0
        turned = jax.lax.fori_loop(0, rounds, lambda i, x: jnp.tanh(x @ x), jnp.eye(128))
        return total + 0 * jax.lax.stop_gradient(turned).sum(), aux

    toy_fit(tmp_path, toy_run(), toy()._replace(loss=loss), batches)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line) for line in lines[1:]]
    found = {kind: np.mean([own[f"{kind}_wait"] for own in waits]) for kind in log.WAITS}
    assert found[slow] == max(found.values()) and sum(found.values()) <= 1
    assert ("input-bound" in capfd.readouterr().err) == (slow == "input")


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path):
    with pytest.raises(IcmError, match="loss is nan at step 6"):
        toy_fit(tmp_path, toy_run(), toy(np.nan))
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
# What orbax's writer leaves behind when it fails complains once it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(tmp_path):
    """The system refuses files above 100 kB, as a full disk would, to orbax's writing thread."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def init(key, batch):
        return toy().init(key, batch) | {"large": {"v": jax.random.normal(key, (100_000,))}}

    task = toy()._replace(init=init)
    toy_fit(tmp_path, toy_run(steps=4), task)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(IcmError, match=r"cannot write a checkpoint to .* same command resumes"):
            toy_fit(tmp_path, toy_run(), task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        gc.collect()
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert toy_fit(tmp_path, toy_run(), task)[1] == 8


def test_a_log_on_a_full_disk_is_one_clear_error(tmp_path):
    run, log = toy_run(log_every=1, save_every=8), tmp_path / "metrics.jsonl"
    log.symlink_to("/dev/full")
    with pytest.raises(IcmError, match=r"metrics\.jsonl: No space left .*same command resumes"):
        toy_fit(tmp_path, run, toy())
    log.unlink()
    assert toy_fit(tmp_path, run, toy())[1] == 8
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("place", ["save", "wait_until_finished", "close"])
def test_errors_of_the_writer_name_the_folder(tmp_path, monkeypatch, place):
    def lost(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: storage is gone\nmore")

    with (
        pytest.raises(IcmError, match=f"{tmp_path}.*storage is gone. Earlier ones are kept"),
        checkpoint.manager(tmp_path) as checkpoints,
    ):
        monkeypatch.setattr(checkpoints, place, lost)
        checkpoint.save(checkpoints, 1, {"x": jnp.zeros(2)})
        checkpoint.wait(checkpoints)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    run = toy_run()
    toy_fit(tmp_path, run, toy())
    for file in (tmp_path / "checkpoints" / "8").rglob("*"):
        if file.is_file() and file.stat().st_size > 0:
            file.write_bytes(b"\0" * (file.stat().st_size // 2))
    with (
        checkpoint.manager(tmp_path) as checkpoints,
        pytest.warns(UserWarning, match="passed over"),
    ):
        _, step = train.make_state(train.prepare(run, toy()), checkpoints)
    assert step == 6
    assert (tmp_path / "damaged-8").is_dir() and not (tmp_path / "checkpoints" / "8").exists()
    assert toy_fit(tmp_path, run, toy())[1] == 8  # and is written anew


def test_parts_are_copied_or_refused():
    own = {"params": {"a": {"v": np.zeros(2)}, "b": {"v": np.zeros(2)}}}
    earlier = {"params": {"a": {"v": np.ones(2)}, "c": {"v": np.ones(2)}}}
    copied = train.copy_parts(own, earlier, ["params/a", "batch_stats/a"])
    assert copied["params"]["a"]["v"].tolist() == [1, 1] and own["params"]["a"]["v"][0] == 0
    with pytest.raises(IcmError, match="only one side has 'params/c'"):
        train.copy_parts(own, earlier, ["params/c"])
    earlier["params"]["b"] = {"v": np.ones(3)}
    with pytest.raises(IcmError, match="another shape"):
        train.copy_parts(own, earlier, ["params/b"])


def test_a_folder_of_another_run_is_refused(tmp_path):
    claim(tmp_path, toy_run())
    claim(tmp_path, toy_run(log_every=1))
    with pytest.raises(IcmError, match=r"optim\.learning_rate was 0\.1, is 0\.2"):
        claim(tmp_path, toy_run(optim=dict(toy_run().optim, learning_rate=0.2)))


def test_features_decoded_beforehand_are_those_of_the_bitstreams(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)

    def load(number):
        file = io.BytesIO()
        Image.fromarray(pictures[number]).save(file, "PNG")
        label = None if number == 1 else 0
        return {"image": file.getvalue(), "label": label, "name": str(number)}

    source = Source("five", 5, ("one",), load)
    built = feature_codec("18", 8, 8, (8, 8, 8), 8, (8, 8), 8)
    variables = jax.jit(built.init)(jax.random.key(0), pictures)
    run = toy_run(task=dict(size=32), data=dict(canvas=32), start=(Start("codec", (), codec=True),))
    frozen = bitstream.freeze(built, variables, pictures)
    given = train.decoded_split(frozen, source, run)
    wanted = bitstream.decode(frozen, bitstream.encode(frozen, pictures), "feature")
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)
    assert given.std(axis=0).max() > 0.01
    assert train.decoded_split(frozen, source, run) is given  # the next task's


def test_schedules_are_their_formulas():
    config = ml_collections.ConfigDict(dict(schedule="cosine", learning_rate=2.0, warmup_steps=4))
    schedule = optim.make_schedule(config, 12)
    expected = [2 * t / 4 if t < 4 else 1 + np.cos(np.pi * (t - 4) / 8) for t in range(12)]
    np.testing.assert_allclose([schedule(t) for t in range(12)], expected, atol=1e-6)
    none = optim.make_schedule(ml_collections.ConfigDict(dict(config, warmup_steps=0)), 0)
    assert none(0) == 2.0  # a run of no steps needs no rate, but may have one
    for bad in (dict(schedule="step"), dict(warmup_steps=12)):
        with pytest.raises(IcmError):
            optim.make_schedule(ml_collections.ConfigDict(dict(config, **bad)), 12)


def test_a_rate_by_plateau_is_halved_where_the_loss_stalls():
    config = dict(toy_run().optim, name="sgd", learning_rate=1.0, weight_decay=0.0, clip_norm=0.0)
    config |= dict(schedule="plateau", warmup_steps=0, plateau=dict(interval=2, patience=3))
    optimiser = optim.make_optimiser(ml_collections.ConfigDict(config), 100, 2)
    params = {"w": jnp.zeros((2, 2))}
    state, sizes = optimiser.init(params), []
    ones = {"w": jnp.ones((2, 2))}
    momentum = 0.0
    for step in range(30):
        loss = jnp.float32(10 - step if step < 8 else 2.0)
        updates, state = optimiser.update(ones, state, params, value=loss)
        momentum = 0.9 * momentum + 1
        sizes.append(float(-updates["w"][0, 0]) / momentum)
    # Means of pairs fall up to steps 8 and 9; three that do not fall end with steps 15, 21 and 27.
    expected = [0.5 ** max(0, (step - 9) // 6) for step in range(30)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-5)


def test_rates_follow_the_batch_by_their_rule():
    given = {rule: optim.scaled(0.03, 1024, 256, rule) for rule in ("none", "linear", "sqrt")}
    assert given == pytest.approx({"none": 0.03, "linear": 0.12, "sqrt": 0.06})
    for rule, base in (("cubic", 256), ("linear", 0)):
        with pytest.raises(IcmError, match=r"rate_scaling 'cubic'|rate_batch is 0"):
            optim.scaled(0.03, 1024, base, rule)
    # Accumulated steps count: SGD's first update is the rate times the gradient.
    own = dict(toy_run().optim, rate_scaling="linear", rate_batch=4, accumulate=2)
    optimiser = optim.make_optimiser(ml_collections.ConfigDict(own), 8, 16)
    params = {"w": jnp.zeros(2)}
    state = optimiser.init(params)
    for _ in range(2):
        updates, state = optimiser.update({"w": jnp.ones(2)}, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * 16 * 2 / 4, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accumulated_steps_are_one_of_a_larger_batch(name):
    own = dict(toy_run().optim, name=name, schedule="cosine", clip_norm=0.3)
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 4, 4, 3)).astype(np.uint8)

    def averages(rows, **changes):
        run = toy_run(steps=24 // rows, batch_size=rows, optim=own | changes)
        training = train.prepare(run, toy())
        init, _ = train.initial(training)
        step = jax.jit(train.make_step(training.task, training.optimiser, run))
        state = init(jax.random.key(0), {})
        for batch in images.reshape(-1, rows, 4, 4, 3):
            state, _ = step(state, {"image": batch}, jax.random.key(0))
            yield state.variables["params"]["w"]["v"], state.ema["w"]["v"]

    whole = list(averages(6, warmup_steps=1))
    small = list(averages(2, warmup_steps=3, accumulate=3))
    np.testing.assert_allclose(small[2::3], whole, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(small[3::3], small[2:-1:3])  # in between nothing moves
    assert np.abs(whole[-1]).min() > 1e-3
    with pytest.raises(IcmError, match="accumulate is 0"):
        optim.make_optimiser(ml_collections.ConfigDict(own | dict(accumulate=0)), 4, 2)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars", "lamb"])
def test_optimisers_descend_and_do_not_decay_vectors(name):
    config = dict(toy_run().optim, name=name, weight_decay=0.1, learning_rate=0.05)
    optimiser = optim.make_optimiser(ml_collections.ConfigDict(config), 100, 2)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones((2,))}
    updates, _ = optimiser.update(
        jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params
    )
    decayed = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(decayed["vector"], 1)
    if name != "adam":
        assert (decayed["matrix"] < 1).all()
    with pytest.raises(IcmError, match="unknown optimiser"):
        optim.make_optimiser(ml_collections.ConfigDict(dict(config, name="sdg")), 100, 2)


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
    with pytest.raises(IcmError, match="batch size 3"):
        sharding.check_batch(mesh, 3)
