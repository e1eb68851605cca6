"""The examples in docstrings are true; and where a reader looks first there are some."""

import doctest
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "icm_jax"
SHOWN = (
    "coding.container",
    "coding.range_coder",
    "coding.tables",
    "data.geometry",
    "data.jpeg",
    "data.resize",
    "engine.cost",
    "engine.optim",
    "engine.plan.hlo",
    "entropy",
    "errors",
    "measure.metrics",
    "measure.redundancy",
    "measure.scores",
    "ops",
    "tasks.boxes",
)


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("name", [module_of(path) for path in WITH_EXAMPLES])
def test_examples_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_modules_that_are_read_first_have_examples():
    lacking = {f"icm_jax.{name}" for name in SHOWN} - {module_of(path) for path in WITH_EXAMPLES}
    assert not lacking
