"""Functions compiled by Numba, kept on disk where some folder for them can be written."""

import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

from icm_jax.errors import IcmError
from icm_jax.files import write_whole

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # errors are return values
_ALONE: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "_nrt": False}
_functions: dict[tuple[str, str], Callable[..., int]] = {}
_guard = threading.Lock()
_engines: list = []  # hold the machine code that is loaded


def compiled(function: Callable) -> Callable:
    """`function` in machine code; without the interpreter's lock, without exceptions."""
    import numba

    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # read-only package and home: compile once per process
        return numba.njit(**_OPTIONS)(function)


def inlined(function: Callable) -> Callable:
    """`function` as a part of an `entry`; it knows numbers and addresses alone."""
    import numba

    options: dict[str, Any] = dict(_ALONE, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return numba.njit(**options)(function)


def entry(signature: str) -> Callable:
    """Decorator of a function that `native` finds in its module: int64 of addresses and int64.

    Args: signature: as Numba reads it, "int64(CPointer(uint8), int64)".
    """
    import numba

    def made(function):
        options: dict[str, Any] = dict(_ALONE, nopython=True)
        elsewhere = not _writable(pathlib.Path(function.__code__.co_filename))
        try:
            return numba.cfunc(signature, cache=elsewhere, **options)(function)
        except RuntimeError:  # read-only package and home
            return numba.cfunc(signature, **options)(function)

    return made


def give_back() -> None:
    """Gives the system memory that compiling took and freed: glibc keeps it, several hundred MiB
    after a large program of XLA's. Where the C library has no `malloc_trim`, nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def native(module: str, name: str) -> Callable[..., int]:
    """An `entry` of a module as a C function of integers and contiguous arrays, which it takes by
    their addresses; without the interpreter's lock.

    Numba takes half a second to start, and its machine code a hundredth to load. So that is kept
    beside Python's own byte code, in __pycache__, and trusted as that is; only to make it are
    Numba and the module imported.
    """
    with _guard:
        found = _functions.get((module, name))
        if found is None:
            found = _functions[module, name] = _found(module, name)
    return found


def _found(module: str, name: str) -> Callable[..., int]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    host = llvm.get_process_triple(), llvm.get_host_cpu_name(), _features(llvm)
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    path = _place(pathlib.Path(spec.origin), name, host)
    kept = _read(path)
    if kept is None:
        function = getattr(importlib.import_module(module), name)
        if not _writable(pathlib.Path(spec.origin)):
            return _callable(function.address)
        text = function.inspect_llvm()
        if not _stands_alone(text):
            return _callable(function.address)
        code = _target(llvm, *host).emit_object(llvm.parse_assembly(text))
        kept = function.native_name.encode() + b"\0" + code
        _write(path, kept)
    symbol, code = kept.split(b"\0", 1)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target(llvm, *host))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return _callable(engine.get_function_address(symbol.decode()))


def _features(llvm) -> str:
    try:
        return llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell on this processor
        return ""


def _target(llvm, triple: str, cpu: str, features: str):
    """What makes code for this processor; an engine takes it for its own."""
    target = llvm.Target.from_triple(triple)
    options: dict[str, Any] = {"reloc": "pic", "codemodel": "jitdefault", "jit": True}
    return target.create_target_machine(cpu=cpu, features=features, opt=3, **options)


def _callable(address: int) -> Callable[..., int]:
    def call(*given) -> int:
        assert all(isinstance(g, int) or g.flags.c_contiguous for g in given)
        values = [g if isinstance(g, int) else g.ctypes.data for g in given]
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(values))
        return kind(address)(*values)

    return call


def _stands_alone(text: str) -> bool:
    """Whether LLVM's text asks for nothing that Numba or Python would have to be there for."""
    outside = re.findall(r"^(?:declare .*?@|@.*= external )(.*)", text, re.MULTILINE)
    return all(name.startswith("llvm.") for name in outside)


def _place(source: pathlib.Path, name: str, host: tuple[str, ...]) -> pathlib.Path:
    """Where the machine code of an entry is kept; its name stands for all that it depends on."""
    digest = hashlib.sha256(repr((sys.version, *host)).encode())
    for package in ("numba", "llvmlite"):
        digest.update(importlib.metadata.version(package).encode())
    for path in (pathlib.Path(__file__), *sorted(source.parent.glob("*.py"))):
        digest.update(path.read_bytes())
    key = digest.hexdigest()[:16]
    return source.parent / "__pycache__" / f"{source.stem}.{name}-{key}.o"


def _writable(source: pathlib.Path) -> bool:
    """Whether Python's byte code, and so machine code, can be kept beside a module."""
    folder = source.parent / "__pycache__"
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


def _read(path: pathlib.Path) -> bytes | None:
    """What `_write` wrote; None if it is not there or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: pathlib.Path, kept: bytes) -> None:
    try:
        write_whole(path, hashlib.sha256(kept).digest() + kept)
    except IcmError:
        return  # a full disk: it is made again next time
