"""Files are written whole or not at all; many at a time within a limit."""

import resource
import signal
import threading

import pytest

from icm_jax.errors import IcmError
from icm_jax.files import Room, in_threads, write_whole


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


def test_no_more_is_worked_on_at_once_than_there_is_room_for():
    room, lock, now, most = Room(10), threading.Lock(), [0], [0]

    def work(amount):
        with room.taken(amount):
            with lock:
                now[0] += amount
                most[0] = max(most[0], now[0])
            threading.Event().wait(0.001)
            with lock:
                now[0] -= amount
        if amount == 4:
            raise IcmError("four")
        return amount

    amounts = [3, 4, 10, 1, 2, 7, 5, 4] * 5
    found = list(in_threads(work, amounts, 6))
    assert most[0] <= 10 and [amount for amount, _ in found] == amounts
    assert all(isinstance(r, IcmError) if a == 4 else r == a for a, r in found)
    assert [result for _, result in in_threads(work, [25, 3], 2)] == [25, 3]  # alone, not never
