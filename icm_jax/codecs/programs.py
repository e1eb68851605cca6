"""Compiled programs: one per function and shapes in a process, kept on disk for the next process.

A program is kept under a name that stands for all it depends on: the package's sources, versions,
flags, the codec, the shapes and the processor. Programs are code, so none is read out of a folder
in which others than its owner could have put it.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import pickle
import platform
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jaxlib.version
from jax.experimental import serialize_executable

from icm_jax.errors import IcmError
from icm_jax.files import write_whole

FOLDER = "ICM_CACHE_DIR"
"""Environment variable: where programs are kept, or "off"."""
LIMIT = 1 << 28
"""Bytes that a folder of programs may take; the longest unused go first."""
_SUFFIX, _PASSED = ".program", ".passed"
Options = Callable[[str], Mapping[str, str | bool]]
"""Platform -> options of XLA."""
_PACKAGE = pathlib.Path(__file__).parent.parent

_made: dict[Any, Any] = {}
_locks: dict[Any, threading.Lock] = {}
_guard = threading.Lock()
_home: dict[str, int] = {}
_thread = threading.local()


def quick(platform: str) -> dict[str, str | bool]:
    """`Options` of programs of integers: half the time to compile, as fast to run. Floats could
    come out other in their last bits, and files with them."""
    return {"xla_cpu_use_fusion_emitters": False} if platform == "cpu" else {}


def run(
    function: Callable,
    static: tuple,
    variables: Any,
    inputs: Any,
    *,
    options: Options | None = None,
) -> Any:
    """function(*static, variables, inputs) by a compiled program.

    It is compiled, or read, by the first thread that needs it for such shapes; others wait.

    Args:
      function: on the top level of a module. static: hashable, a `Codec` first.
      variables: arrays on a device, where it runs, no more than it needs: each takes time.
      inputs: arrays on the host.
      options: the same for all programs of a function; those that this XLA does not know are left
        out.
    """
    require_home()
    leaves, form = jax.tree.flatten((variables, inputs))
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    settings = tuple(jax.config.values.items())
    key = function, static, shapes, form, settings
    program = _made.get(key)
    if program is None:
        with _guard:
            lock = _locks.setdefault(key, threading.Lock())
        with lock:
            program = _made.get(key)
            if program is None:
                named = [(shape, _name_of(dtype)) for shape, dtype in shapes]
                job = _Job(function, static, variables, inputs, options)
                program = _kept(job, repr((named, form, settings)))
                _made[key] = program
    if getattr(_thread, "only_makes", False):
        raise _Made
    return program(variables, inputs)


def require_home() -> None:
    """Raises: IcmError in a process that was forked from one where programs ran: JAX would wait
    there for threads that only the other has."""
    if _home.setdefault("process", os.getpid()) != os.getpid():
        raise IcmError(
            "this process was forked from one in which JAX runs, and JAX cannot go on in it; start "
            'it otherwise: multiprocessing.get_context("spawn")'
        )


@contextlib.contextmanager
def only_made() -> Iterator[None]:
    """What this thread does within ends with the first program that is to `run`: it is made."""
    _thread.only_makes = True
    try:
        yield
    except _Made:
        pass
    finally:
        _thread.only_makes = False


class _Made(Exception):
    """A program is there, and was not to be run."""


class _Job(NamedTuple):
    """What `run` was given."""

    function: Callable
    static: tuple
    variables: Any
    inputs: Any
    options: Options | None


def _kept(job: _Job, described: str):
    """The program out of the folder, or compiled and put there."""
    device = jax.tree.leaves(job.variables)[0].device
    folder = folder_of_programs() if _can_be_kept(job.static[0]) else None
    if folder is None:
        return _compiled(job)
    config = json.dumps(job.static[0].config)
    about = (job.function.__name__, config, repr(job.static[1:]), described, *_surroundings(device))
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()
    path = folder / f"{name[:40]}{_SUFFIX}"
    program = _read(path, device)
    if program is None:
        before = _taken()
        program = _compiled(job)
        # One out of JAX's own cache, stored again, lacks its functions on CPUs (JAX 0.10).
        if _taken() == before:
            _write(path, program)
    return program


def once(codec, facts: str, check: Callable[[], None]) -> None:
    """`check()`, unless it has passed before, in a process of the same sources and versions, for
    the same configuration of the codec and the same `facts`."""
    folder = folder_of_programs() if _can_be_kept(codec) else None
    if folder is None:
        check()
        return
    about = (check.__qualname__, json.dumps(codec.config), facts, *_software())
    path = folder / f"{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:40]}{_PASSED}"
    if not path.exists():
        check()
    with contextlib.suppress(IcmError, OSError):  # a full disk: it is checked again next time
        if path.exists():
            os.utime(path)  # the longest unused go first
        else:
            write_whole(path, b"")


def _compiled(job: _Job):
    bound = functools.partial(job.function, *job.static)
    lowered = jax.jit(bound).lower(job.variables, job.inputs)
    options = job.options(jax.tree.leaves(job.variables)[0].device.platform) if job.options else {}
    if options:
        with contextlib.suppress(RuntimeError):  # another XLA, which does not know them
            return lowered.compile(compiler_options=dict(options))
    return lowered.compile()


@functools.cache
def _name_of(dtype) -> str:
    return str(dtype)


def _taken() -> int:
    """How many programs this thread has had out of the cache of JAX itself."""
    _listen()
    return getattr(_thread, "taken", 0)


@functools.cache
def _listen() -> None:
    def heard(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _thread.taken = getattr(_thread, "taken", 0) + 1

    jax.monitoring.register_event_listener(heard)


def _can_be_kept(codec) -> bool:
    """Only what is built by the package alone is named by its sources; before 0.7, JAX could not
    store programs of CPUs."""
    from icm_jax.codecs import CODECS

    builder = CODECS.get(codec.config[0]) if codec.config else None
    ours = builder is not None and builder.__module__.startswith("icm_jax.")
    return ours and jax.__version_info__ >= (0, 7)


@functools.cache
def _surroundings(device) -> tuple[str, ...]:
    """Everything but the function and its inputs that a program depends on."""
    flags = [f"{key}={value}" for key, value in sorted(os.environ.items()) if "XLA" in key]
    machine = (device.device_kind, str(device.id), device.client.platform_version)
    return *_software(), *flags, *machine, _processor(), str(os.cpu_count())


@functools.cache
def _software() -> tuple[str, ...]:
    """The package's sources, and versions of what they stand on."""
    sources = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        sources.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    versions = (jax.__version__, jaxlib.version.__version__, flax.__version__, sys.version)
    return sources.hexdigest(), *versions


