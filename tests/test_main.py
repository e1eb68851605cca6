"""The main job at its smallest, as a user types it, and what bad input prints."""

import dataclasses
import functools
import json
import operator
import os
import pathlib
import subprocess
import sys
import typing

import flax.traverse_util
import jax
import ml_collections
import numpy as np
import pytest
from small import UNOPTIMISED

import icm_jax
from icm_jax.data import geometry, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.run import Start, check_starts, to_json
from icm_jax.errors import IcmError
from icm_jax.main import load_experiment
from icm_jax.nets import yolo
from icm_jax.nets.detector import Part
from icm_jax.report.curves import curves_of
from icm_jax.report.pictures import principal_colours
from icm_jax.tasks import build_task
from icm_jax.weights import darknet

# Notebooks train some of the same runs.
pytestmark = pytest.mark.usefixtures("shared_programs")

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCALES = {
    "omni_icm": ("demo", "study", "tiny", "imagenet"),
    "hyperprior": ("demo", "sweep", "large", "boxed", "tiny"),
    "yolov3": ("photos",),
    "scalable": ("demo", "coco"),
    "jpeg_dct": ("photos", "imagenet"),
    "cresnet": ("photos", "streets", "imagenet", "voc"),
}


def main(workdir, *flags, name="omni_icm", scale="tiny", cache=None):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", ICM_JAX_CACHE=str(cache or workdir))
    environment["XLA_FLAGS"] = UNOPTIMISED
    command = [
        sys.executable,
        "-m",
        "icm_jax.main",
        f"--config={ROOT / 'configs' / name}.py:{scale}",
        f"--workdir={workdir}",
        *flags,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def finished(shared_programs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("main")
    done = main(workdir, "--config.stage3.tasks.linear.steps=0")
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


def test_the_main_job_ends_with_a_report(finished):
    workdir, done = finished
    assert f"work directory: {workdir}" in done.stdout
    assert f"report: {workdir}/report.html" in done.stdout
    report = (workdir / "report.md").read_text()
    for text in (
        "Classification, tail fine-tuned",
        "Semantic segmentation",
        "Omni-ICM",
        "α = 0 twin",
        "jpeg",
        "BD-rate",
        "python -m icm_jax.main",
        "jax ",
    ):
        assert text in report
    pictures = ("rate_classify.png", "rate_segment.png", "segments.png", "features.png")
    for picture in (*pictures, "training.png"):
        assert (workdir / picture).read_bytes()[:4] == b"\x89PNG"
        assert picture in report
    assert (workdir / "report.html").read_text().count("data:image/png;base64,") == 5


def test_image_codecs_end_with_a_report(tmp_path):
    done = main(tmp_path, name="hyperprior")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("seed0/*/records.json")
    records = {(r["kind"], r["quality"]): r for r in json.loads(path.read_text())}
    assert list(records) == [
        (kind, q)
        for kind in ("stream", "jpeg", "webp")
        for q in ((0, 100), (10, 40))[kind != "stream"]
    ]
    for kind, record in records.items():
        assert record["images"] == 3 and record["psnr"] > 5 and record["bpp"] > 0, kind
        assert "ms_ssim_db" not in record  # its images are too small
    assert records["stream", 0]["bpp"] < records["stream", 100]["bpp"]
    assert records["jpeg", 10]["psnr"] < records["jpeg", 40]["psnr"]
    text = (tmp_path / "report.md").read_text()
    assert "Image quality, PSNR" in text and "MS-SSIM" not in text
    for picture in ("rate_psnr.png", "images.png", "training.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"


def test_networks_on_coefficients_end_with_a_table(tmp_path):
    arms = "('rgb-26','jpeg-late_concat_rfa_thinner')"
    done = main(tmp_path, f"--config.arms={arms}", name="jpeg_dct")
    assert done.returncode == 0, done.stderr[-3000:]
    for arm in ("rgb-26", "jpeg-late_concat_rfa_thinner"):
        folder = tmp_path / "seed0" / arm
        accuracy, speed = json.loads((folder / "records.json").read_text())
        assert accuracy["images"] == 8 and accuracy["top1"] <= accuracy["top5"] <= 1
        assert speed["curve"] == "speed" and speed["multiply_accumulates"] > 5e4
        assert json.loads((folder / "done.json").read_text())["step"] == 4
    text = (tmp_path / "report.md").read_text()
    assert "| rgb-26 |" in text and "| jpeg-late_concat_rfa_thinner |" in text
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_networks_on_a_code_end_with_a_report(tmp_path):
    flags = "--config.arms=('c39',)", "--config.joint.steps=0", "--config.noise=(90.0,)"
    done = main(tmp_path, *flags, name="cresnet")
    assert done.returncode == 0, done.stderr[-3000:]
    codec, jpeg = json.loads((tmp_path / "seed0/autoencoder-0.5/records.json").read_text())
    assert codec["psnr"] > 5 and codec["worst_gap_bytes"] < 32 and jpeg["ssim_db"] > 1
    classes, noisy, speed = json.loads((tmp_path / "seed0/c39-0.5/records.json").read_text())
    assert noisy["curve"] == "noise" and noisy["bpp"] > classes["bpp"] and 0 <= noisy["top1"] <= 1
    assert classes["bpp"] == codec["bpp"] and 0 <= classes["top1"] <= classes["top5"] <= 1
    assert speed["images_per_second"] > 0 and speed["multiply_accumulates"] > 1e4
    assert speed["peak_bytes"] > speed["parameters"]
    segments, _ = json.loads((tmp_path / "seed0/c39-d-0.5/records.json").read_text())
    assert segments["bpp"] == codec["bpp"] and 0 <= segments["miou"] <= 1
    text = (tmp_path / "report.md").read_text()
    for title in (
        "Classification",
        "Semantic segmentation",
        "Image quality, SSIM",
        "0.5 bpp",
        "noise",
    ):
        assert title in text


def test_a_detector_and_a_scalable_codec_end_with_a_report(tmp_path):
    """The detector starts from a Darknet file; four steps move no weight by more than 0.01."""
    network, rng = Part(yolo.yolov3(12, 1 / 16, 0.1)), np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)
    given = jax.tree.map(lambda x: rng.uniform(0.05, 0.1, x.shape).astype(np.float32), shapes)
    darknet.write(tmp_path / "small.weights", given)
    done = main(
        tmp_path, f"--config.detector.weights.path={tmp_path}/small.weights", name="scalable"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (pixels, jpeg, webp) = json.loads((tmp_path / "seed0/detector/records.json").read_text())
    assert [r["kind"] for r in (pixels, jpeg, webp)] == ["pixels", "jpeg", "webp"]
    assert all(0 <= r["map"] <= r["map50"] <= 1 for r in (pixels, jpeg, webp))
    assert "bpp" not in pixels and jpeg["bpp"] > 0.2
    folder = tmp_path / "seed0/disentangled-0.01"
    base, whole, *files = json.loads((folder / "records.json").read_text())
    assert [r["kind"] for r in files] == ["jpeg", "webp"]
    assert all(r["curve"] == "image" and r["psnr"] > 20 for r in files)
    assert (base["curve"], whole["curve"]) == ("detect", "image") and base["images"] == 4
    assert 0 < base["bpp"] < whole["bpp"] and "bpp_y_e" not in base and whole["bpp_y_e"] > 0
    assert base["worst_gap_bytes"] <= 32 + 24 and "map50" in base and "psnr" in whole
    text = (tmp_path / "report.md").read_text()
    for title in (
        "Detection, COCO's mAP at IoU 0.5",
        "Image quality, PSNR",
        "Detections",
        "Redundancy",
    ):
        assert f"## {title}" in text
    for picture in ("rate_map50.png", "rate_map.png", "boxes.png", "latents.png", "redundancy.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    # The detector of the codec file is the one that was trained.
    detector = checkpoint.load_variables(tmp_path / "seed0/detector")
    frozen = icm_jax.load(folder / "codec.icmc")
    for collection in ("params", "batch_stats"):
        own, there = (t[collection]["detector"] for t in (frozen.variables, detector))
        jax.tree.map(np.testing.assert_array_equal, own, there)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), detector["params"]["detector"], given["params"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.01


def test_rates_are_those_of_written_bytes(finished):
    workdir, _ = finished
    for path in workdir.glob("seed0/*/classify-*/records.json"):
        (record,) = json.loads(path.read_text())
        parts = record["bpp_header"] + record["bpp_z"] + record["bpp_y"]
        assert record["bpp"] == pytest.approx(parts)
        assert record["worst_gap_bytes"] <= 32
        assert record["images"] == record["examples"] == 24


def test_running_again_does_nothing_but_the_report(finished):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}
    done = main(workdir, "--config.stage3.tasks.linear.steps=0")
    assert done.returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("metrics.jsonl")}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.data.name=folder"], "data.path is empty"),
        (["--config.data.name=imagenet2012"], "not prepared"),
        (["--config.train.batch_size=7"], "does not divide"),
        (["--config.stage1.optimiser=sdg"], "--config.stage1.optimiser is 'sdg'"),
        (["--config.train.batchsize=7"], "batchsize"),
        (["--config.data.name=folder", "--config.data.train=7"], "folder has no field data.train"),
        (["--config.data.masks=here"], "scenes has no field data.masks; it has path, size"),
        (["--config.data.canvas=(1,2,3)"], "whole number of pixels or (height, width)"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, finished, flags, message):
    done = main(tmp_path, *flags, cache=finished[0])
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_workdir_of_another_experiment_is_refused(finished):
    done = main(finished[0], "--config.stage1.alpha=3.0")
    assert done.returncode == 2 and "alpha was" in done.stderr


def load(name="omni_icm"):
    return load_experiment(ROOT / "configs" / f"{name}.py")


class Recorder(ml_collections.ConfigDict):
    """A config that keeps the names of the fields that were read."""

    read: typing.ClassVar[set] = set()

    def __getitem__(self, key):
        Recorder.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("name, scale", [(n, s) for n in SCALES for s in SCALES[n]])
def test_every_run_of_every_scale_builds(name, scale):
    module = load(name)
    config = module.get_config(scale)
    names = set()
    for run in module.runs(config):
        assert run.name not in names and all(earlier.run in names for earlier in run.start)
        names.add(run.name)
    kinds, fields = {}, set()
    Recorder.read.clear()
    for run in module.runs(config):
        keys = ("name", "frontend", "mode", "kind", "input", "network")
        kind = [run.task.get(key) for key in keys]
        kind += [run.task.get("codec", {}).get(key) for key in ("name", "kind")]
        kinds.setdefault(tuple(kind), run)
    for run in kinds.values():
        fields |= set(run.task)
        builds(run)
    assert fields - {"protocol"} <= Recorder.read  # by that one the task is scored


def builds(run):
    """Traces the task of a run on batches of its shapes."""
    spec = pipeline.batch_spec(run.data, run.batch_size)
    shapes = pipeline.layout(("label", "mask"), spec)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    task = build_task(Recorder(dict(run.task, classes=12, mask_classes=13)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    image = {"image": jax.ShapeDtypeStruct((run.batch_size, *spec.canvas, 3), np.uint8)}
    variables = jax.eval_shape(task.init, key, image) | {"constants": dict(task.constants)}
    step = jax.ShapeDtypeStruct((), np.int32)
    total, _ = jax.eval_shape(task.loss, variables, batch, key, step)
    assert total.shape == () and total.dtype == np.float32
    if task.codec is not None and task.codec.qualities:
        batch["quality"] = jax.ShapeDtypeStruct((run.batch_size,), np.float32)
    found = jax.eval_shape(task.predict, variables, batch)
    if spec.boxes:
        assert found["boxes"].shape == (*found["labels"].shape, 4)
    if run.task.name == "segmentation":
        assert found["logits"].shape[::3] == (run.batch_size, 13)


@pytest.mark.parametrize("name", SCALES)
def test_every_task_takes_images_twice_as_wide_as_high(name):
    module = load(name)
    config = module.get_config("tiny")
    config.data.canvas = (config.data.canvas, 2 * config.data.canvas)
    if name == "cresnet":
        config.joint.steps = config.segment.steps = 2
    parts = [config.model, config.get("rate"), config.get("detector", {}).get("model")]
    for part in filter(None, parts):
        if "size" in part:
            part.size = (part.size, 2 * part.size)
    for run in module.runs(config):
        assert geometry.sides(run.task.size)[1] == 2 * geometry.sides(run.task.size)[0]
        builds(run)


@pytest.mark.parametrize(
    ("name", "curves"), [("scenes", {"classify"}), ("mask_folder", {"segment"})]
)
def test_tasks_follow_the_labels_that_the_data_has(name, curves):
    module = load()
    config = module.get_config()
    config.data.name = name
    runs = [run for run in module.runs(config) if run.evaluate]
    assert {run.labels.curve for run in runs} == curves
    assert [run.labels.arm for run in runs].count("rgb") == 1


@pytest.mark.parametrize(
    "name, field, data, note",
    [
        (
            "omni_icm",
            ("stage3", "tasks", "segment", "steps"),
            "folder",
            "No segment task: folder has no masks.",
        ),
        (
            "cresnet",
            ("segment", "steps"),
            "mask_folder",
            "No classify task: mask_folder has no labels.",
        ),
    ],
)
def test_a_task_without_its_labels_is_named(name, field, data, note):
    module = load(name)
    config = module.get_config()
    assert module.notes(config) == []
    *path, last = field
    functools.reduce(operator.getitem, path, config)[last] = 5
    config.data.name = data
    assert module.notes(config) == [note]


def test_tasks_on_data_of_their_own_read_one_codec():
    """Each with its rival on pixels; the experiment's own data need no labels."""
    module = load()
    config = module.get_config("transfer")
    config.data.path, config.stage2.lambdas = "photographs", (1.0,)
    tasks = config.stage3.tasks
    tasks.objects.data.path, tasks.street.data.path = "objects", "streets"
    tasks.boxes.data.path = "boxes"
    tasks.street.learning_rate = 0.5
    runs = {run.name: run for run in module.runs(config)}
    assert module.notes(config) == []
    for name, task, path, size in (
        ("objects", "classification", "objects", 128),
        ("street", "segmentation", "streets", (192, 256)),
        ("boxes", "object_detection", "boxes", (192, 256)),
    ):
        ours, rival = (runs[f"seed0/{place}"] for place in (f"omni/{name}-1", f"rgb/{name}"))
        (start,) = ours.start
        assert start.codec and start.run == "seed0/omni/stage2-1"
        for run in (ours, rival):
            assert (run.task.name, run.data.path, run.task.size) == (task, path, size)
            assert all(dict(point.data) == run.data.to_dict() for point in run.evaluate)
            assert (run.optim.learning_rate == 0.5) == (name == "street")
    assert {runs[start.run].data.path, runs["seed0/contrast"].data.path} == {"photographs"}
    tasks.street.kind = "guess"
    with pytest.raises(IcmError, match=r"stage3\.tasks\.street\.kind is 'guess'; choose one of"):
        module.runs(config)


def test_objects_are_found_on_the_feature_as_on_pixels():
    """Boxes of the experiment's own data, masks of others; both ranges follow the images' sizes."""
    module = load()
    config = module.get_config("tiny")
    config.stage3.tasks.detect.steps = 4
    given = dict(name="coco_json", path="things", canvas=(48, 64), boxes=3, outlines=4)
    config.stage3.tasks["masks"] = module.task("instances", 4, data=given)
    runs = {run.name: run for run in module.runs(config)}
    for name, size, needs, curve in (
        ("detect", 32, ("objects",), "detect"),
        ("masks", (48, 64), ("objects", "outlines"), "instances"),
    ):
        ours, rival = (runs[f"seed0/{place}"] for place in (f"omni/{name}-1", f"rgb/{name}"))
        assert ours.start[0].codec and ours.start[0].run == "seed0/omni/stage2-1"
        assert {point.kind for point in ours.evaluate} == {"stream"}
        assert {point.kind for point in rival.evaluate} == {"pixels", "jpeg", "webp"}
        for run in (ours, rival):
            assert (run.task.size, run.needs, run.labels.curve) == (size, needs, curve)
            assert run.task.range_scale == min(geometry.sides(size)) / 800
        builds(rival if name == "detect" else ours)
    assert runs["seed0/rgb/detect"].data.to_dict() == runs["seed0/filter"].data.to_dict() | {
        "boxes": 8
    }
    config.data.name = "folder"
    assert "No detect task: folder has no objects." in module.notes(config)


def test_weights_that_start_nothing_are_named():
    module = load()
    config = module.get_config()
    config.weights.path, config.codecs = "some.safetensors", "runs/omni"
    assert module.notes(config) == [
        "weights.path starts nothing: the codecs are those of runs/omni."
    ]


def test_a_start_that_is_not_there_is_said_before_the_first_run(tmp_path, finished):
    """Of the last run, in another work directory; and a codec that nobody wrote there."""
    done = main(tmp_path, f"--config.codecs={tmp_path / 'none'}", cache=finished[0])
    assert done.returncode == 2 and "[1/" not in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: seed0/omni/classify-1 starts from")
    assert "where no run has finished" in done.stderr
    runs = load().runs(load().get_config("tiny"))
    check_starts(runs, tmp_path)  # each starts from one before
    with pytest.raises(IcmError, match=r"seed0/contrast starts from .*seed0/filter"):
        check_starts(runs[1:], tmp_path)
    check_starts(runs[1:], finished[0])  # that has finished
    standing = dataclasses.replace(runs[-1], name="new", start=(Start(runs[0].name, codec=True),))
    with pytest.raises(IcmError, match=r"seed0/filter has no codec.icmc"):
        check_starts([standing], finished[0])


@pytest.mark.parametrize("name", SCALES)
def test_no_field_of_the_config_is_without_effect(name):
    module = load(name)
    config = module.get_config("demo")
    if name == "omni_icm":
        for own in config.stage3.tasks.values():
            own.steps = 100
    if name == "cresnet":
        config.segment.steps = config.joint.steps = 100
    if name == "scalable":
        config.layered.kinds = (("conditional", (2,), (3,), 2), ("split", (2,), (3,), 1))
    for tree in (config, config.get("detector", {}), config.get("stage3", {})):
        if "weights" in tree:
            tree.weights.path = "some.weights"
    plain = [to_json(run) for run in module.runs(config)]
    ignored = set()
    for path, value in flax.traverse_util.flatten_dict(config.to_dict()).items():
        if value is None:  # a field of another data set, that is not given
            continue
        changed = config.copy_and_resolve_references()
        inner = changed
        for name in path[:-1]:
            inner = inner[name]
        if isinstance(value, bool):
            inner[path[-1]] = not value
        elif isinstance(value, tuple):
            inner[path[-1]] = value[:-1] or (1,)
        else:
            inner[path[-1]] = value + "x" if isinstance(value, str) else 2 * value + 1
        try:
            if [to_json(run) for run in module.runs(changed)] == plain:
                ignored.add(".".join(path))
        except IcmError:  # which the value, being out of range, has too
            pass
    assert ignored == {"name"}  # that of the default work directory


def test_curves_average_seeds():
    record = dict(kind="stream", arm="omni", point="1", bpp=0.2, top1=0.5)
    other = dict(record, bpp=0.4, top1=0.7)
    curve = curves_of([record, other, dict(kind="pixels", arm="rgb", point="", top1=0.9)], "top1")
    np.testing.assert_allclose(curve["omni"], [[0.3, 0.6, 0.1, 0.1]])


def test_principal_colours_follow_the_strongest_direction():
    ramp = np.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    features = np.concatenate([5 * ramp, 0.01 * ramp**2, 0 * ramp, 0 * ramp], axis=-1)
    colours = principal_colours(features)
    assert colours.min() >= 0 and colours.max() <= 1
    assert abs(np.corrcoef(colours[..., 0].ravel(), ramp.ravel())[0, 1]) > 0.99
