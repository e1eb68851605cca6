"""Damaged, incomplete, missing and foreign checkpoints and files of a run: what each is told."""

import shutil
import subprocess

import jax
import numpy as np
import pytest
from test_train import toy_fit
from toy import toy, toy_run

from icm_jax.engine import checkpoint, digests, train
from icm_jax.errors import IcmError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a run with checkpoints 6 and 8, its last state)."""
    folder = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        state, step = toy_fit(folder, toy_run(), toy())
    assert step == 8
    return folder, jax.device_get(state)


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def restored(folder):
    with checkpoint.manager(folder) as checkpoints:
        return train.make_state(train.prepare(toy_run(), toy()), checkpoints)


def files_of(folder, step):
    item = folder / "checkpoints" / str(step)
    return sorted(path for path in item.rglob("*") if path.is_file())


def flip(path, bit=None):
    content = bytearray(path.read_bytes())
    bit = 8 * (len(content) // 2) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def largest(folder, step):
    return max(files_of(folder, step), key=lambda path: path.stat().st_size)


DAMAGES = {
    "bit": lambda folder: flip(largest(folder, 8)),
    "cut": lambda folder: largest(folder, 8).write_bytes(b"half"),
    "empty": lambda folder: largest(folder, 8).write_bytes(b""),
    "missing": lambda folder: largest(folder, 8).unlink(),
    "description": lambda folder: flip(folder / "checkpoints/8/default/_METADATA"),
    "digests empty": lambda folder: (folder / "checkpoints/8/default/SHA256SUMS").write_text(""),
    "digests cut": lambda folder: cut(folder / "checkpoints/8/default/SHA256SUMS"),
    "digests not text": lambda folder: (folder / "checkpoints/8/default/SHA256SUMS").write_bytes(
        b"\xff" * 80
    ),
    "no item": lambda folder: shutil.rmtree(folder / "checkpoints/8/default"),
    "all zero": lambda folder: [
        path.write_bytes(bytes(path.stat().st_size)) for path in files_of(folder, 8)
    ],
}


def cut(path):
    """To whole lines: what is left looks like digests."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_in_one_line(folder, finished, damage, capfd):
    DAMAGES[damage](folder)
    state, step = restored(folder)
    printed = capfd.readouterr().err
    assert step == 6 and len(printed.splitlines()) == 1
    assert printed.startswith(f"damaged checkpoints of {folder} are passed over (8: ")
    assert printed.endswith("and kept as damaged-8; it goes on from step 6\n")
    assert (folder / "damaged-8").is_dir() and not (folder / "checkpoints" / "8").exists()
    state, step = toy_fit(folder, toy_run(), toy())  # and 8 is written anew
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), finished[1])


def test_every_bit_of_a_checkpoint_counts(folder):
    """Of every file that has digests; the others say when it was written, not what."""
    rng = np.random.default_rng(0)
    item = folder / "checkpoints" / "8" / "default"
    assert digests.damage(item) == ""
    for path in files_of(folder, 8):
        if not path.is_relative_to(item) or path.name == "commit_success.txt":
            continue
        whole = path.read_bytes()
        for bit in rng.integers(0, 8 * len(whole), 10):
            flip(path, bit)
            assert digests.damage(item), (path, bit)
            path.write_bytes(whole)
    assert digests.damage(item) == ""


def test_coreutils_check_the_digests(folder):
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    if shutil.which(check[0]) is None:
        pytest.skip("no sha256sum here")
    place = folder / "checkpoints" / "8" / "default"
    assert subprocess.run(check, cwd=place, check=False).returncode == 0
    flip(largest(folder, 8))
    assert subprocess.run(check, cwd=place, capture_output=True, check=False).returncode == 1


def test_where_no_checkpoint_is_whole_nothing_is_lost(folder):
    for step in (6, 8):
        flip(largest(folder, step))
    before = sorted(folder.rglob("*"))
    for _ in range(2):  # it says so again
        with pytest.raises(IcmError, match=r"no checkpoint of .*run is whole \(8: .* is not what "):
            restored(folder)
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree(folder / "checkpoints")
    assert toy_fit(folder, toy_run(), toy())[1] == 8


def test_a_checkpoint_without_digests_is_restored_with_a_line(folder, finished, capfd):
    for step in (6, 8):
        (folder / "checkpoints" / str(step) / "default" / digests.SUMS).unlink()
    state, step = restored(folder)
    (line,) = capfd.readouterr().err.splitlines()
    assert step == 8 and line.startswith(f"checkpoint 8 of {folder} has no digests")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), finished[1])
    (folder / "checkpoints" / "8" / "default" / "manifest.ocdbt").write_bytes(b"")
    assert restored(folder)[1] == 6
    assert "passed over (8: " in capfd.readouterr().err


def test_a_whole_checkpoint_of_other_arrays_is_not_called_damaged(folder):
    with checkpoint.manager(folder) as checkpoints:
        other = {"params": jax.ShapeDtypeStruct((3,), np.float32)}
        with pytest.raises(IcmError, match=r"checkpoint 8 of .* is whole, but not of this run"):
            checkpoint.restore_newest(checkpoints, other)
    assert restored(folder)[1] == 8


def test_what_a_kill_while_saving_leaves_is_no_checkpoint(folder):
    """Orbax writes to a folder of another name; the digests are the last file before it gets its
    own."""
    shutil.copytree(folder / "checkpoints" / "8", folder / "checkpoints" / "9.orbax-checkpoint-tmp")
    assert restored(folder)[1] == 8


def test_later_runs_are_told_of_a_damaged_checkpoint(folder):
    (folder / "done.json").write_text('{"metrics": {}, "step": 8}')
    flip(largest(folder, 8))
    message = r"checkpoint 8 of .* is not what was written\); put back a copy, or remove .*done\.js"
    with pytest.raises(IcmError, match=message):
        checkpoint.load_variables(folder)
    assert checkpoint.load_variables(folder, 6)["params"]["w"]["v"].shape == (3,)
    with pytest.raises(IcmError, match=r"checkpoint 7 of .* cannot be read \("):
        checkpoint.load_variables(folder, 7)


@pytest.mark.parametrize("content", [b"", b'{"step": 8, "met', b"\xff\xfe", b"[]", b'{"step": 8}'])
def test_a_damaged_done_json_is_as_none(folder, content):
    (folder / "done.json").write_bytes(content)
    with pytest.raises(IcmError, match=r"has not finished, or its done\.json is damaged"):
        checkpoint.load_variables(folder)
