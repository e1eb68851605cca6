"""What a config or a command may have wrong is one line, before anything is compiled or trained.

The command runs in this process: nothing here gets as far as a step.
"""

import dataclasses
import inspect
import json
import pathlib
import sys

import numpy as np
import optax
import pytest
from absl import flags
from PIL import Image
from toy import toy_run

from icm_jax import codecs, main, tasks
from icm_jax.codecs import fields as of_codecs
from icm_jax.data.fields import FieldError
from icm_jax.engine import fields, optim
from icm_jax.engine.run import CODEC, DONE, RECORDS, Labels, Point, Start, claim, to_json
from icm_jax.errors import IcmError
from icm_jax.measure import classical
from icm_jax.measure.ready import check_ready
from icm_jax.nets import yolo
from icm_jax.tasks import fields as of_tasks

ROOT = pathlib.Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(3)
OWN = tuple(flags.FLAGS.flags_by_module_dict()[main.__name__])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICM_JAX_CACHE", str(tmp_path / "cache"))


def command(capsys, config, *arguments) -> str:
    """The line with which `python -m icm_jax.main` ends, and the exit code is 2."""
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    for flag in OWN:
        flag.unparse()
    name, colon, scale = config.partition(":")
    path = name if "/" in name or not colon else f"{ROOT}/configs/{name}.py"
    argv = ["main", f"--config={path}{colon}{scale}", *arguments]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", argv)
        main.main(main._parse(argv))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "[1/" not in out
    return err.splitlines()[-1].split("error: ", 1)[1]


