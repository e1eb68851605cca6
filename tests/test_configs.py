"""The files of experiments: how they are found and loaded, wherever they lie."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from icm_jax import main
from icm_jax.engine import run
from icm_jax.errors import IcmError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SINGLE = """
import ml_collections

def get_config(arg="first"):
    return ml_collections.ConfigDict(dict(name="single", arg=arg, number=1))
"""
IN_PACKAGE = "from configs import common\n" + SINGLE.replace("number=1", "number=common.number")
PARSE = """
import sys
from absl import flags
from icm_jax import main
from icm_jax.engine import run
from icm_jax.errors import IcmError
flags.FLAGS(sys.argv)
print(main.CONFIG.value.name, main.CONFIG.value.get("arg"), main.CONFIG.value.get("number"))
"""


@pytest.fixture
def folders(tmp_path):
    """An empty folder, one with a single file, one with another package named configs; a clone of
    this repository's configs; and the installed package, without the folder beside it."""
    for name in ("empty", "single", "project/configs", "clone", "site"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "single" / "mine.py").write_text(SINGLE)
    (tmp_path / "single" / "strayed.py").write_text(IN_PACKAGE)
    package = tmp_path / "project" / "configs"
    (package / "__init__.py").write_text("")
    (package / "common.py").write_text("number = 7")
    (package / "mine.py").write_text(IN_PACKAGE)
    (tmp_path / "clone" / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "site" / "icm_jax").symlink_to(ROOT / "icm_jax")
    return tmp_path


def parsed(folders, cwd, *arguments, before=""):
    environment = dict(os.environ, PYTHONPATH=str(folders / "site"), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-W", "ignore", "-c", before + PARSE, *arguments]
    options = dict(capture_output=True, text=True, cwd=folders / cwd, env=environment)
    done = subprocess.run(command, check=False, **options)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "cwd, arguments, printed",
    [
        ("clone", ["--config=configs/scalable.py:tiny"], "scalable None None"),
        ("empty", ["--config=../clone/configs/scalable.py"], "scalable None None"),
        ("project", ["--config", "../clone/configs/omni_icm.py:study"], "omni_icm None None"),
        ("empty", ["--config=../single/mine.py"], "single first 1"),
        ("empty", ["--config=../single/mine.py:second", "--config.number=2"], "single second 2"),
        ("project", ["--config=configs/mine.py"], "single first 7"),
        ("clone", ["--config=../project/configs/mine.py"], "single first 7"),
    ],
)
def test_a_config_is_found_from_anywhere(folders, cwd, arguments, printed):
    assert parsed(folders, cwd, *arguments) == printed


def test_what_cannot_be_found_is_named(folders):
    assert "No module named 'configs'" in parsed(folders, "empty", "--config=../single/strayed.py")
    text = parsed(folders, "empty", "--config=../clone/configs/yolov3.py:huge")
    assert "no scale 'huge'; choose one of demo, photos, tiny-coco, coco, tiny" in text


def test_two_packages_of_one_name_are_refused(folders):
    text = parsed(
        folders, "project", "--config=../clone/configs/yolov3.py", before="import configs"
    )
    assert "give the folder another name" in text


CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if "def runs(" in p.read_text())
TOLD = ("Command", "Takes", "On", "Expect")


def claims(text):
    """The four lines that a config says of each of its scales: [{"Command": ..., ...}, ...]."""
    found = []
    for block in text.split("\n\n"):
        if block.lstrip().startswith("Command:"):
            found.append(dict(re.findall(r"^    (\w+): +(.+(?:\n {13}.*)*)", block, re.M)))
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_command_time_hardware_and_number(path):
    experiment = main.load_experiment(path)
    told = claims(experiment.__doc__)
    assert all(tuple(claim) == TOLD for claim in told)
    scales = re.search(r"= common.scales\((.*)\)", path.read_text()).group(1).split(", ")
    named = [main.split_scale(shlex.split(claim["Command"])[3])[1] or scales[0] for claim in told]
    assert named == [scale.replace("_", "-") for scale in scales if scale != "tiny"]


