"""Mesh, placement of parameters, and host batches as global arrays: 1 device to N processes."""

import itertools
import math
import pickle
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icm_jax.data.fields import FieldError

T = TypeVar("T")
AXES = ("data", "fsdp")
_SMALL = 2**12  # elements below which sharding a parameter costs more than it saves


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """Devices, or all, as (data, fsdp); parameters are sharded over `fsdp`, batches over all.

    Raises: IcmError if `fsdp` does not divide the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    count = devices.size
    if fsdp < 1 or count % fsdp:
        raise FieldError(("fsdp",), fsdp, f"is {fsdp}, which does not divide {devices_of(count)}")
    return Mesh(devices.reshape(count // fsdp, fsdp), AXES)


def state_shardings(mesh: Mesh, shapes: Any) -> Any:
    """A sharding for each array of a tree of shapes: the largest dimension that `fsdp` divides.

    Small arrays, and those that no dimension divides, are replicated. A "queue" of batches
    [slots, B, ...] is split as these are, so that its newest is written without being sent.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path, shape):
        spec: list[Any] = [None] * len(shape.shape)
        if len(spec) > 1 and jax.tree_util.DictKey("queue") in path:
            spec[1] = AXES
        elif fsdp > 1 and math.prod(shape.shape) >= _SMALL:
            fitting = [axis for axis, size in enumerate(shape.shape) if size % fsdp == 0]
            if fitting:
                spec[max(fitting, key=lambda axis: shape.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises IcmError if the devices do not divide the batch."""
    if batch_size % mesh.size:
        told = f"is {batch_size}, which does not divide over {devices_of(mesh.size)}; "
        told += f"give a multiple of {mesh.size}"
        raise FieldError(("batch_size",), batch_size, told)


def devices_of(count: int) -> str:
    """ "one device", "4 devices"."""
    return "one device" if count == 1 else f"{count} devices"


def global_batch(mesh: Mesh, batch: dict) -> dict:
    """This process's rows [b, ...] as arrays of the global batch [B, ...]."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def share(total: int) -> range:
    """Which of so many pieces of work this process does: every so many-th."""
    return range(total)[jax.process_index() :: jax.process_count()]


def gathered(mine: dict[int, T]) -> list[T]:
    """What all processes have made of pieces 0, 1, ..., in that order, on every process.

    Args:
      mine: number of a piece -> what this process made of it; no other has that number.
    """
    if jax.process_count() > 1:
        data = np.frombuffer(pickle.dumps(mine), np.uint8)
        _wait_for_all()
        sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int64))
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: len(data)] = data
        _wait_for_all()
        rows = multihost_utils.process_allgather(padded)
        for row, size in zip(rows, sizes, strict=True):  # bytes of this very program's processes
            mine = mine | pickle.loads(row[: int(size)].tobytes())
    return [mine[number] for number in sorted(mine)]


def as_first(value: bool) -> bool:
    """What process 0 says, on every process: files that it alone writes appear to all at once."""
    if jax.process_count() == 1:
        return value
    _wait_for_all()
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _wait_for_all() -> None:
    """Until every process has come to the next exchange, and so has what the one before gave.

    Exchanges in a row have met in jaxlib 0.5.3: gloo then ends a process, as it finds a message of
    another length. It is the coordinator that they wait at, without gloo.
    """
    from orbax.checkpoint import multihost  # here, for most of what is imported does without

    multihost.get_barrier_sync_fn()(key=f"icm_jax/{next(_exchanges)}", timeout_ms=_PATIENCE)


_exchanges = itertools.count()
"""They are the same on all processes, and so are their numbers."""
_PATIENCE = 24 * 60 * 60 * 1000
"""Milliseconds that one process waits for what others still have to score."""