FILES = {
    "absent": (None, "there is no config file {}/absent.py"),
    "syntax": ("def f(:\n", "{}/syntax.py:1: SyntaxError: invalid syntax"),
    "raises": ("x = 1\ny = 1 / 0\n", "{}/raises.py:2: ZeroDivisionError: division by zero"),
    "imports": ("import nowhere\n", "{}/imports.py:1: ModuleNotFoundError: No module named 'now"),
    "empty": ("", "{}/empty.py has no get_config(scale), which returns the config"),
    "nothing": ("def get_config(): pass\n", "{}/nothing.py: get_config returned NoneType, no Conf"),
    "fails": (
        "def get_config():\n    return missing\n",
        "{}/fails.py:2: NameError: name 'missing' is not defined",
    ),
}
MADE = (
    "import ml_collections\n"
    "def get_config():\n"
    "    data = dict(name='scenes', path='')\n"
    "    return ml_collections.ConfigDict(dict(name='mine', data=data, seeds=(0,)))\n"
)
FILES |= {
    "runless": (MADE, "{}/runless.py has no runs(config), which returns a list of runs"),
    "unnamed": (MADE.replace("name='mine', ", ""), "the config {}/unnamed.py has no field name"),
    "none": (MADE + "def runs(config): return []\n", "{}/none.py gives no run"),
    "wrong": (
        MADE + "def runs(config):\n    return config.sedes\n",
        "{}/wrong.py:6: AttributeError: ",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_that_cannot_be_used(tmp_path, capsys, name):
    text, expected = FILES[name]
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    line = command(capsys, f"{tmp_path}/{name}.py", f"--workdir={tmp_path / 'runs'}")
    assert line.startswith(expected.format(tmp_path))


def test_a_config_that_is_a_folder_or_has_no_such_scale(tmp_path, capsys):
    (tmp_path / "made.py").write_text(MADE)
    assert command(capsys, f"{tmp_path}") == f"{tmp_path} is a folder; name a config file in it"
    line = command(capsys, f"{tmp_path}/made.py:huge")
    assert line == f"{tmp_path}/made.py: its get_config knows no scales; leave out :huge"
    assert command(capsys, f"{tmp_path}/maed.py").endswith("; near it is made.py")
    assert command(capsys, "hyperprior:huge").startswith("there is no scale 'huge'; choose one of")
    assert command(capsys, "") == "name an experiment, as --config=configs/omni_icm.py"


FIELDS = [
    ("hyperprior", "nope=1", "the config has no field --config.nope; it has before, codec_file"),
    (
        "hyperprior",
        "train.batchsize=1",
        "the config has no field --config.train.batchsize; near it is --config.train.batch_size",
    ),
    (
        "hyperprior",
        "traim.steps=1",
        "the config has no field --config.traim.steps; near it is --config.train.steps",
    ),
    ("hyperprior", "train.steps=abc", "flag --config.train.steps=abc: expected a whole"),
    ("hyperprior", "train=3", "flag --config.train=3: Failed to parse '3' as a ConfigDict"),
    (
        "hyperprior",
        "name=",
        "the config {root}/configs/hyperprior.py has no field name, or an e",
    ),
    ("hyperprior", "train.log_every=0", "--config.train.log_every is 0; it must be a whole number"),
    ("hyperprior", "train.save_every=0", "--config.train.save_every is 0; it must be a whole num"),
    ("hyperprior", "train.batch_size=-4", "--config.train.batch_size is -4; it must be a whole n"),
    ("hyperprior", "train.batch_size=3", "--config.train.batch_size is 3, which does not divide"),
    ("hyperprior", "train.steps=-1", "--config.train.steps is -1; it must be a whole number of"),
    ("hyperprior", "train.fsdp=3", "--config.train.fsdp is 3, which does not divide 2 devices"),
    ("hyperprior", "train.remat=all", "--config.train.remat is 'all'; it must be one of none, con"),
    ("hyperprior", "train.ema=2", "--config.train.ema is 2.0; it must be a number of at least 0 "),
    ("hyperprior", "train.clip_norm=-1", "--config.train.clip_norm is -1.0; it must be a number o"),
    ("hyperprior", "train.learning_rate=-1", "--config.train.learning_rate is -1.0; it must be"),
    ("hyperprior", "train.learning_rate=nan", "--config.train.learning_rate is nan; it must be"),
    ("hyperprior", "train.optimiser=sdg", "--config.train.optimiser is 'sdg'; it must be one of s"),
    ("hyperprior", "train.warmup_steps=50", "--config.train.warmup_steps is 50; it must be below"),
    ("hyperprior", "train.accumulate=0", "--config.train.accumulate is 0; it must be a whole num"),
    ("hyperprior", "seeds=()", "{root}/configs/hyperprior.py gives no run: --config.seeds is emp"),
    ("hyperprior", "seeds=(0,0)", "two runs have the name seed0/mean_scale_hyperprior: give no va"),
    ("hyperprior", "seeds=(-1,)", "a value of --config.seeds is -1; it must be a whole number fro"),
    ("hyperprior", "model.kinds=()", "{root}/configs/hyperprior.py gives no run: --config.model.k"),
    ("hyperprior", "model.kinds=('new',)", "a value of --config.model.kinds is 'new'; it must be"),
    ("hyperprior", "model.dtype=float99", "--config.model.dtype is 'float99'; it must be one of f"),
    ("hyperprior", "model.width=0", "--config.model.width is 0; it must be a whole number of at l"),
    ("hyperprior", "model.last=4", "--config.model.last is 4; it must be one of 3, 5"),
    ("hyperprior", "model.levels=0", "--config.model.levels is 0; it must be a whole number of at"),
    ("hyperprior", "model.lambdas=()", "--config.model.lambdas is (); it must be a tuple of one "),
    ("hyperprior", "model.lambdas=(0,1)", "--config.model.lambdas is (0, 1); it must be a tuple"),
    ("hyperprior", "model.lambdas=(1,)", "--config.model.lambdas is (1,) for a codec with qualit"),
    ("hyperprior", "model.metric=ssim", "--config.model.metric is 'ssim'; it must be one of mse,"),
    ("hyperprior", "model.metric=ms_ssim", "--config.model.size is 64; MS-SSIM needs views of at"),
    ("hyperprior", "model.size=100", "--config.model.size is 100; a canvas (data.canvas) of 64 ×"),
    ("hyperprior", "model.size=64.5", "--config.model.size is 64.5; it must be a whole number of"),
    ("hyperprior", "data.canvas=0", "--config.data.canvas is 0; it must be a whole number of pix"),
    ("hyperprior", "data.canvas=(1,2,3)", "--config.data.canvas is (1, 2, 3); it must be a whole"),
    ("hyperprior", "data.quality=200", "--config.data.quality is 200; it must be a whole number f"),
    ("hyperprior", "data.validation=0", "--config.data.validation is 0; it must be a whole numbe"),
    ("hyperprior", "data.name=nope", "unknown data set 'nope'; choose one of scenes, folder"),
    ("hyperprior", "qualities=(500,)", "a value of --config.qualities is 500; it must be a numbe"),
    ("hyperprior", "qualities=('a',)", "a value of --config.qualities is 'a'; it must be None, or"),
    ("hyperprior", "files.jpeg=(500,)", "a value of --config.files.jpeg is 500; it must be a whol"),
    ("hyperprior", "files.webp=(5.5,)", "a value of --config.files.webp is 5.5; it must be a whol"),
    ("hyperprior", "files.jpeg2000=(0,)", "a value of --config.files.jpeg2000 is 0; it must be a"),
    ("hyperprior", "codec_file.weights=int3", "--config.codec_file.weights is 'int3'; it must be"),
    ("jpeg_dct", "arms=('rgb',)", "--config.arms has 'rgb'; an arm is input-network, as 'rgb-50'"),
    ("jpeg_dct", "arms=('rgb-51',)", "seed0/rgb-51: task.network is '51'; it must be one of upsa"),
    ("jpeg_dct", "model.size=24", "--config.model.size is 24; views have sides of multiples of 16"),
    ("jpeg_dct", "data.coefficients=101", "--config.data.coefficients is '101'; it must be \"\", "),
    ("jpeg_dct", "data.crop=(2.0,1.0)", "--config.data.crop is (2.0, 1.0); it must be a least an"),
    ("jpeg_dct", "speed=-1", "--config.speed is -1; it must be a whole number of at least 1"),
    ("cresnet", "arms=('x51',)", "--config.arms has 'x51'; it may have p50, r50, r71, c39, c51"),
    (
        "cresnet",
        "noise=(0.0,)",
        "a value of --config.noise is 0.0; it must be a number above 0 and ",
    ),
    ("cresnet", "points=(1,)", "--config.points has 1; a point is (bits per pixel, channels)"),
    ("cresnet", "points=((0,4),)", "a value of --config.points is 0; it must be a number above 0"),
    ("cresnet", "code.centres=1", "--config.code.centres is 1; it must be a whole number from 2"),
    ("cresnet", "rate.size=20", "--config.rate.size is 20; the size of a view is a multiple of 8"),
    ("cresnet", "model.crop=(0,1)", "--config.model.crop is (0, 1); it must be a least and a larg"),
    ("omni_icm", "train.batch_size=7", "--config.stage1.queue is 64, which the batch size 7 does"),
    ("omni_icm", "stage1.temperature=0", "--config.stage1.temperature is 0.0; it must be a number"),
    ("omni_icm", "stage1.negatives=all", "--config.stage1.negatives is 'all'; it must be one of q"),
    ("omni_icm", "stage2.feature_weights=(1,)", "--config.stage2.feature_weights is (1,); it must"),
    ("omni_icm", "stage3.tasks.classify.steps=-1", "--config.stage3.tasks.classify.steps is -1"),
    ("omni_icm", "model.variant=19", "--config.model.variant is '19'; it must be one of 10, 18,"),
    ("omni_icm", "filter.name=omni_fliter", "--config.filter.name is 'omni_fliter'; it must be on"),
    ("omni_icm", "filter.widths=(8,8)", "--config.filter.widths is (8, 8); it must be a tuple of"),
    ("omni_icm", "train.rate_scaling=cube", "--config.train.rate_scaling is 'cube'; it must be o"),
    ("omni_icm", "codecs=/nowhere", "seed0/omni/classify-1 starts from /nowhere/seed0/omni/stage2"),
    ("yolov3", "model.size=32", "--config.model.size is 32; a detector sees whole images, so it m"),
    ("yolov3", "model.overlap=2.0", "--config.model.overlap is 2.0; it must be a number of at le"),
    ("yolov3", "model.limit=0", "--config.model.limit is 0; it must be a whole number of at least"),
    ("yolov3", "data.boxes=0", "--config.data.boxes is 0, but objects are learned from; say how"),
    ("yolov3", "weights.path=/no.weights", "--config.weights.path is '/no.weights', which is no f"),
    ("scalable", "model.size=48", "--config.model.size is 48; the detector takes sides that are m"),
    ("scalable", "model.codec.hypers=3", "--config.model.codec.hypers is 3; it must be one of 1,"),
    ("scalable", "train.plateau.patience=-1", "--config.train.plateau.patience is -1; it must be"),
    ("scalable", "detector.model.detector.name=yolo9", "unknown detector 'yolo9'; choose one of y"),
]


@pytest.mark.parametrize("name, field, expected", FIELDS, ids=lambda x: None if " " in x else x)
def test_a_field_that_cannot_be_used_is_named_as_it_was_given(
    tmp_path, capsys, name, field, expected
):
    more = ["--config.train.schedule=plateau"] if "plateau" in field else []
    given = [f"--config.{field}", *more, f"--workdir={tmp_path}"]
    line = command(capsys, f"{name}:tiny", *given)
    assert line.startswith(expected.format(root=ROOT))


FLAGS = {
    "--processes=2": "--processes and --process go with --coordinator=HOST:PORT, of process 0",
    "--process=1": "--processes and --process go with --coordinator=HOST:PORT, of process 0",
    "--coordinator=a:1 --processes=0": "flag --processes=0: 0 is not a positive integer",
    "--coordinator=a:1 --processes=2 --process=2": "--process=2: of 2 processes the last one is 1",
    "--only=zzz": "--only goes with --mode=plan alone",
    "--topology=cpu:2": "--topology goes with --mode=plan alone",
    "--shards=2": "--shards goes with --mode=code alone",
    "--mode=plan --only=zzz": "--only=zzz is the name of no run; names are seed0/mean_scale_hyp",
    "--mode=plan --topology=cpu:0": "'cpu:0' has 0 chips; give it 1 to 8,960",
    "--mode=plan --topology=cpu": "'cpu' has no shape; write cpu:8",
    "--mode=plan --topology=v9:2x2": "no topology 'v9:2x2'; write v5e:AxB",
    "--mode=code --quality=300": "flag --quality=300: 300.0 is not a number in the range [0, 100]",
    "--mode=code --split=test": "no split 'test'; choose one of train, validation",
    "--mode=code --codec=none.icmc": "cannot read the codec none.icmc: No such file or directory",
    "--mode=trian": "flag --mode=trian: value should be one of <train|report|plan|code>",
    "--onnly=zzz": "Unknown command line flag 'onnly'. Did you mean: only ?",
    "stray": "unexpected arguments: stray; settings are --config.x=...",
}


@pytest.mark.parametrize("given", FLAGS)
def test_a_flag_that_cannot_be_used(tmp_path, capsys, given):
    line = command(capsys, "hyperprior:tiny", *given.split(), f"--workdir={tmp_path}")
    assert line.startswith(FLAGS[given])


def pictures(*paths, side=32):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = RNG.integers(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path)


def by_class(root, train=("a", "b"), validation=("a", "b")):
    pictures(*(root / "train" / kind / "1.png" for kind in train))
    pictures(*(root / "val" / kind / "1.png" for kind in validation))


def test_data_that_cannot_be_scored_are_said_before_the_first_step(tmp_path, capsys):
    def said(root, config="jpeg_dct:tiny", name="folder"):
        data = f"--config.data.name={name}", f"--config.data.path={root}"
        return command(capsys, config, *data, f"--workdir={tmp_path / 'runs'}")

    by_class(one := tmp_path / "one", ("a",), ("a",))
    assert said(one) == f"seed0/rgb-26 tells classes apart, and {one} has 1; give it two or more"
    by_class(more := tmp_path / "more", validation=("a", "c"))
    assert said(more) == f"{more}: images in folders that are no class: c"
    by_class(lone := tmp_path / "lone", validation=())
    assert said(lone) == f"{lone} has no folder val/ beside the other; add it"
    (lone / "val").mkdir()
    assert said(lone).startswith(f"no images for validation in {lone}; expected class/image")
    pictures(*(tmp_path / "photos" / f"{number}.png" for number in range(2)))
    (tmp_path / "photos" / "train.txt").write_text("0.png\n1.png\n")
    (tmp_path / "photos" / "val.txt").write_text("\n")
    line = said(tmp_path / "photos", "hyperprior:tiny", "photos")
    assert line.startswith(f"no images for validation in {tmp_path / 'photos'}")
    (tmp_path / "photos" / "val.txt").unlink()
    (tmp_path / "photos" / "train.txt").unlink()
    line = said(tmp_path / "photos", "hyperprior:tiny", "photos")
    assert line.startswith(f"none of the 2 images in {tmp_path / 'photos'} is for ")
    line = said(more, "yolov3:tiny")
    assert line.startswith("seed0/detector needs objects of each image; the data set folder has ")


def coco(root, **categories):
    """A data set of one image in COCO's layout; categories of each split."""
    pictures(root / "images" / "1.png")
    for split, names in categories.items():
        image = dict(id=1, file_name="1.png", width=32, height=32)
        box = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 9])
        kinds = [dict(id=number, name=name) for number, name in enumerate(names, 1)]
        content = dict(images=[image], annotations=[box], categories=kinds)
        (root / f"{split}.json").write_text(json.dumps(content))
    return f"--config.data.path={root}"


