"""Stricter than users are: two CPU devices, strict dtype and rank promotion, warnings as errors."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    ).strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from small import BUILT, small_codec  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of small real image sets, or a skip that says where it was looked for."""
    folder = pathlib.Path(os.environ.get("ICM_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set ICM_JAX_DATA to their folder")
    return folder


@pytest.fixture(scope="session", params=list(BUILT))
def frozen(request):
    """A frozen codec of every kind."""
    return small_codec(request.param)