def _processor() -> str:
    """What tells apart processors that run different instructions; else the computer's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.node()}"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    wanted = {"model name", "cpu family", "model", "stepping", "flags", "Features", "CPU part"}
    found = {key.strip(): value for key, value in facts.items() if key.strip() in wanted}
    return f"{platform.machine()} {sorted(found.items())}"


@functools.cache
def folder_of_programs() -> pathlib.Path | None:
    """The user's folder of programs, made if need be; None where it is off or cannot be trusted,
    which is said on standard error."""
    given = os.environ.get(FOLDER, "")
    if given == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
        folder = pathlib.Path(given) if given else caches / "icm_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        doubt = _doubt(folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        doubt = str(error)
    if doubt:
        print(f"icm: compiled programs are not kept: {doubt}; set {FOLDER}", file=sys.stderr)
        return None
    return folder.resolve()


def _doubt(folder: pathlib.Path) -> str:
    """Why others could have put files into a folder, or "" if only this user can."""
    if not hasattr(os, "geteuid"):
        return "this system does not say who may write to a folder"
    for place in (folder, *folder.parents):
        about = place.stat()
        above = place != folder
        group = 0 if above and _of_one(about.st_gid) else stat.S_IWGRP
        sticky = above and about.st_mode & stat.S_ISVTX
        others = about.st_mode & (group | stat.S_IWOTH) and not sticky
        if about.st_uid not in ({0, os.geteuid()} if above else {os.geteuid()}):
            return f"{place} belongs to another user"
        if others:
            return f"others may write to {place}"
    return ""


def _of_one(group: int) -> bool:
    """Whether a group is this user's alone, of the same name, as most systems make it."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def _read(path: pathlib.Path, device):
    """A program that `_write` wrote; None if it is not there or damaged."""
    try:
        content = path.read_bytes()
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            return None
        os.utime(path)  # the longest unused go first
        return serialize_executable.deserialize_and_load(
            *pickle.loads(body), backend=device.client, execution_devices=[device]
        )
    except (OSError, RuntimeError, ValueError):  # JAX's errors are RuntimeErrors
        return None


def _write(path: pathlib.Path, program) -> None:
    try:
        body = pickle.dumps(serialize_executable.serialize(program))
        write_whole(path, hashlib.sha256(body).digest() + body)
        _prune(path.parent)
    except (IcmError, OSError, RuntimeError, ValueError, NotImplementedError):
        return  # a full disk, or a program that cannot be stored: it is compiled again next time


def _prune(folder: pathlib.Path) -> None:
    """Removes the longest unused programs beyond `LIMIT`; another process may do so, too."""
    found = []
    for path in (*folder.glob(f"*{_SUFFIX}"), *folder.glob(f"*{_PASSED}")):
        try:
            about = path.stat()
            found.append((about.st_mtime, about.st_size, path))
        except FileNotFoundError:
            continue
    left = LIMIT
    for _, size, path in sorted(found, reverse=True):
        left -= size
        if left < 0:
            path.unlink(missing_ok=True)