def test_a_validation_class_that_training_lacks(tmp_path, capsys):
    where = coco(tmp_path / "coco", train=("cat", "dog"), val=("cat", "cow", "dog"))
    given = "--config.data.name=coco_json", where, f"--workdir={tmp_path / 'runs'}"
    line = command(capsys, "yolov3:tiny", *given)
    assert line.startswith(f"{tmp_path}/coco/val.json has classes that training lacks: cow; train")
    coco(tmp_path / "coco", val=("dog", "cat"))  # numbers would mean something else
    assert "val.json has other classes; training has 2" in command(capsys, "yolov3:tiny", *given)


def runs_of(name, scale="tiny", **changes):
    module = main.load_experiment(ROOT / "configs" / f"{name}.py")
    config = module.get_config(scale)
    config.update_from_flattened_dict(changes)
    return module.runs(config)


def test_formats_that_nothing_writes_are_named_once_and_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classical, "available", lambda kind: kind in ("jpeg", "webp"))
    monkeypatch.setattr("icm_jax.measure.ready.available", classical.available)
    (run,) = runs_of("hyperprior", **{"files.avif": (50, 60), "files.jxl": (50,)})
    check_ready([run], tmp_path)
    lines = [x for x in capsys.readouterr().err.splitlines() if "left out" in x]
    assert [line.split("left out: ")[1] for line in lines] == [
        "avif, jxl; nothing here writes them; pip install 'icm_jax[formats]' adds some"
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(codec_file=None), "'picture 0', but neither trains a codec"),
        (dict(evaluate=(Point("stream"),), needs=("mask",)), "needs a codec of one rate"),
        (dict(evaluate=(Point("stream"),)), "needs none of mask, objects, label"),
        (dict(evaluate=(Point("picture"),)), "evaluate.quality is None; it must be a number of"),
        (dict(evaluate=(Point("gif", 3),)), "by 'gif 3', which is none of stream, pixels"),
        (dict(evaluate=(Point("jpeg"),)), "evaluate.jpeg is None; it must be a whole number from"),
        (dict(labels=None), "is to be scored, but its field labels is None"),
        (
            dict(labels=Labels("image", "x", marker="?")),
            "labels.marker is '\\?'; it must be one",
        ),
        (dict(decode_once=True), "is to decode once, but no `start` of it has codec=True"),
        (
            dict(weights=("torch", "x.pt")),
            "weights.reader is 'torch'; it must be one of darknet, icmc, resnet",
        ),
        (dict(start=(Start("seed0/none"),)), "starts from .*none, where no run has finished"),
    ],
)
def test_points_and_starts_that_a_run_cannot_have(tmp_path, changes, message):
    (run,) = runs_of("hyperprior")
    with pytest.raises(IcmError, match=message):
        check_ready([dataclasses.replace(run, **changes)], tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="../run"), "the name of a folder below the work directory"),
        (dict(seed=2**32), "a whole number from 0 to 4294967295"),
        (dict(batch_size=True), "a whole number of at least 1"),
        (dict(log_every=1.5), "a whole number of at least 1"),
        (dict(keep_every=-1), "a whole number of at least 0"),
        (dict(ema=1), "a number of at least 0 and below 1"),
        (dict(needs=("labels",)), "a tuple of none or more, each one of label, mask, objects"),
        (dict(side=(0, 3)), "0, or a whole number of pixels or"),
        (dict(codec_file={"weight": "float16"}), "there are weights, licence, description"),
        (dict(codec_file={"licence": 3}), "text"),
        (dict(labels=Labels("image", "x", colour="red")), '"#rrggbb", or ""'),
        (dict(labels=Labels("", "x")), "text that is not empty"),
        (dict(data=dict(name="scenes", canvas=64, boxes=-1)), "a whole number of at least 0"),
        (dict(task=dict(name="detection", size=64)), "detector is missing"),
    ],
)
def test_a_run_of_ones_own_is_held_to_the_same(changes, message):
    with pytest.raises(FieldError) as raised:
        toy_run(**changes)
    assert message in str(raised.value) and str(raised.value).startswith(changes.get("name", "run"))


