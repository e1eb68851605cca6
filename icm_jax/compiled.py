"""Functions compiled by Numba, kept on disk where some folder for them can be written."""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """`function` in machine code; without the interpreter's lock, without exceptions."""
    options = {"nogil": True, "error_model": "numpy"}  # errors are return values
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # read-only package and home: compile once per process
        return numba.njit(**options)(function)
