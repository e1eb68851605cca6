"""Programs that are kept on disk: read back, bounded, and trusted only where no one else writes."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from small import BUILT, encoded, images, small_codec

from icm_jax.codecs import programs

KEPT = jax.__version_info__ >= (0, 7)
keeps = pytest.mark.skipif(not KEPT, reason="this JAX cannot store programs of CPUs")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh folder of programs, and none in memory."""
    monkeypatch.setenv(programs.FOLDER, str(tmp_path / "kept"))
    monkeypatch.setattr(programs, "_made", {})
    programs.folder_of_programs.cache_clear()
    yield tmp_path / "kept"
    programs.folder_of_programs.cache_clear()


def compiled_for(monkeypatch, coded, batch):
    """(the stream, how many programs had to be compiled for it)."""
    counted = []
    compile_it = programs._compiled
    monkeypatch.setattr(programs, "_made", {})
    monkeypatch.setattr(programs, "_compiled", lambda *a: counted.append(1) or compile_it(*a))
    (stream,) = encoded(coded, batch)
    monkeypatch.setattr(programs, "_compiled", compile_it)
    return stream, len(counted)


@keeps
def test_kept_programs_are_read_and_give_the_same(folder, monkeypatch):
    frozen, batch = small_codec("scale_hyperprior"), images(1, 40, 50, 3)
    stream, count = compiled_for(monkeypatch, frozen, batch)
    files = sorted(folder.iterdir())
    assert count == len(files) == 3  # analysis, hyper-analysis, table rows
    assert compiled_for(monkeypatch, frozen, batch) == (stream, 0)
    damaged = files[0].read_bytes()
    for content in (damaged[:-1], b"", damaged[:40] + b"x" + damaged[41:]):
        files[0].write_bytes(content)
        assert compiled_for(monkeypatch, frozen, batch) == (stream, 1)
        assert files[0].read_bytes()[32:] != content[32:]


@keeps
def test_the_longest_unused_go_first(folder, monkeypatch):
    frozen, batch = small_codec("scale_hyperprior"), images(1, 40, 50, 3)
    compiled_for(monkeypatch, frozen, batch)
    files = sorted(folder.iterdir())
    for age, path in enumerate(files):
        os.utime(path, (10**9 - age, 10**9 - age))
    monkeypatch.setattr(programs, "LIMIT", sum(path.stat().st_size for path in files[:2]))
    programs._prune(folder)
    assert sorted(folder.iterdir()) == files[:2]


@keeps
def test_codecs_from_elsewhere_and_other_settings_have_no_part_in_it(folder, monkeypatch):
    encoded(small_codec("checkerboard"), images(1, 40, 50, 3))
    assert not folder.exists() or not list(folder.iterdir())
    frozen, batch = small_codec("factorised"), images(1, 40, 50, 3)
    compiled_for(monkeypatch, frozen, batch)
    with jax.default_matmul_precision("bfloat16"):
        assert compiled_for(monkeypatch, frozen, batch)[1] == 1
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, monkeypatch, capsys):
    def doubted(path, mode=0o700):
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        monkeypatch.setenv(programs.FOLDER, str(path))
        programs.folder_of_programs.cache_clear()
        found = programs.folder_of_programs()
        said = capsys.readouterr().err
        assert (found is None) == ("are not kept" in said)
        return said if found is None else ""

    assert not doubted(tmp_path / "mine") and not doubted(tmp_path / "read", 0o755)
    assert "others may write" in doubted(tmp_path / "group", 0o770)
    assert "others may write" in doubted(tmp_path / "all", 0o777)
    (tmp_path / "open").mkdir()
    inner = tmp_path / "open" / "inner"
    inner.mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "others may write" in doubted(inner)
    (tmp_path / "open").chmod(0o775)  # by a group of this user alone, or of others
    monkeypatch.setattr(programs, "_of_one", lambda group: True)
    assert not doubted(inner) and "others may write" in doubted(tmp_path / "group", 0o770)
    monkeypatch.setattr(programs, "_of_one", lambda group: False)
    assert "others may write" in doubted(inner)
    (tmp_path / "open").chmod(0o1777)  # as /tmp: what is mine there stays mine
    assert not doubted(inner)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "belongs to another user" in doubted(tmp_path / "mine")
    monkeypatch.setenv(programs.FOLDER, "off")
    programs.folder_of_programs.cache_clear()
    assert programs.folder_of_programs() is None and not capsys.readouterr().err
    programs.folder_of_programs.cache_clear()


def test_threads_compile_a_program_once(monkeypatch):
    frozen, batch = small_codec("factorised"), images(1, 40, 50, 3)
    monkeypatch.setattr(programs, "_made", {})
    counted, compile_it = [], programs._compiled
    monkeypatch.setattr(programs, "_compiled", lambda *a: counted.append(1) or compile_it(*a))
    found = []
    work = [threading.Thread(target=lambda: found.append(encoded(frozen, batch))) for _ in range(6)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(counted) == 1 and all(one == found[0] for one in found) and len(found) == 6


@keeps
def test_processes_share_a_folder(folder, tmp_path):
    """Four at once write and read the same programs; all give the same file."""
    np.save(tmp_path / "image.npy", images(60, 70, 3))
    script = (
        "import sys, hashlib, numpy, icm_jax; codec = icm_jax.load();"
        f"image = numpy.load({str(tmp_path / 'image.npy')!r});"
        "data = codec.compress(image); codec.decompress(data);"
        "print(hashlib.sha256(data).hexdigest())"
    )
    command = [sys.executable, "-c", script]
    given = dict(os.environ, PYTHONPATH=str(ROOT))
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=given)
        for _ in range(4)
    ]
    said = [process.communicate() for process in running]
    assert {process.returncode for process in running} == {0}
    assert len({out for out, _ in said}) == 1 and all(not errors for _, errors in said)
    # Of the image to y, y to z, priors of three slices, and back.
    assert len(list(folder.glob("*.program"))) == 6
    assert len(list(folder.glob("*.passed"))) == 1 and len(list(folder.iterdir())) == 7


@keeps
def test_what_comes_out_of_the_cache_of_jax_is_not_kept_again(folder, tmp_path):
    """As in a work directory whose programs are kept by JAX, once the package is another."""
    script = (
        "import sys, hashlib, jax, numpy, icm_jax; codec = icm_jax.load();"
        f"jax.config.update('jax_compilation_cache_dir', {str(tmp_path / 'jax')!r});"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "print(hashlib.sha256(codec.compress(numpy.zeros((40, 50, 3), numpy.uint8))).hexdigest())"
    )
    given = dict(os.environ, PYTHONPATH=str(ROOT))
    said, kept = set(), []
    for again in range(3):
        if again == 1:
            for path in folder.glob("*.program"):
                path.unlink()
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.add(done.stdout)
        kept.append(len(list(folder.glob("*.program"))))
    assert len(said) == 1 and kept[0] > 1 and kept[1:] == [0, 0]


def test_settings_that_name_a_program_are_plain():
    """No addresses: the same in every process."""
    assert " at 0x" not in repr(jax.config.values.items())
    assert json.dumps(BUILT["scale_hyperprior"]().config)