def test_a_file_of_ones_own_has_its_fields_named(tmp_path, capsys):
    """Made by `make_run` of a config that names things in its own way."""
    text = (ROOT / "tests" / "strangers" / "experiment.py").read_text()
    (tmp_path / "own.py").write_text(text.replace("learning_rate=1e-3", "learning_rate=-1e-3"))
    line = command(capsys, f"{tmp_path}/own.py", f"--workdir={tmp_path / 'runs'}")
    assert line == "--config.train.learning_rate is -0.001; it must be a number of at least 0"


def test_every_name_has_its_table():
    assert of_tasks.TASKS.keys() == tasks.TASKS.keys() - {"rotation"}
    assert of_codecs.DETECTORS.keys() == {n for n in yolo.DETECTORS if n.startswith("yolo")}
    for name, table in of_codecs.CODECS.items():
        arguments = inspect.signature(codecs.CODECS[name]).parameters
        assert set(table) == set(arguments) - {"detector"}
        for argument in table:
            assert table[argument].needed == (arguments[argument].default is inspect._empty)
    assert fields.RUN.keys() | {
        "task",
        "data",
        "optim",
        "labels",
        "start",
        "weights",
        "classes_of",
    } | {
        "evaluate",
        "codec_file",
    } == {field.name for field in dataclasses.fields(toy_run())}
    for name in optim.OPTIMISERS:
        run = toy_run(optim=dict(toy_run().optim, name=name))
        assert isinstance(
            optim.make_optimiser(run.optim, 8, 2), optax.GradientTransformationExtraArgs
        )


