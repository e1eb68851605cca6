"""The loop by itself: its steps, its log, its checkpoints, and what stops it."""

import gc
import io
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from toy import toy, toy_run

from icm_jax.codecs import bitstream, feature_codec
from icm_jax.data.sources import Source
from icm_jax.engine import checkpoint, log, train
from icm_jax.engine.run import Start, claim
from icm_jax.errors import IcmError

# optax's and orbax's own code neither keeps to strict promotion nor is free of deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


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
    """On the way a checkpoint has the parameters; at its end a run gives the averaged ones."""
    state, step = toy_fit(tmp_path, toy_run(), toy())
    w, ema, by_step = np.zeros(3), np.zeros(3), []
    trace = np.zeros(3)
    for batch in toy_batches(0, 8):
        x = batch["image"].mean(axis=(1, 2)) / 255.0
        gradient = 2 * ((x @ w + 1.0)[:, None] * x).mean(axis=0)
        trace = gradient + 0.9 * trace
        w = w - 0.1 * trace
        ema = 0.9 * ema + 0.1 * w
        by_step.append(w)
    assert step == 8
    before = checkpoint.read_variables(tmp_path, 6)
    np.testing.assert_allclose(before["params"]["w"]["v"], by_step[5], rtol=1e-4)
    np.testing.assert_allclose(state.variables["params"]["w"]["v"], ema, rtol=1e-4)
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
    # Compiled before the first step, and never called where another state would be compiled anew.
    assert [step._cache_size() for step in steps] == [0, 0]


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
