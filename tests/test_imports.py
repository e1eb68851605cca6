"""Who may import whom: read from the sources; and what must not be imported at all."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "icm_jax"
FOLDERS = ("coding", "data", "nets", "codecs", "weights", "tasks", "engine", "measure", "report")
"""Rooms, each of which may import those before it."""
ROOT = {"errors": set(), "files": {"errors"}, "compiled": {"errors", "files"}}
ROOT |= {"ops": {"compiled", "errors"}}
"""Modules that all may import, `ops` (JAX) all but `coding` and `data`; and what they import."""
ROOT |= {"entropy": {"coding", "errors", "ops"}}
COMMANDS = ("cli", "main")
WITHOUT_JAX = ("coding", "data")


def allowed(place):
    """What the modules of a room, or a module beside the rooms, may import."""
    if place in ROOT:
        return ROOT[place]
    base = {"errors", "compiled", "files"}
    if place in WITHOUT_JAX:
        return base
    if place in COMMANDS:
        return base | set(ROOT) | set(FOLDERS)
    before = FOLDERS[: FOLDERS.index(place)]
    return base | {"ops"} | set(before) | ({"entropy"} if "codecs" in (place, *before) else set())


def test_every_folder_and_module_has_its_place():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(FOLDERS)
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__", *ROOT, *COMMANDS}
    assert len(modules) <= 8


def imported(path):
    """Second components of all icm_jax imports in a file, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"icm_jax.{alias.name}" for alias in node.names]
                if node.module == "icm_jax"
                else [node.module]
            )
        for name in names:
            if name.startswith("icm_jax."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_flow_one_way(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        assert set(imported(path)) <= {"errors", "codecs"}  # the latter when `load` is called
        return
    wrong = set(imported(path)) - allowed(layer) - {layer}
    assert not wrong, f"{path.name} may not import {wrong}"


@pytest.mark.parametrize(
    "module, banned",
    [
        ("icm_jax.coding.range_coder", ("jax", "numba", "tensorflow")),
        ("icm_jax", ("jax", "numpy")),
        ("icm_jax.main", ("jax", "tensorflow")),
        ("icm_jax.cli", ("jax", "numpy", "tensorflow")),
        ("icm_jax.engine.train", ("tensorflow", "tensorflow_datasets")),
        ("icm_jax.measure.evaluate", ("tensorflow", "tensorflow_datasets")),
    ],
)
def test_modules_stay_light(module, banned):
    code = f"import sys, {module}; print([m for m in {banned} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