def started(tmp_path, run, **files):
    """A folder as a finished run leaves it; the config as `files` has it, or the run's."""
    folder = tmp_path / run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(files.get("config", to_json(run))))
    for name in (RECORDS, CODEC):
        (folder / name).write_text("old")
    (folder / DONE).write_text('{"step": 1, "metrics": {}}')
    return folder


BEFORE = dict(labels=Labels("image", "arm"), codec_file={"weights": "float32"}, side=2)
BEFORE |= dict(data=dict(canvas=4, validation=3), task=dict(least=0.1))
NOT_READ_BY_TRAINING = {
    "log_every": (dict(log_every=1), {RECORDS, CODEC}),
    "labels.title": (dict(labels=Labels("image", "arm", title="new")), {RECORDS, CODEC}),
    "evaluate": (dict(evaluate=(Point("picture"),)), {RECORDS, CODEC}),
    "labels.curve": (dict(labels=Labels("classify", "arm")), {CODEC}),
    "side": (dict(side=4), {CODEC}),
    "data.validation": (dict(data=dict(canvas=4, validation=9)), {CODEC}),
    "task.least": (dict(task=dict(least=0.2)), {CODEC}),
    "detector": (dict(detector="other"), {CODEC}),
    "codec_file": (dict(codec_file={"weights": "float16"}), set()),
    "licence": (dict(codec_file={"weights": "float32", "licence": "mine"}), set()),
}


