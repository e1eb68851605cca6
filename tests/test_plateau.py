"""The learning rate that goes by the validation loss: when it is halved, when a run ends, and that
the run then is what it was at its best, whatever happened on the way."""

import dataclasses
import io
import json
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image
from test_train import toy_batches
from toy import toy, toy_run

from icm_jax.codecs import CODECS, model_file
from icm_jax.data import pipeline
from icm_jax.data.sources import Source
from icm_jax.engine import checkpoint, frozen, plateau, train
from icm_jax.engine.run import CODEC, from_json, scored_changes, to_json, what_is_done
from icm_jax.errors import IcmError
from icm_jax.main import load_experiment
from icm_jax.measure.ready import check_ready

# optax's and orbax's own code neither keeps to strict promotion nor is free of deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
HERE = pathlib.Path(__file__).parent


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def after(losses, patience):
    """[(rate, lowest, its step)] after each loss, and after how many the run ends, or None."""
    state = plateau.begin(toy(), {"params": {"w": jnp.float32(0)}})
    found, end = [], None
    for step, loss in enumerate(losses, 1):
        own = {"params": {"w": jnp.float32(step)}}
        state = plateau.judged(state, jnp.float32(loss), jnp.int32(step), own, patience)
        assert float(state.variables["params"]["w"]) == int(state.step)
        rate = float(plateau.rate(state))
        found.append((rate, float(state.lowest), int(state.step)))
        run = train.Watched(jnp.int32(step), own, None, {}, state)
        end = end or (step if plateau.ended(run) else None)
    return found, end


def test_the_rate_is_halved_where_the_loss_stalls_and_the_run_then_ends():
    # Waits of two: a tie is no fall, and a fall begins the wait anew.
    losses = [4, 3, 3, 2, 2.5, 2, 1, 1, 1.5, *[1.25] * 10]
    found, end = after(losses, 2)
    assert [rate for rate, *_ in found[:9]] == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    assert [step for *_, step in found[:9]] == [1, 2, 2, 4, 4, 4, 7, 7, 7]
    assert [int(1 / rate) for rate, *_ in found[9:16]] == [4, 8, 8, 16, 16, 32, 32]
    assert end == 17 and found[-1][1:] == (1.0, 7)  # five halvings, then two more in vain


def test_a_loss_that_falls_ends_nothing():
    found, end = after(np.linspace(2, 1, 100), 1)
    assert end is None and found[-1] == (1.0, 1.0, 100)
    assert after([1.0] * 7, 1)[1] == 7  # the first falls from infinity


def bright_source():
    """Five images that are brighter than those of training: what is learned soon misses them."""
    images = np.random.default_rng(1).integers(200, 256, (5, 4, 4, 3)).astype(np.uint8)

    def load(number):
        file = io.BytesIO()
        Image.fromarray(images[number]).save(file, "PNG")
        return {"image": file.getvalue(), "name": str(number)}

    return Source("five", 5, (), load), images


def watched_run(**changes):
    own = dict(interval=2, patience=1, examples=0)
    optim = dict(toy_run().optim, learning_rate=0.05, schedule="plateau", plateau=own)
    return toy_run(**dict(steps=60, save_every=3, keep_every=1, optim=optim) | changes)


