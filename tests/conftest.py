"""Stricter than users are: two CPU devices, strict dtype and rank promotion, warnings as errors.

Programs are compiled without optimisation: compiling is most of what the tests do, and takes less
than half the time so. None are kept on disk.
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["ICM_CACHE_DIR"] = "off"

import jax
import pytest
from small import BUILT, RNG, SEEDED, STRANGERS, UNOPTIMISED, small_codec

for flag in ("--xla_force_host_platform_device_count=2", UNOPTIMISED):
    given = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent
LONGEST = ("test_resume.py", "test_main.py", "test_colabs.py", "test_launch.py")


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that no process is left alone with one at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same draws in any order of the tests."""
    del item
    RNG.bit_generator.state = SEEDED


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of small real image sets, or a skip that says where it was looked for."""
    folder = pathlib.Path(os.environ.get("ICM_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set ICM_JAX_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory):
    """Processes that tests start, another worker's too, keep compiled programs in one folder; JAX
    0.5.3 cannot on CPUs, see `icm_jax.main.keeps_programs`."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as environment:
        if jax.__version_info__ >= (0, 6):
            environment.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
            environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield


@pytest.fixture(scope="session", params=[*BUILT, *STRANGERS])
def frozen(request):
    """A frozen codec of every kind."""
    return small_codec(request.param)
