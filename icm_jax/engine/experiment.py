"""Config files: how they are found and loaded, and what is wrong with one, in one line. No JAX."""

import contextlib
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from icm_jax.data.fields import FieldError, leaves
from icm_jax.errors import IcmError, reason


def split_scale(argument: str) -> tuple[str, str]:
    """("FILE.py", "scale") of "FILE.py:scale"; without a colon no scale."""
    stem, _, scale = argument.partition(".py:")
    return stem.removesuffix(".py") + ".py", scale


def load_experiment(path: str | pathlib.Path) -> types.ModuleType:
    """The config file as a module: it has `get_config(scale)` and `runs(config)`, and may have
    `notes(config)`, sentences for the report on what is left out.

    A file in a package may import what lies beside it by the package's name, wherever the command
    is given: `from configs import common`.

    Raises: IcmError for a file that is not there or that raises, with the line that does, or where
      the package's name is taken by another one.
    """
    if str(path) in (".py", ""):
        raise IcmError("name an experiment, as --config=configs/omni_icm.py")
    given, path = str(path), pathlib.Path(path).resolve()
    if not path.is_file():
        raise IcmError(_absent(given, path))
    package = path.parent
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    with telling(given):
        if (package / "__init__.py").is_file():
            _import_file(package.name, package / "__init__.py")
        return _import_file("experiment", path, again=True)


def _absent(given: str, path: pathlib.Path) -> str:
    """What to say of a config that is not there."""
    folder = path if path.is_dir() else path.with_suffix("")
    if folder.is_dir():
        return f"{given.removesuffix('.py')} is a folder; name a config file in it"
    beside = [other.name for other in path.parent.glob("*.py") if other.name != "__init__.py"]
    near = ", ".join(difflib.get_close_matches(path.name, beside, 3))
    hint = f"; near it is {near}" if near else f"; there are {', '.join(sorted(beside)[:8])}"
    return f"there is no config file {given}" + (hint if beside else "")


def _import_file(name: str, path: pathlib.Path, again: bool = False) -> types.ModuleType:
    """A file as the module `name`. Of a package its name alone becomes visible, not what lies
    beside it, as on `sys.path`: a clone's `icm_jax` must not stand in for the installed one."""
    present = sys.modules.get(name)
    if present and not again:
        if pathlib.Path(present.__file__ or "").resolve() != path:
            raise IcmError(
                f"the config lies in the package {path.parent}, but {name!r} is already "
                f"{present.__file__}; give the folder another name"
            )
        return present
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def telling(path: str) -> Iterator[None]:
    """Within, what the code of a config file raises becomes an IcmError that names its line."""
    try:
        yield
    except IcmError:
        raise
    except SyntaxError as error:
        place = _as_given(error.filename or path, path)
        raise IcmError(f"{place}:{error.lineno}: {type(error).__name__}: {error.msg}") from error
    except Exception as error:
        folder = str(pathlib.Path(path).resolve().parent) + os.sep
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename.startswith(folder)]
        place = f"{_as_given(own[-1].filename, path)}:{own[-1].lineno}" if own else path
        text = f"{place}: {type(error).__name__}: {reason(error)}"
        if isinstance(error, ImportError):
            text += "; a config that imports its neighbours must stay in their folder"
        raise IcmError(text) from error


def _as_given(file: str, path: str) -> str:
    return path if pathlib.Path(file) == pathlib.Path(path).resolve() else file


def config_of(argument: str) -> ml_collections.ConfigDict:
    """The locked config of "FILE.py" or "FILE.py:scale".

    Raises: IcmError as `load_experiment`, or for a file without a `get_config` of that scale.
    """
    path, scale = split_scale(argument)
    made = getattr(load_experiment(path), "get_config", None)
    if made is None:
        raise IcmError(f"{path} has no get_config(scale), which returns the config")
    given = [scale] if scale else []
    try:
        inspect.signature(made).bind(*given)
    except TypeError as error:
        wrong = f"knows no scales; leave out :{scale}" if scale else "has no scale of its own"
        raise IcmError(f"{path}: its get_config {wrong}") from error
    with telling(path):
        config = made(*given)
    if not isinstance(config, ml_collections.ConfigDict):
        raise IcmError(f"{path}: get_config returned {type(config).__name__}, no ConfigDict")
    return config.lock()


def check_names(config: ml_collections.ConfigDict, arguments: Iterable[str]) -> None:
    """Raises IcmError for the first of a command's `--config.x.y` that the config does not have."""
    for argument in arguments:
        found = re.match(r"--?(?:no)?config\.([\w.]+)(=|$)", argument)
        if not found:
            continue
        name, tree = found.group(1), config
        for part in name.split("."):
            if not hasattr(tree, "items") or part not in tree:
                raise IcmError(f"the config has no field --config.{name}{_near(name, config)}")
            tree = tree[part]


def _near(name: str, config: ml_collections.ConfigDict) -> str:
    """The fields that may have been meant: of the same last part, or of a similar one."""
    known = [path for path, _ in leaves(config)]
    last = name.split(".")[-1]
    similar = difflib.get_close_matches(last, {path.split(".")[-1] for path in known}, 3, 0.7)
    near = [path for part in similar for path in known if path.split(".")[-1] == part]
    if near:
        return f"; near it is {', '.join('--config.' + path for path in near[:3])}"
    return f"; it has {', '.join(config)}"


def runs_of(
    experiment: types.ModuleType,
    path: str,
    config: ml_collections.ConfigDict,
    given: Mapping[str, Any],
) -> list:
    """The runs of a config.

    Args: path: of the experiment, for messages. given: as of `named`.

    Raises: IcmError that names the line of the config that raised, or where there is no run, or two
      have one name.
    """
    if not hasattr(experiment, "runs"):
        raise IcmError(f"{path} has no runs(config), which returns a list of runs")
    with telling(path):
        runs = list(experiment.runs(config))
    if not runs:
        empty = [f"--config.{name} is empty" for name, value in given.items() if value in ((), [])]
        raise IcmError(f"{path} gives no run: {', '.join(empty) or 'a list in it is empty'}")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise IcmError(f"two runs have the name {twice}: give no value twice in a list of {path}")
    return runs


def named(error: FieldError, config: Mapping[str, Any], given: Mapping[str, Any]) -> IcmError:
    """The same error with the field's name in the experiment's config, as a command gives it.

    A run's fields come from somewhere in `config`; the field is the one of the same name and value,
    rather one that the command gave, `given`: {"train.ema": 2.0}. Where none is, the name stays
    that of the run's field.
    """
    best, found = 1.1, ""
    for path, value in leaves(config):
        likeness = (path.split(".")[-1] == error.place[-1]) + _holds(value, error.value)
        likeness += 0.5 * any(path == name or path.startswith(name + ".") for name in given)
        likeness += 0.1 * (path.startswith("data.") == (error.place[0] == "data"))
        if likeness > best:
            whole = value == error.value or not _holds(value, error.value)
            best, found = likeness, ("" if whole else "a value of ") + f"--config.{path}"
    return IcmError(error.text(found)) if found else error


def _holds(value: Any, part: Any) -> bool:
    """Whether a value is another, or a tuple that holds it."""
    if isinstance(value, tuple | list) and any(_holds(item, part) for item in value):
        return True
    return type(value) is type(part) and value == part