def fit(folder, run=None, batches=toy_batches):
    run = run or watched_run()
    folder.mkdir(parents=True, exist_ok=True)
    training = train.prepare(run, toy())
    spec = pipeline.batch_spec(run.data, run.batch_size)
    with checkpoint.manager(folder, period=run.keep_every) as checkpoints:
        state, first = train.make_state(training, checkpoints)
        validate = plateau.validation(training, state, bright_source()[0], spec)
        given = batches(first, run.steps)
        done = train.loop(training, state, first, given, checkpoints, folder, validate)
        return done, jax.device_get(train.make_state(training, checkpoints)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    with jax.numpy_dtype_promotion("standard"):
        return folder, *fit(folder)


def lines_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def test_a_run_equals_descent_by_hand_and_gives_its_best_step(whole):
    folder, done, state = whole
    _, images = bright_source()
    order = pipeline.batches(
        bright_source()[0], pipeline.batch_spec({"canvas": 4}, 2), seed=0, stop=3
    )
    held_out = np.concatenate([batch["image"] for batch in order])
    assert {image.tobytes() for image in held_out} == {image.tobytes() for image in images}
    x_held_out = held_out.mean(axis=(1, 2)) / 255.0
    w, trace, averaged, rate, found = np.zeros(3), np.zeros(3), np.zeros(3), 1.0, {}
    for step, batch in enumerate(toy_batches(0, 60), 1):
        x = batch["image"].mean(axis=(1, 2)) / 255.0
        trace = 2 * ((x @ w + 1.0)[:, None] * x).mean(axis=0) + 0.9 * trace
        w = w - rate * 0.05 * trace
        averaged = 0.9 * averaged + 0.1 * w
        if step % 2 == 0:
            loss = np.square(x_held_out @ averaged + 1.0).mean()
            rate *= 1.0 if loss < min([np.inf, *(value for value, _ in found.values())]) else 0.5
            found[step] = loss, averaged
            if rate < 1 / 32:
                break
    lines = lines_of(folder)
    logged = {step: line["validation_loss"] for step, line in lines.items() if step in found}
    np.testing.assert_allclose([*logged.values()], [v for v, _ in found.values()], rtol=1e-3)
    best = min(found, key=lambda step: found[step][0])
    assert 2 < best < step < 60 and done["step"] == step == max(lines)
    assert done["best_step"] == best and done["metrics"]["halvings"] == plateau.HALVINGS
    np.testing.assert_allclose(state.variables["params"]["w"]["v"], found[best][1], rtol=1e-3)


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("at", [1, 4, 5, 9, 12, 13])
def test_a_killed_run_ends_in_the_same_bits(whole, tmp_path, at):
    _, done, state = whole

    def cut(first, stop):
        for step, batch in enumerate(toy_batches(first, stop), first):
            if step == at:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        fit(tmp_path, batches=cut)
    again, found = fit(tmp_path)
    timed = ("images_per_second", "input_wait", "device_wait")
    assert again["step"] == done["step"] and again["best_step"] == done["best_step"]
    assert {n: v for n, v in again["metrics"].items() if n not in timed} == done["metrics"]
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_the_last_checkpoint_damaged_or_alone_gives_the_same(whole, tmp_path, capfd):
    folder, done, state = whole
    again = shutil.copytree(folder, tmp_path / "alone")
    assert fit(again)[0] == done  # nothing was trained
    item = again / "checkpoints" / str(done["step"]) / "default"
    (item / "manifest.ocdbt").write_bytes(b"")
    repeated, found = fit(again)
    assert "it goes on from step" in capfd.readouterr().err
    assert repeated["best_step"] == done["best_step"]
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_run_that_is_not_ended_gives_its_best_step_too(tmp_path):
    done, state = fit(tmp_path, watched_run(steps=13, save_every=1, ema=0.0))
    name, lines = "validation_loss", lines_of(tmp_path)
    losses = {step: line[name] for step, line in lines.items() if name in line}
    assert [*losses] == [2, 4, 6, 8, 10, 12, 13]  # the last step is judged, too
    assert done["step"] == 13 and done["best_step"] == min(losses, key=lambda step: losses[step])
    kept = checkpoint.read_variables(tmp_path, done["best_step"])
    jax.tree.map(np.testing.assert_array_equal, kept, state.variables)


def test_the_loss_does_not_depend_on_devices_or_processes(whole, tmp_path):
    folder, _, state = whole
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, str(HERE / "plateau_worker.py"), str(tmp_path), address]
    both = [subprocess.Popen([*command, str(p)], stderr=subprocess.PIPE, text=True) for p in (0, 1)]
    outputs = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)[-3000:]
    apart = lines_of(tmp_path)
    for step, line in lines_of(folder).items():
        for name in ("loss", "validation_loss", "halvings"):
            if name in line:
                np.testing.assert_allclose(apart[step][name], line[name], rtol=1e-5)
    again = jax.device_get(fit(tmp_path)[1])
    np.testing.assert_allclose(
        again.variables["params"]["w"]["v"], state.variables["params"]["w"]["v"], rtol=1e-5
    )


def codec_run(**changes):
    """The first of configs/hyperprior.py:tiny, watched; its second step goes much too far."""
    module = load_experiment(HERE.parent / "configs" / "hyperprior.py")
    config = module.get_config("tiny")
    run = module.runs(config)[0]
    optim = dict(run.optim, schedule="plateau", learning_rate=0.03, warmup_steps=2)
    optim |= dict(plateau=dict(interval=1, patience=1, examples=4))
    fields = dict(steps=40, save_every=1, keep_every=1, evaluate=(), log_every=10)
    fields |= dict(optim=ml_collections.ConfigDict(optim)) | changes
    return dataclasses.replace(run, **fields)


def test_a_codec_file_is_of_the_best_step(tmp_path, capfd):
    run = codec_run()
    metrics = train.train(run, tmp_path)
    folder = tmp_path / run.name
    done = what_is_done(folder)
    assert done and done["metrics"] == metrics and (done["best_step"], done["step"]) == (1, 7)
    said = f"{run.name} is what it was at step {done['best_step']} of {done['step']}, where"
    assert said in capfd.readouterr().err
    best = checkpoint.read_variables(folder, done["best_step"])
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_variables(folder), best)
    written = model_file.load(folder / CODEC, CODECS)
    frozen.check_same(best, written, run)
    last = checkpoint.read_variables(folder, done["step"] - 1)
    with pytest.raises(IcmError, match="does not have the weights of its codec file"):
        frozen.check_same(last, written, run)
    for name in (CODEC, "done.json"):
        (folder / name).unlink()
    train.train(run, tmp_path)
    assert what_is_done(folder) == done
    assert model_file.load(folder / CODEC, CODECS).fingerprint == written.fingerprint


def test_a_folder_from_before_the_number_of_examples_goes_on(tmp_path):
    run = codec_run(optim=ml_collections.ConfigDict(dict(codec_run().optim, schedule="constant")))
    run.optim.plateau.examples = 0
    tree = to_json(run)
    del tree["optim"]["plateau"]["examples"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert scored_changes(tmp_path, run) == []
    assert from_json(tree).optim.plateau.to_dict() == {"interval": 1, "patience": 1}


def test_no_validation_split_is_one_clear_error_before_the_first_step(tmp_path):
    for name in "abcdefgh":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "train.txt").write_text("a.png\nb.png\nc.png\nd.png\n")
    (tmp_path / "val.txt").write_text("")
    data = ml_collections.ConfigDict(dict(name="photos", path=str(tmp_path), canvas=64))
    told = (
        r"goes by the loss on the validation split \(schedule plateau\): no images for validation"
    )
    for act in (lambda run: check_ready([run], tmp_path), lambda run: train.train(run, tmp_path)):
        with pytest.raises(IcmError, match=told):
            act(codec_run(data=data))
    assert not list(tmp_path.rglob("checkpoints"))
