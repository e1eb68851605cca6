"""Files that are written whole or not at all; many files, several at a time; what else may stand on
the command line beside their names."""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

from icm_jax.errors import IcmError

Item = TypeVar("Item")
Result = TypeVar("Result")
SEAL = "crc32"
_JSON = {dict: "JSON object", list: "JSON array"}
AT_ONCE = 1 << 26
"""Pixels that are coded at the same time: two pictures of 8K, at about 40 bytes a pixel."""


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, and the folders above it; until all is on the disk an older one stays.

    Raises: IcmError if it cannot be written (full disk, missing rights).
    """
    with beside(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def beside(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Where to write what is to become the file `path`: within, a path beside it; on leaving, all
    is put on the disk and takes the place of an older file, or on an error is removed.

    Raises: IcmError for an OSError: it cannot be written (full disk, missing rights).
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise IcmError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # what stopped the writing stops this too
            pass


def write_json(path: str | os.PathLike, content) -> None:
    """Writes JSON, keys sorted, as `write_whole` does."""
    write_whole(path, json.dumps(content, indent=1, sort_keys=True).encode())


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises: IcmError if that cannot be (a file is in the way, missing rights).
    """
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IcmError(
            f"cannot make the folder {path}: {error.strerror or error}; choose another --workdir"
        ) from error


def sealed(content: dict) -> dict:
    """What is to be written as JSON, with a CRC-32 of it.

    >>> sealed({"step": 6})
    {'step': 6, 'crc32': '75c607fa'}
    """
    return content | {SEAL: _crc(content)}


def unsealed(content: dict) -> dict | None:
    """What `sealed` was given, or None if that has been altered; what has no CRC-32 as it is.

    >>> unsealed({"step": 6, "crc32": "75c607fa"}), unsealed({"step": 7, "crc32": "75c607fa"})
    ({'step': 6}, None)
    """
    found = {name: value for name, value in content.items() if name != SEAL}
    return found if content.get(SEAL, _crc(found)) == _crc(found) else None


def _crc(content: dict) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def read_json(path: str | os.PathLike, kind: type, remedy: str) -> Any:
    """What `write_json` wrote.

    Raises: IcmError that ends with `remedy` if the file cannot be read, is damaged or holds
      something else than a `kind`, dict or list.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        damage = "" if isinstance(content, kind) else f"it holds no {_JSON[kind]}"
    except OSError as error:
        damage = error.strerror or str(error)
    except UnicodeDecodeError:
        damage = "it is not text"
    except ValueError as error:  # of JSON
        damage = f"it is not whole ({error})" if text.strip() else "it is empty"
    except RecursionError:
        damage = "it is nested too deeply"
    if damage:
        raise IcmError(f"cannot read {path}: {damage}; {remedy}")
    return content


def read(name: str, take: Callable[[BinaryIO], bytes] | None = None) -> bytes:
    """A file, or standard input for "-": all of it, or what `take` reads of it.

    Raises: IcmError if it cannot be read.
    """
    take = take or (lambda file: file.read())
    if name == "-" and sys.stdin is None:
        raise IcmError("standard input is closed; name a file")
    try:
        if name == "-":
            return take(sys.stdin.buffer)
        with open(name, "rb") as file:
            return take(file)
    except OSError as error:
        raise IcmError(f"cannot read {name}: {error.strerror or error}") from error


class Listed(NamedTuple):
    """A file to be read, and its place: its name, or its path below the folder that was given."""

    name: str
    place: pathlib.PurePath


def listed(names: Sequence[str], suffixes: Sequence[str], recursive: bool) -> list[Listed]:
    """The files that are named, and those in named folders whose suffix is one of `suffixes`.

    Raises: IcmError for a folder without `recursive`, or one without such files.
    """
    found = []
    for name in names:
        folder = pathlib.Path(name)
        if not folder.is_dir():
            found.append(Listed(name, pathlib.PurePath(folder.name)))
            continue
        if not recursive:
            raise IcmError(f"{name} is a folder; --recursive takes all files in it")
        within = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
        if not within:
            raise IcmError(f"no files {', '.join(suffixes)} in {name}")
        found += [Listed(str(path), path.relative_to(folder)) for path in within]
    return found


def target_of(file: Listed, out: str | None, suffix: str, many: bool) -> pathlib.Path | None:
    """Where the result of one of `many` files or of the only one goes; None is standard output.

    Args: out: as the user gave it: a file, a folder, "-" or nothing. suffix: of the result.
    """
    if out == "-" or (file.name == "-" and out is None):
        return None
    if out is None:
        return pathlib.Path(file.name).with_suffix(suffix)
    if many or names_folder(out):
        place = pathlib.PurePath("stdin") if file.name == "-" else file.place
        return pathlib.Path(out) / place.with_suffix(suffix)
    return pathlib.Path(out)


def names_folder(out: str) -> bool:
    """Whether a path as the user gave it is that of a folder."""
    return bool(out) and (out.endswith(("/", os.sep)) or pathlib.Path(out).is_dir())


class Room:
    """A limit on what threads work on at the same time."""

    def __init__(self, limit: int = AT_ONCE):
        self._limit, self._taken, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Waits until there is room for so much, or nothing else; within, it is taken."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + amount <= self._limit)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int
) -> Generator[tuple[Item, Result | IcmError], None, None]:
    """(item, function(item) or the IcmError that it raised) in order, `jobs` at the same time.

    Of items without end no more are taken than there is work for, and as many again. Who stops
    before the end closes it.
    """

    def one(item):
        try:
            return item, function(item)
        except IcmError as error:
            return item, error

    if jobs == 1:
        yield from map(one, items)
        return
    pool, waiting = ThreadPoolExecutor(jobs), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(one, item))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # stopped: what has begun is ended, what has not is left
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def number(what: str, low: float, high: float) -> Callable[[str], float]:
    """Of the command line, a number between two."""

    def parse(text: str) -> float:
        try:
            fits = low <= float(text) <= high
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"{text} is not a {what} from {low:g} to {high:g}")
        return float(text)

    return parse


def listing(text: str) -> list[str]:
    """Names between commas; none of "none"."""
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def count(text: str) -> int:
    """A number from 1 on the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)