@pytest.mark.parametrize("name", NOT_READ_BY_TRAINING)
def test_what_training_does_not_read_may_differ(tmp_path, name):
    """What depends on it is made anew; the run's training stays."""
    changes, kept = NOT_READ_BY_TRAINING[name]
    folder = started(tmp_path, toy_run(**BEFORE))
    run = toy_run(**(BEFORE | changes))
    claim(folder, run, writes=False)
    assert (folder / RECORDS).is_file()
    claim(folder, run)
    assert {p.name for p in folder.iterdir()} == {"config.json", DONE} | kept
    assert json.loads((folder / "config.json").read_text()) == to_json(run)


def test_what_training_reads_may_not_differ_and_all_of_it_is_named(tmp_path):
    folder = started(tmp_path, toy_run(**BEFORE))
    data = dict(canvas=8, validation=3)
    run = toy_run(**(BEFORE | dict(data=data, batch_size=4, seed=1, side=8)))
    with pytest.raises(IcmError) as raised:
        claim(folder, run)
    said = "batch_size was 2, is 4; data.canvas was 4, is 8; seed was 0, is 1; give these back"
    assert f"holds a run with another config: {said}" in str(raised.value)
    assert json.loads((folder / "config.json").read_text()) == to_json(toy_run(**BEFORE))


