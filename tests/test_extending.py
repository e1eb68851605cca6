"""A stranger adds a codec, a detector, a data set, a weights reader and a task on other data.

Each lies in tests/strangers/ in at most 60 lines and uses the package as it is installed.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from small import images
from strangers import codec, dataset, detector, feature_codec, rotation, second_data, weights

import icm_jax
from icm_jax import cli, main
from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.codecs.codec import forward
from icm_jax.codecs.scalable import detector_of
from icm_jax.data import DATASETS, open_source, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.frozen import check_same
from icm_jax.engine.train import complete, train
from icm_jax.errors import IcmError
from icm_jax.measure.evaluate import evaluate
from icm_jax.measure.segments import segmented
from icm_jax.nets.yolo import DETECTORS
from icm_jax.tasks import TASKS, build_task
from icm_jax.weights import READERS

ROOT = pathlib.Path(__file__).resolve().parent.parent
STRANGERS = sorted(pathlib.Path(__file__).with_name("strangers").glob("*.py"))


@pytest.mark.parametrize("path", STRANGERS, ids=lambda path: path.stem)
def test_a_stranger_needs_at_most_sixty_lines(path):
    assert len(path.read_text().splitlines()) <= 60


def test_streets_of_another_data_set_are_trained_and_scored_whole(tmp_path, monkeypatch):
    """Both ends of each street are seen: classes that stand nowhere else are learned."""
    monkeypatch.setitem(DATASETS, "streets", dataset.STREETS)
    run = dataset.segmentation_run(seed=0, size=(32, 64))
    with jax.numpy_dtype_promotion("standard"):
        metrics = train(run, tmp_path)
        (record,) = evaluate(run, tmp_path)
    assert metrics["pixel_accuracy"] > 0.8
    assert record["images"] == 16 and record["miou"] > 0.5
    source = open_source(run.data, "validation")
    (batch,) = pipeline.in_order(source, pipeline.batch_spec(run.data, 16))
    assert batch["image"].shape == (16, 32, 64, 3) and batch["mask"].shape == (16, 32, 64)
    assert (batch["mask"][:, :30, :10] == 2).all() and (batch["mask"][:, :30, -10:] == 2).all()
    assert set(np.unique(batch["mask"])) == {0, 1, 2, 255}
    predict = build_task(complete(run, source)).predict
    variables = checkpoint.load_variables(tmp_path / run.name)
    given = ({"image": batch["image"][row : row + 1]} for row in range(16))
    found = np.concatenate([segmented(predict, variables, g, (32, 64), (64, 128)) for g in given])
    ends = found[:, :48, [0, 1, 2, 125, 126, 127]]
    assert (ends == 2).mean() > 0.8 and (found[:, :48, 32:96] == 2).mean() < 0.1
    with pytest.raises(IcmError, match=r"set streets has no field data\.path; it has count"):
        open_source(dict(name="streets", path="x"), "train")


def test_a_context_model_is_trained_frozen_and_read_back(tmp_path, monkeypatch):
    """Its files; tests/test_codecs.py and test_model_file.py ask of it what they ask of all."""
    monkeypatch.setitem(CODECS, "checkerboard", codec.checkerboard_codec)
    fields = dict(name="image_compression", codec=dict(name="checkerboard", width=4, channels=6))
    fields |= dict(metric="mse", ms_ssim_weight=0.0, lambdas=(0.01,), size=64)
    task = build_task(ConfigDict(fields | dict(straight_through=True)))
    batch, key = {"image": images(2, 64, 64, 3)}, jax.random.key(0)
    variables = jax.jit(task.init)(key, batch) | {"constants": dict(task.constants)}

    @jax.jit
    def step(params):
        def loss(params):
            return task.loss(variables | {"params": params}, batch, key, 0)[0]

        value, gradient = jax.value_and_grad(loss)(params)
        return (
            value,
            jax.tree.map(lambda p, g: p - 1e-3 * jax.numpy.sign(g), params, gradient),
            gradient,
        )

    losses, params = [], variables["params"]
    for _ in range(4):
        value, params, gradient = step(params)
        losses.append(float(value))
    assert losses[3] < losses[0]
    assert np.abs(gradient["checkerboard"]["context_kernel"]).max() > 0
    frozen = bitstream.freeze(task.codec, {"params": params}, batch["image"])
    model_file.save(tmp_path / "codec.icmc", frozen)
    loaded, picture = model_file.load(tmp_path / "codec.icmc", CODECS), images(45, 70, 3)
    data = frozen.compress(picture)
    given = bitstream.decode(loaded, [data], "image")
    expected = forward(frozen.codec, frozen.on_device, {"image": picture[None]}, (45, 70))
    np.testing.assert_allclose(given, expected.outputs["image"], rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(loaded.decompress(data), frozen.decompress(data))


def test_a_codec_of_features_goes_through_stages_2_and_3(tmp_path, monkeypatch):
    """The experiment of the package, its codec another one: trained, frozen, stood on, scored."""
    monkeypatch.setitem(CODECS, "plain_feature", feature_codec.plain_codec)
    experiment = main.load_experiment(ROOT / "configs" / "omni_icm.py")
    fields = experiment.tiny()
    for stage in ("stage0", "pretrain", "stage1"):
        fields[stage]["steps"] = 0
    fields["stage3"]["tasks"] = dict(classify=experiment.task("classify", 4))
    fields["codec"] = dict(name="plain_feature", channels=6)
    stage1, stage2, classes, *_ = experiment.runs(ConfigDict(fields))
    with jax.numpy_dtype_promotion("standard"):
        train(stage1, tmp_path)
        train(stage2, tmp_path)
        train(classes, tmp_path)
        (record,) = evaluate(classes, tmp_path)
    before, after = (checkpoint.load_variables(tmp_path / run.name) for run in (stage1, stage2))
    jax.tree.map(
        np.testing.assert_array_equal, after["params"]["filter"], before["params"]["filter"]
    )
    frozen = icm_jax.load(tmp_path / stage2.name / "codec.icmc")
    assert frozen.codec.config[0] == "plain_feature" and {"bpp_y", "top1"} <= set(record)
    assert record["fingerprint"] == frozen.fingerprint.hex()
    first, last = (checkpoint.load_variables(tmp_path / run.name) for run in (stage2, classes))
    jax.tree.map(np.testing.assert_array_equal, first["params"]["plain"], last["params"]["plain"])


def test_a_task_on_other_data_writes_files_of_the_codec_that_it_stands_on(tmp_path):
    codecs, tasks = tmp_path / "codecs", tmp_path / "tasks"
    task = second_data.task_run(second_data.squares(tmp_path / "squares"), codecs)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(IcmError, match="codecs/codec has not finished"):
            train(task, tasks)
        codec = dataclasses.replace(second_data.codec_run(), codec_file={"weights": "float16"})
        train(codec, codecs)
        (picture,) = evaluate(codec, codecs)
        train(task, tasks)
        (record,) = evaluate(task, tasks)
    frozen = icm_jax.load(codecs / "codec" / "codec.icmc")
    assert record["fingerprint"] == picture["fingerprint"] == frozen.fingerprint.hex()
    assert not list(tasks.rglob("*.icmc"))
    assert record["bpp"] > 0 and record["examples"] == record["images"]
    # A run whose codec is no longer the file's is refused.
    variables = checkpoint.load_variables(tasks / task.name)
    check_same(variables, frozen, task)
    drifted = jax.tree.map(lambda leaf: leaf + 1, variables["params"])
    with pytest.raises(IcmError, match="does not have the weights of its codec file"):
        check_same({"params": drifted}, frozen, task)


def test_an_experiment_of_ones_own_makes_its_runs():
    experiment = main.load_experiment(STRANGERS[0].with_name("experiment.py"))
    try:
        (run,) = experiment.runs(experiment.get_config())
        assert build_task(run.task).codec.config[0] == "checkerboard"
    finally:
        CODECS.pop("checkerboard")


def test_a_task_of_ones_own_learns_which_way_up_streets_are(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "streets", dataset.STREETS)
    monkeypatch.setitem(TASKS, "rotation", rotation.rotation)
    run = rotation.rotation_run(name="streets")
    with jax.numpy_dtype_promotion("standard"):
        metrics = train(run, tmp_path)
    assert metrics["loss"] < 0.5 and metrics["top1"] > 0.8
    loaded = checkpoint.load_variables(tmp_path / "rotation")
    assert set(loaded["params"]) == {"head", "tail", "classifier"}


def test_a_pooling_detector_is_trained_coded_for_and_found_in_a_codec_file(
    tmp_path, monkeypatch, capsys
):
    """`icm detect` needs the codec's file alone: the table is no longer known by its name then."""
    with monkeypatch.context() as known, jax.numpy_dtype_promotion("standard"):
        known.setitem(DETECTORS, "pooled", detector.pooled)
        first, second = detector.runs()
        before = train(first, tmp_path)
        train(second, tmp_path)
        found, _, *_ = evaluate(second, tmp_path)
    assert {"place", "objectness", "class"} <= set(before)
    assert (found["curve"], found["images"]) == ("detect", 4) and found["bpp"] > 0
    model = tmp_path / second.name / "codec.icmc"
    frozen, picture = icm_jax.load(model), images(50, 70, 3)
    assert detector_of(frozen.codec) == detector.pooled(12, width=6)
    feature = forward(frozen.codec, frozen.on_device, {"image": picture[None]}, (50, 70))
    assert feature.outputs["feature"].shape == (1, 16, 20, 12)  # of 64 × 80 pixels
    (tmp_path / "street.icm").write_bytes(frozen.compress(picture))
    code = cli.main(["detect", str(tmp_path / "street.icm"), "-m", str(model), "--least", "0.01"])
    boxes = json.loads(capsys.readouterr().out)["boxes"]
    assert code == 0 and boxes
    with pytest.raises(IcmError, match="unknown detector 'pooled'"):
        build_task(complete(first, open_source(first.data, "train")))


