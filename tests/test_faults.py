"""The command on a damaged work directory: benchmarks/faults.py with a few fixed faults."""

import importlib.util
import json
import pathlib
import shutil

import jax
import pytest
from absl import logging

from icm_jax.errors import IcmError

# optax's and orbax's own code neither keeps to strict promotion nor is free of deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")
BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "faults.py"
PLACE = "seed0/factorised/"


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("faults", BENCHMARK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    verbosity = logging.get_verbosity()
    module.quiet()
    module.keep_programs(tmp_path_factory.mktemp("compiled"))
    yield module
    module.keep_programs(None)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def prepared(faults, tmp_path_factory):
    """(folder with the work directories `peace` and `stopped`, what the former ended in)."""
    folder = tmp_path_factory.mktemp("faults")
    return folder, faults.prepare(folder)


def altered(path):
    """Another last digit of some number."""
    text = path.read_text()
    number = max(n for n, letter in enumerate(text) if letter.isdigit() and letter != "0")
    path.write_text(text[:number] + str(int(text[number]) - 1) + text[number + 1 :])


def newest(path):
    """One bit of the largest file below a folder."""
    file = max(path.rglob("*"), key=lambda found: found.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


SAME, REFUSED = "same, one line", "refused, one line"
CASES = {
    "a bit of the newest checkpoint": (
        "stopped",
        "checkpoints/4",
        newest,
        SAME,
        f"damaged checkpoints of {PLACE[:-1]} are passed over (4: ",
    ),
    "lines of the log": (
        "stopped",
        "metrics.jsonl",
        lambda path: path.write_bytes(path.read_bytes().replace(b'"step": 2,', b'"step": \0,')),
        SAME,
        f"{PLACE}metrics.jsonl: 1 of 4 lines are damaged and left out",
    ),
    "the config": (
        "stopped",
        "config.json",
        lambda path: path.write_bytes(b""),
        REFUSED,
        f"cannot read {PLACE}config.json: it is empty; put back a copy; or, if it is still",
    ),
    "done.json": (
        "peace",
        "done.json",
        altered,
        SAME,
        f"{PLACE[:-1]} is finished anew from its newest checkpoint: {PLACE}done.json is damaged",
    ),
    "the codec": (
        "peace",
        "codec.icmc",
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        SAME,
        f"{PLACE[:-1]} is finished anew from its newest checkpoint: {PLACE}codec.icmc is not a ",
    ),
    "the scores": (
        "peace",
        "records.json",
        altered,
        SAME,
        f"{PLACE[:-1]} is scored anew: {PLACE}records.json is damaged (",
    ),
    "all checkpoints": (
        "stopped",
        "checkpoints",
        lambda path: [newest(step) for step in path.iterdir()],
        REFUSED,
        f"no checkpoint of {PLACE[:-1]} is whole (4: ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_run_ends_as_the_undisturbed_one_or_says_why_not(faults, prepared, case):
    state, name, damage, kind, said = CASES[case]
    folder, expected = prepared
    workdir = shutil.copytree(folder / state, folder / "disturbed")
    damage(workdir / PLACE / name)
    outcome = faults.again(workdir, expected)
    shutil.rmtree(workdir)
    assert (outcome.kind, outcome.said[: len(said)]) == (kind, said)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_work_directory_that_is_none_is_named(faults, tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(IcmError, match=r"^cannot make the folder .*file.*; choose another --workd"):
        faults.train(tmp_path / "file" / below)


def test_a_report_on_damaged_scores_says_what_to_do(faults, prepared):
    folder, _ = prepared
    workdir = shutil.copytree(folder / "peace", folder / "damaged scores")
    kept = workdir / PLACE / "records.json"
    for content in ("", "[1]", json.dumps({}), "[{}]"):
        kept.write_text(content)
        with pytest.raises(IcmError, match=r"records\.json.*without --mode=report, scores it anew"):
            faults.train(workdir, train=False)
