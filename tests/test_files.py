"""Files are written whole or not at all."""

import resource
import signal

import pytest

from icm_jax.errors import IcmError
from icm_jax.files import write_whole


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    write_whole(path, b"earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(IcmError, match=r"cannot write .*file: File too large"):
            write_whole(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert path.read_bytes() == b"earlier" and list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(IcmError, match=r"cannot write .*taken.file"):
        write_whole(tmp_path / "taken" / "file", b"")
