"""The files of experiments: how they are found and loaded, wherever they lie."""

import os
import pathlib
import subprocess
import sys

import pytest

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
    assert "no scale 'huge'; choose one of demo, photos, coco, tiny" in text


def test_two_packages_of_one_name_are_refused(folders):
    text = parsed(
        folders, "project", "--config=../clone/configs/yolov3.py", before="import configs"
    )
    assert "give the folder another name" in text
