"""Digests of the files of a folder, kept beside them: whether it is what was written.

They are in the format of GNU coreutils, with a last line that says how many there are: in the
folder, `sha256sum --check SHA256SUMS` checks them, too.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable

import jax

from icm_jax.engine import sharding
from icm_jax.files import cores, in_threads, write_whole

SUMS = "SHA256SUMS"
"""The file, in the folder, that holds them."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_END = "# {} files"


def write(folder: pathlib.Path) -> None:
    """Writes the digests of all files below a folder.

    Raises: IcmError or OSError if one cannot be written or read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{found}  {path.relative_to(folder).as_posix()}" for path, found in _sums(files)]
    write_whole(folder / SUMS, "\n".join([*lines, _END.format(len(lines)), ""]).encode())


def damage(folder: pathlib.Path, together: bool = False) -> str:
    """What of a folder with digests is not as it was written; "" if all is.

    Args:
      together: all processes ask: each reads its share of the files, and all get one answer.
    """
    if not together:
        return _damage(folder)
    mine = _damage(folder, jax.process_index(), jax.process_count())
    return next(filter(None, sharding.gathered({jax.process_index(): mine})), "")


def _damage(folder: pathlib.Path, first: int = 0, every: int = 1) -> str:
    """The same of every so many-th file."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        listed = [_LINE.fullmatch(line) for line in lines[:-1]]
        if None in listed or lines[-1:] != [_END.format(len(listed))]:
            return f"{SUMS} is not whole"
        expected = {folder / found[2]: found[1] for found in listed[first::every] if found}
        wrong = [path for path, found in _sums(expected) if found != expected[path]]
    except UnicodeDecodeError:
        return f"{SUMS} is not whole"
    except OSError as error:
        return f"{os.path.relpath(error.filename, folder)}: {error.strerror}"
    return f"{wrong[0].relative_to(folder)} is not what was written" if wrong else ""


def _sums(files: Iterable[pathlib.Path]):
    """(path, digest in hexadecimal digits) of each file; streamed, several at a time."""
    return in_threads(_sum, files, cores())


def _sum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
