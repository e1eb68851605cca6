"""Devices to plan for: what is published of them, and how one that is absent is opened."""

import math
import os
import re
from typing import NamedTuple

import jax

from icm_jax.errors import IcmError, reason

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one device: bfloat16 FLOP/s, bytes of memory, bytes/s of memory, bytes/s
    that it can send to its neighbours (half of the bidirectional figure), and where they stand."""

    flops: float
    memory: float
    memory_rate: float
    network_rate: float
    source: str


_TPU, _GPU = "cloud.google.com/tpu/docs/", "nvidia.com/en-us/data-center/"
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _TPU + "v5e"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _TPU + "v5p"),
    "v6e": Chip(918e12, 32 * GIB, 1600e9, 400e9, _TPU + "v6e"),
}
GPUS = {
    "A100": Chip(312e12, 80e9, 2039e9, 300e9, _GPU + "a100"),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9, _GPU + "h100"),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9, _GPU + "h200"),
}
"""By what their names contain; SXM forms, without sparsity."""
MOST = 8_960  # chips of a topology: a whole v5p pod
RESERVED = 0.25 * GIB
"""Of the memory, for the system: XLA gives programs 15.75 GiB of a v5e's 16."""


class Target(NamedTuple):
    """Devices to compile for; `chip` is None where nothing is published of them."""

    name: str
    devices: list
    chip: Chip | None


def prepare_host(topology: str) -> None:
    """Settings that must be made before JAX looks for devices: this host plans on its CPU.

    Raises: IcmError for a topology that is not written as `open_target` wants it.
    """
    kind, _, shape = topology.partition(":")
    if kind == "local":
        return
    if kind != "cpu" and kind not in CHIPS:
        kinds = ", ".join(f"{name}:AxB" for name in CHIPS)
        raise IcmError(f"no topology {topology!r}; write {kinds} (chips), cpu:N or local")
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise IcmError(
            f"{topology!r} has no shape; write {kind}:{'8' if kind == 'cpu' else '16x16'}"
        )
    count = math.prod(map(int, shape.split("x")))
    if not 1 <= count <= MOST:
        raise IcmError(f"{topology!r} has {count} chips; give it 1 to {MOST:,}")
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    # Without these libtpu asks the cloud's metadata server who it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def open_target(topology: str) -> Target:
    """The devices of "v5e:16x16" (a TPU slice by its chips), "cpu:8" (virtual) or "local".

    Raises: IcmError without libtpu, or for a slice that there is not.
    """
    kind = topology.partition(":")[0]
    if kind in ("cpu", "local"):
        devices = jax.devices()
        named = [chip for name, chip in GPUS.items() if name in devices[0].device_kind]
        return Target(topology, devices, named[0] if named else None)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # JAX raises RuntimeError, NotImplementedError or its own
        raise IcmError(
            f"cannot describe {topology}: {reason(error)}. It needs libtpu (pip install "
            "'icm_jax[tpu]', or TPU_LIBRARY_PATH) and a slice that exists"
        ) from error
    return Target(topology, list(found.devices), CHIPS[kind])