def written(path, arrays):
    """A .safetensors file."""
    header, data = {}, b""
    for name, (kind, array) in arrays.items():
        end = len(data) + array.nbytes
        header[name] = dict(dtype=kind, shape=array.shape, data_offsets=[len(data), end])
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_weights_under_other_names_start_a_task(tmp_path, monkeypatch):
    """A segmenter takes what the file has; the rest starts as it would without."""
    monkeypatch.setitem(DATASETS, "streets", dataset.STREETS)
    monkeypatch.setitem(READERS, "dotted", weights.dotted)
    run, path = dataset.segmentation_run(seed=0, size=(32, 64)), tmp_path / "some.safetensors"
    plain = dataclasses.replace(run, name="plain", steps=0)
    foreign = dataclasses.replace(run, name="foreign", steps=0, weights=("dotted", str(path)))
    train(plain, tmp_path)
    own = flatten_dict(checkpoint.load_variables(tmp_path / "plain")["params"])
    kernel = next(place for place, leaf in own.items() if leaf.ndim == 4)
    scale = next(place for place in own if place[-1] == "scale")
    shape = [own[kernel].shape[axis] for axis in (3, 2, 0, 1)]
    given = {
        ".".join(kernel): ("F32", np.random.default_rng(1).normal(size=shape).astype(np.float32)),
        ".".join(scale): ("F16", np.full(own[scale].shape, 1.5, np.float16)),
        "projector.weight": ("F32", np.zeros(3, np.float32)),
    }
    written(path, given)
    train(foreign, tmp_path)
    started = flatten_dict(checkpoint.load_variables(tmp_path / "foreign")["params"])
    expected = given[".".join(kernel)][1].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(started[kernel], expected)
    np.testing.assert_array_equal(started[scale], np.full(own[scale].shape, 1.5, np.float32))
    for place in own.keys() - {kernel, scale}:
        np.testing.assert_array_equal(started[place], own[place])
    for arrays, message in (
        ({}, "has no weights for"),
        ({".".join(scale): ("F32", np.zeros(1, np.float32))}, r"shape \(1,\), those of this task"),
    ):
        written(path, arrays)
        with pytest.raises(IcmError, match=message):
            train(dataclasses.replace(foreign, name="refused"), tmp_path)
    with pytest.raises(IcmError, match="no reader of weights 'onnx'; choose one of darknet"):
        train(dataclasses.replace(foreign, name="onnx", weights=("onnx", "x")), tmp_path)