def commands():
    """Every command of the documentation that runs an experiment, as (file, arguments)."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
    texts = [(path.name, path.read_text()) for path in paths]
    texts += [(path.name, main.load_experiment(path).__doc__) for path in CONFIGS]
    for name, text in texts:
        joined = re.sub(r"\\\\?\n +", " ", text)
        for line in re.findall(r"python -m icm_jax.main (--config=configs/\w+\.py[^`\n]*)", joined):
            yield name, shlex.split(line, comments=True)


@pytest.mark.parametrize("file, arguments", list(commands()))
def test_a_command_of_the_documentation_fits_its_config(file, arguments):
    config, *rest = arguments
    argv = ["main", f"--config={ROOT / config.removeprefix('--config=')}", *rest]
    known = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=known, sys_argv=argv)
    known["config"].parser = main.ExperimentParser()
    for name in ("workdir", "mode", "topology", "only", "compare"):
        flags.DEFINE_string(name, None, "", flag_values=known)
    known(argv)
    assert main.load_experiment(ROOT / main.split_scale(config[9:])[0]).runs(known.config)


def loaded(*argv):
    """(the experiment, its config) of a command's arguments."""
    known = flags.FlagValues()
    argv = ["main", *argv]
    config_flags.DEFINE_config_file("config", None, flag_values=known, sys_argv=argv)
    known["config"].parser = main.ExperimentParser()
    known(argv)
    return main.load_experiment(ROOT / "configs" / "scalable.py"), known.config


def test_codec_detector_and_pictures_have_data_of_their_own():
    """Each set keeps its own fields; the detector's are what a second set is seen as."""
    experiment, config = loaded(
        f"--config={ROOT}/configs/scalable.py:tiny",
        *("--config.data.name=coco_json", "--config.data.path=street"),
        *("--config.data.letterbox=centre", "--config.picture_data.name=photos"),
        *("--config.codec_data.name=vimeo90k", "--config.codec_data.path=vimeo"),
        *("--config.codec_data.canvas=128", "--config.picture_data.path=kodak"),
        *("--config.picture_data.whole=True", "--config.second_data.name=coco_json"),
        *("--config.second_data.path=more", "--config.second_data.annotations=train.json"),
    )
    found, codec = experiment.runs(config)
    street = dict(name="coco_json", path="street", canvas=64, boxes=4, letterbox="centre")
    assert found.data.to_dict() == street and found.classes_of is None
    assert codec.data.to_dict() == dict(name="vimeo90k", path="vimeo", canvas=128)
    assert codec.classes_of.to_dict() == street
    more = street | dict(path="more", annotations="train.json")
    kodak = dict(name="photos", path="kodak", whole=True)
    asked = [(point.kind, point.data) for point in codec.evaluate]
    assert asked[:3] == [("detect", None), ("picture", kodak), ("detect", more)]
    assert {kind: data for kind, data in asked[3:]} == {"jpeg": kodak, "webp": kodak}
    assert found.evaluate[-1].data == more
    again = run.from_json(run.to_json(codec))
    assert again.evaluate == codec.evaluate and run.to_json(again) == run.to_json(codec)
    assert str(again.evaluate[2]) == "detect on more, train.json"


def test_without_other_data_all_is_as_before():
    experiment, config = loaded(f"--config={ROOT}/configs/scalable.py:tiny")
    found, codec = experiment.runs(config)
    assert codec.data.to_dict() == found.data.to_dict() | {"boxes": 0}
    assert codec.classes_of is None and not any(point.data for point in codec.evaluate)


def test_a_kind_may_have_sizes_of_its_own_and_names_its_arm():
    kinds = "('disentangled',3,5,2),('split',3,5,1),('split',3,5,2),'residual'"
    experiment, config = loaded(
        f"--config={ROOT}/configs/scalable.py:tiny", f"--config.model.kinds=({kinds})"
    )
    _, *codecs = experiment.runs(config)
    arms = [codec.labels.arm for codec in codecs]
    assert arms == ["disentangled-3-5-2", "split-3-5-1", "split-3-5-2", "residual"]
    assert [codec.name for codec in codecs] == [f"seed0/{arm}-0.01" for arm in arms]
    assert codecs[1].task.codec.base == 3 and codecs[1].task.codec.hypers == 1
    assert codecs[3].task.codec.base == 4  # of model.codec
    titles = [codec.labels.title for codec in codecs]
    assert titles[1].endswith("3 + 5 channels, one hyperprior for both")
    assert titles[3] == "feature, then residual (SSSIC), a hyperprior each"
    assert len({codec.labels.colour for codec in codecs}) == 4
    assert [codec.labels.reference for codec in codecs] == [True, False, False, False]
    with config.unlocked():
        config.model.kinds = (("split", 3, 5),)
    with pytest.raises(IcmError, match="it must be a name, or"):
        experiment.runs(config)
