"""Who may import whom: read from the sources; and what must not be imported at all."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "icm_jax"
BASE = {"compiled", "errors", "files"}
ALLOWED = {
    "compiled": set(),
    "cost": set(),
    "errors": set(),
    "files": {"errors"},
    "ops": set(),
    "views": BASE,
    "boxes": set(),
    "coding": BASE,
    "data": BASE,
    "throughput": BASE | {"codecs", "cost", "data"},
    "nets": BASE | {"ops"},
    "entropy": BASE | {"ops", "coding"},
    "codecs": BASE | {"nets", "entropy", "coding", "ops"},
    "tasks": BASE | {"boxes", "codecs", "nets", "ops", "views"},
    "evaluators": BASE | {"codecs", "entropy", "nets", "ops"},
    "sharding": BASE | {"ops"},
    "log": BASE,
    "optim": BASE | {"ops"},
    "checkpoint": BASE | {"ops", "codecs", "sharding"},
}
UP_TO_TRAIN = set(ALLOWED)
ALLOWED["experiment"] = set()  # configs alone import it
ALLOWED["train"] = UP_TO_TRAIN
ALLOWED["plan"] = UP_TO_TRAIN | {"train"}
ALLOWED["evaluate"] = UP_TO_TRAIN | {"train"}
ALLOWED["pictures"] = UP_TO_TRAIN | {"train"}
ALLOWED["report"] = {"files", "evaluators", "pictures"}
ALLOWED["rate_distortion"] = {"codecs", "evaluators", "files"}
ALLOWED["cli"] = UP_TO_TRAIN | {"rate_distortion"}
ALLOWED["main"] = UP_TO_TRAIN | {"train", "plan", "evaluate", "report"}


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
    wrong = set(imported(path)) - ALLOWED[layer] - {layer}
    assert not wrong, f"{path.name} may not import {wrong}"


@pytest.mark.parametrize(
    "module, banned",
    [
        ("icm_jax.coding.range_coder", ("jax", "tensorflow")),
        ("icm_jax", ("jax", "numpy")),
        ("icm_jax.main", ("jax", "tensorflow")),
        ("icm_jax.cli", ("jax", "numpy", "tensorflow")),
        ("icm_jax.train", ("tensorflow",)),
        ("icm_jax.evaluate", ("tensorflow",)),
    ],
)
def test_modules_stay_light(module, banned):
    code = f"import sys, {module}; print([m for m in {banned} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