def test_a_work_directory_of_an_earlier_version_goes_on(tmp_path):
    """It lacks fields that have come since; another value of them than the default is refused."""
    (run,) = runs_of("hyperprior")
    earlier = to_json(run)
    for name in ("side", "detector", "decode_once", "keep_every"):
        del earlier[name]
    del earlier["optim"]["accumulate"], earlier["task"]["codec"]["last"], earlier["data"]["path"]
    folder = started(tmp_path, run, config=earlier)
    claim(folder, run)
    assert (folder / RECORDS).is_file() and json.loads(
        (folder / "config.json").read_text()
    ) == to_json(run)
    folder = started(tmp_path, run, config=earlier)
    (other,) = runs_of("hyperprior", **{"model.last": 3, "train.accumulate": 2})
    with pytest.raises(IcmError, match=r"accumulate was 1, is 2; task.codec.last was 5, is 3"):
        claim(folder, other)


def test_a_detector_that_is_asked_otherwise_has_its_codecs_scored_anew(tmp_path):
    detector, codec = runs_of("scalable")
    for run in (detector, codec):
        started(tmp_path, run)
    runs = runs_of("scalable", **{"detector.model.limit": 7})
    check_ready(runs, tmp_path)
    assert not (tmp_path / codec.name / RECORDS).exists()
    assert not (tmp_path / codec.name / CODEC).exists()
    assert (tmp_path / codec.name / DONE).is_file()


def test_the_data_of_a_finished_run_are_not_opened(tmp_path):
    """A report of what was trained elsewhere needs no data, as long as nothing is to be scored."""
    (run,) = runs_of("hyperprior")
    folder = started(tmp_path, run)
    asked = [{"kind": "x", "asked": dataclasses.asdict(point)} for point in run.evaluate]
    (folder / RECORDS).write_text(json.dumps(asked))
    check_ready([run], tmp_path)
    assert not (tmp_path / "cache").exists()
    changed = dataclasses.replace(run, evaluate=(*run.evaluate, Point("jpeg", 50)))
    check_ready([changed], tmp_path)
    assert (tmp_path / "cache").is_dir()


def test_scenes_of_another_validation_split_have_the_same_training_images(tmp_path):
    from icm_jax.data import open_source

    read = [
        [open_source(dict(name="scenes", train=5, validation=count, size=32), "train").load(n)]
        for count in (1, 3)
        for n in range(5)
    ]
    assert [e[0]["image"] for e in read[:5]] == [e[0]["image"] for e in read[5:]]
