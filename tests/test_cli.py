"""The `icm` command as a user types it: files, streams, exit codes, and what its errors say."""

import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import shtab
from PIL import Image

import icm_jax
from icm_jax import cli
from icm_jax.codecs import bitstream, filter_codec, image_codec, model_file
from icm_jax.data.images import read_image
from icm_jax.measure import classical, rate_distortion

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A frozen codec with qualities, in a file."""
    path = tmp_path_factory.mktemp("model") / "model.icmc"
    built = image_codec("mean_scale_hyperprior", 6, 8, levels=3)
    sample = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    variables = jax.jit(built.init)(jax.random.key(1), sample)
    model_file.save(path, bitstream.freeze(built, variables, sample))
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Two small images, colour and grey."""
    Image.fromarray(RNG.integers(0, 256, (20, 28, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(RNG.integers(0, 256, (20, 28)).astype(np.uint8)).save(tmp_path / "b.png")
    return tmp_path


def icm(*arguments, capsys, standard_input=b"", monkeypatch=None):
    """(exit code, standard output as bytes, standard error) of the command."""
    out = types.SimpleNamespace(buffer=io.BytesIO())
    if monkeypatch:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(standard_input)))
        out.write, out.flush = (lambda text: out.buffer.write(text.encode())), (lambda: None)
        monkeypatch.setattr(sys, "stdout", out)
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, out.buffer.getvalue() or captured.out.encode(), captured.err


def test_files_there_and_back(model, photos, capsys):
    both = photos / "a.png", photos / "b.png"
    out = photos / "coded"
    code, _, errors = icm("compress", *both, "-m", model, "-q", 25.5, "-o", out, capsys=capsys)
    assert (code, errors) == (0, "")
    coded = sorted(out.iterdir())
    assert [path.name for path in coded] == ["a.icm", "b.icm"]
    assert icm("decompress", *coded, "-m", model, "-o", f"{photos}/back/", capsys=capsys)[0] == 0
    loaded = icm_jax.load(model)
    for name, shape in (("a", (20, 28, 3)), ("b", (20, 28))):
        given = np.asarray(Image.open(photos / "back" / f"{name}.png"))
        assert given.shape == shape
        np.testing.assert_array_equal(given, loaded.decompress((out / f"{name}.icm").read_bytes()))
    assert icm("verify", *coded, "-m", model, capsys=capsys)[0] == 0
    code, text, _ = icm("info", "--json", *coded, capsys=capsys)
    facts = [json.loads(line) for line in text.splitlines()]
    assert [f["channels"] for f in facts] == [3, 1] and facts[0]["quality"] == 25.5
    assert facts[0]["bytes"] == coded[0].stat().st_size and facts[0]["width"] == 28
    assert facts[0]["model"] == loaded.fingerprint.hex()


def test_streams_equal_files(model, photos, capsys, monkeypatch):
    image = (photos / "a.png").read_bytes()
    expected = icm_jax.load(model).compress(np.asarray(Image.open(photos / "a.png")))
    code, coded, _ = icm(
        "compress", "-", "-m", model, capsys=capsys, standard_input=image, monkeypatch=monkeypatch
    )
    assert code == 0 and coded == expected
    code, back, _ = icm(
        "decompress", "-", "-m", model, capsys=capsys, standard_input=coded, monkeypatch=monkeypatch
    )
    assert code == 0 and Image.open(io.BytesIO(back)).size == (28, 20)


def test_nothing_is_overwritten_unasked_and_failures_are_counted(model, photos, capsys):
    image = photos / "a.png"
    assert icm("compress", image, "-m", model, capsys=capsys)[0] == 0
    before = (photos / "a.icm").read_bytes()
    code, _, errors = icm("compress", image, "-m", model, "-q", 90, capsys=capsys)
    assert code == 1 and "--force overwrites it" in errors
    assert (photos / "a.icm").read_bytes() == before
    (photos / "broken.png").write_bytes(image.read_bytes()[:60])
    code, _, errors = icm(
        "compress", photos / "broken.png", image, "-m", model, "-q", 90, "-f", "-o", photos,
        capsys=capsys,
    )  # fmt: skip
    assert code == 1 and errors.count("\n") == 1 and "broken.png" in errors
    assert (photos / "a.icm").read_bytes() != before
    assert not list(photos.glob("*.tmp")) and not (photos / "broken.icm").exists()


def test_folders_keep_their_structure_and_threads_their_results(model, photos, capsys):
    folder = photos / "album"
    for name in ("x.png", "day 1/x.png", "day 1/two.PNG", "day 2/deep/x.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = RNG.integers(0, 256, (*RNG.integers(20, 90, 2), 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "day 1" / "notes.txt").write_text("no picture")
    (folder / "day 1" / "broken.png").write_bytes(b"no picture")
    for jobs in (1, 4):
        code, _, errors = icm(
            "compress", folder, "-r", "-j", jobs, "-m", model, "-o", photos / f"out{jobs}",
            capsys=capsys,
        )  # fmt: skip
        assert code == 1 and errors.count("\n") == 1 and "broken.png" in errors
    files = [sorted(p.relative_to(out) for p in out.rglob("*.*")) for out in photos.glob("out?")]
    kept = ["day 1/two.icm", "day 1/x.icm", "day 2/deep/x.icm", "x.icm"]
    assert files == [[pathlib.Path(name) for name in kept]] * 2
    for name in kept:
        assert (photos / "out1" / name).read_bytes() == (photos / "out4" / name).read_bytes()
    out = photos / "back"
    assert icm("decompress", "-r", photos / "out4", "-m", model, "-o", out, capsys=capsys)[0] == 0
    assert sorted(p.relative_to(out) for p in out.rglob("*.png")) == sorted(
        pathlib.Path(name).with_suffix(".png") for name in kept
    )
    code, _, errors = icm("compress", folder, "-m", model, capsys=capsys)
    assert code == 2 and "is a folder; --recursive" in errors
    code, _, errors = icm("decompress", folder, "-r", "-m", model, capsys=capsys)
    assert code == 2 and "no files .icm in" in errors


def test_two_pictures_for_one_file_are_an_error(model, photos, capsys):
    Image.fromarray(RNG.integers(0, 256, (20, 28, 3)).astype(np.uint8)).save(photos / "a.jpg")
    code, _, errors = icm(
        "compress", photos / "a.png", photos / "a.jpg", "-f", "-m", model, capsys=capsys
    )
    assert code == 2 and "2 files would be written to" in errors and "a.icm" in errors
    assert not (photos / "a.icm").exists()


def test_completion_scripts_name_files(capsys):
    assert set(cli.SHELLS) == set(shtab.SUPPORTED_SHELLS)
    code, script, _ = icm("completion", "bash", capsys=capsys)
    assert code == 0 and shtab.FILE["bash"].encode() in script


@pytest.mark.parametrize(
    "command, banned",
    [
        (["--help"], ("numpy", "shtab", "jax", "tqdm", "PIL")),
        (["info", "a.icm"], ("numpy", "jax", "numba", "PIL")),
        (["info", "model.icmc"], ("jax", "flax", "numba", "PIL")),
        (["verify", "a.icm"], ("PIL", "simplejpeg", "tqdm", "matplotlib", "grain", "optax")),
    ],
)
def test_commands_import_what_they_need(model, photos, capsys, command, banned):
    assert icm("compress", photos / "a.png", "-m", model, capsys=capsys)[0] == 0
    (photos / "model.icmc").write_bytes(pathlib.Path(model).read_bytes())
    if command[0] == "verify":
        command = [*command, "-m", "model.icmc"]
    script = (
        "import sys; from icm_jax import cli\n"
        f"try: code = cli.main({command!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        f"assert not code; print('found', [name for name in {banned!r} if name in sys.modules])"
    )
    given = dict(os.environ, PYTHONPATH=str(pathlib.Path(icm_jax.__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=photos, env=given
    )
    assert done.returncode == 0 and "found []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["compress", "absent.png"], 1, "cannot read absent.png: No such file"),
        (["compress", "{a}", "-q", "101"], 2, "not a quality from 0 to 100"),
        (["compress", "{a}", "-q", "best"], 2, "best is not a quality from 0 to 100"),
        (["decompress", "{a}"], 1, "a.png would replace itself; expected .icm, or -o FILE"),
        (["compress", "{a}", "{b}", "-o", "one.icm"], 2, "give -o a folder"),
        (["compress", "{a}", "-", "-o", "-"], 2, "one file at a time"),
        (["decompress", "{a}", "-o", "{empty}/x.png"], 1, "not an .icm file"),
        (["eval", "{empty}"], 2, "no files .jpg, .jpeg"),
        (
            ["eval", "{a}", "--rivals", "jpeg,gif"],
            2,
            "cannot write 'gif' here; formats that can be",
        ),
        (["eval", "{a}", "--jobs", "0"], 2, "0 is not a whole number from 1 on"),
    ],
)
def test_wrong_use_is_one_clear_line(model, photos, capsys, arguments, code, message):
    (photos / "empty").mkdir()
    names = {"a": photos / "a.png", "b": photos / "b.png", "empty": photos / "empty"}
    arguments = [argument.format(**names) for argument in arguments]
    given, _, errors = icm(*arguments, "-m", model, capsys=capsys)
    assert given == code and message in errors.splitlines()[-1]


def test_models_that_cannot_serve_are_refused(tmp_path, photos, capsys):
    built = filter_codec("18", 8, 6, (4, 8, 8))
    sample = np.zeros((1, 32, 32, 3), np.uint8)
    variables = jax.jit(built.init)(jax.random.key(1), sample)
    model_file.save(tmp_path / "features.icmc", bitstream.freeze(built, variables, sample))
    for name, message in (
        ("features.icmc", "codes no images"),
        ("absent", "cannot read the codec"),
    ):
        code, _, errors = icm("compress", photos / "a.png", "-m", tmp_path / name, capsys=capsys)
        assert code == 2 and message in errors


def test_eval_measures_what_was_written(model, photos, capsys):
    Image.fromarray(RNG.integers(0, 256, (180, 176, 3)).astype(np.uint8)).save(photos / "c.png")
    out = photos / "results"
    code, text, _ = icm("eval", photos, "-m", model, "-q", 0, 100, "-o", out, capsys=capsys)
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    rows = [row for row in results["images"] if row["codec"] == "icm"]
    assert len(rows) == 6
    for row in rows:
        image = read_image(pathlib.Path(row["image"]).read_bytes(), row["image"])
        data = icm_jax.load(model).compress(image, row["quality"])
        assert row["bytes"] == len(data)
        assert row["bpp"] == pytest.approx(8 * len(data) / image[..., :1].size if image.ndim == 3
                                           else 8 * len(data) / image.size)  # fmt: skip
        assert (row["ms_ssim"] is None) == (image.shape[0] < 176)
    formats = {name for name in classical.FORMATS if classical.available(name)} - {"vvc"}
    assert {"jpeg", "webp"} <= formats
    assert {row["codec"] for row in results["means"]} == {"icm", *formats}
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len((out / "results.csv").read_text().splitlines()) == 1 + len(results["images"])
    assert "bpp_estimated" in text.decode() and "BD-rate against jpeg, 0.15 to 1" in text.decode()


def single_rate(folder, seed: int) -> str:
    built = image_codec("factorised", 6, 8)
    sample = RNG.integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    variables = jax.jit(built.init)(jax.random.key(seed), sample)
    path = folder / f"rate{seed}.icmc"
    model_file.save(path, bitstream.freeze(built, variables, sample))
    return str(path)


def test_models_of_one_rate_make_one_curve(model, photos, capsys):
    names = [single_rate(photos, seed) for seed in (1, 2)]
    given = [part for name in (*names, model) for part in ("-m", name)]
    arguments = ["eval", photos / "a.png", *given, "-q", 40, "--rivals", "jpeg", "--jobs", 1]
    code, text, _ = icm(*arguments, "-o", photos / "out", capsys=capsys)
    assert code == 0
    means = json.loads((photos / "out/results.json").read_text())["means"]
    found = [(row["codec"], row["model"], row["quality"]) for row in means if row["model"]]
    assert found == [("icm", "rate1", None), ("icm", "rate2", None), ("model", "model", 40)]
    assert "BD-rate of model against icm" in text.decode()
    code, _, errors = icm(*arguments, "--effort", 0, 2, capsys=capsys)
    assert code == 2 and "a model of one rate takes no --effort" in errors


def test_each_effort_is_a_curve(model, photos, capsys, monkeypatch):
    own, efforts = icm_jax.load(model), []
    monkeypatch.setattr(
        type(own),
        "compress",
        lambda codec, image, quality, effort=0: (
            efforts.append(effort) or bitstream.encode(codec, image[None], quality=quality)[0]
        ),
    )
    arguments = ["eval", photos / "a.png", "-m", model, "-q", 40, "-e", 0, 2, "--rivals", "none"]
    code, text, _ = icm(*arguments, capsys=capsys)
    assert code == 0 and efforts == [0, 2]
    assert "BD-rate of icm effort 2 against icm" in text.decode()


def test_a_stopped_eval_has_what_it_measured(model, photos, capsys, monkeypatch):
    whole = rate_distortion.rows_of

    def stops(*given):
        yield from itertools.islice(whole(*given), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(rate_distortion, "rows_of", stops)
    arguments = ["eval", photos, "-m", model, "-q", 0, 100, "--rivals", "jpeg", "--jobs", 1]
    code, text, errors = icm(*arguments, "-o", photos / "out", capsys=capsys)
    assert code == 130 and "stopped after 3 of 18 points; means are of these" in errors
    assert len((photos / "out/results.csv").read_text().splitlines()) == 4
    assert text.decode().count("icm") >= 2


def test_what_cannot_be_measured_is_named_and_the_rest_goes_on(model, photos, capsys):
    (photos / "broken.png").write_bytes(b"no picture")
    arguments = ["eval", photos, photos / "absent.png", "-m", model, "-q", 50]
    code, text, errors = icm(*arguments, "--rivals", "none", capsys=capsys)
    assert code == 1 and "broken.png" in errors and "cannot read" in errors
    assert text.decode().splitlines()[1].split()[:4] == ["icm", "model", "50.0", "2"]


def test_orientation_transparency_and_depth(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_image((tmp_path / "turned.png").read_bytes(), "turned")
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    clear.save(tmp_path / "clear.png")
    assert (read_image((tmp_path / "clear.png").read_bytes(), "clear") == 255).all()
    deep = Image.fromarray(np.full((1, 1), 0x1234, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert read_image((tmp_path / "deep.png").read_bytes(), "deep") == 0x12


def test_layers_and_codec_files(model, photos, capsys):
    assert icm("compress", photos / "a.png", "-m", model, capsys=capsys)[0] == 0
    coded = photos / "a.icm"
    for command in (["verify"], ["decompress", "-f"]):
        code, _, errors = icm(*command, coded, "-m", model, "--layers", 2, capsys=capsys)
        assert code == 1 and "2 layers asked for; the file has 1" in errors
        assert icm(*command, coded, "-m", model, "--layers", 1, capsys=capsys)[0] == 0
    code, text, _ = icm("info", "--json", model, capsys=capsys)
    facts = json.loads(text)
    assert code == 0 and facts["fingerprint"] == icm_jax.load(model).fingerprint.hex()
    assert facts["codec"][0] == "image" and facts["version"] == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell, capsys):
    code, text, _ = icm("completion", shell, capsys=capsys)
    assert code == 0 and b"decompress" in text and b"quality" in text
    if shell == "bash":
        script = text + b"\nCOMP_WORDS=(icm deco); COMP_CWORD=1; _shtab_icm; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash"], input=script, capture_output=True, check=True)
        assert done.stdout.split() == [b"decompress"]


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in "compress decompress info verify eval import completion".split())],
)
def test_help_is_there(command, capsys):
    code, text, _ = icm(*command, "--help", capsys=capsys)
    assert code == 0 and b"usage: icm" in text
