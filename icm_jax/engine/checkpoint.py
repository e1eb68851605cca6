"""Saving and restoring a run with orbax: asynchronous, atomic, onto any number of devices."""

import contextlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from icm_jax.engine import sharding
from icm_jax.engine.run import DONE
from icm_jax.errors import IcmError, reason


@contextlib.contextmanager
def manager(folder: str | os.PathLike, keep: int = 2, period: int = 0):
    """The checkpoints of one run; the newest `keep` stay, and those of every `period` steps.

    Leaving waits until all is written; raises IcmError as `wait` does.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=period or None, enable_async_checkpointing=True
    )
    path = pathlib.Path(folder).absolute() / "checkpoints"
    checkpoints = ocp.CheckpointManager(path, options=options)
    try:
        yield checkpoints
    finally:
        with _writing(checkpoints):
            checkpoints.close()


def save(checkpoints: ocp.CheckpointManager, step: int, state) -> None:
    """Starts writing; the state may be donated right after.

    Raises: IcmError if this or the writing of an earlier step fails (full disk, lost storage).
    """
    with _writing(checkpoints):
        checkpoints.save(step, args=ocp.args.StandardSave(state), force=True)


def wait(checkpoints: ocp.CheckpointManager) -> None:
    """Returns when all is written. Raises IcmError if it cannot be."""
    with _writing(checkpoints):
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def _writing(checkpoints):
    try:
        yield
    except Exception as error:  # orbax, tensorstore and the system have no common base
        raise IcmError(
            f"cannot write a checkpoint to {checkpoints.directory}: {reason(error)}. Earlier "
            "ones are kept: once there is room, or the storage is back, the same command resumes"
        ) from error


def restore_newest(checkpoints: ocp.CheckpointManager, abstract: Any) -> tuple[Any, int]:
    """(state, step) of the newest whole checkpoint, or (None, 0).

    Args:
      abstract: tree of ShapeDtypeStruct with shardings; they may differ from those saved.

    A checkpoint that cannot be read is passed over with a warning, and moved beside the others.

    Of several processes the first one reads all of it before, by itself: restoring is collective,
    and who fails alone would leave the others waiting.
    """
    several = jax.process_count() > 1
    for step in sorted(checkpoints.all_steps(), reverse=True):
        state, damage = None, ""
        try:
            if not several:
                state = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
            elif jax.process_index() == 0:
                _read(checkpoints.directory / str(step) / "default")
        except Exception as error:  # orbax, tensorstore and JSON have no common base
            damage = reason(error)
        if sharding.as_first(not damage):
            if several:
                state = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
            return state, step
        aside = pathlib.Path(checkpoints.directory).parent / f"damaged-{step}"
        if jax.process_index() == 0:
            logging.error("checkpoint %d is damaged (%s); it is kept as %s", step, damage, aside)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoints.directory / str(step), aside)
        warnings.warn(f"checkpoint {step} is damaged and passed over", stacklevel=2)
        sharding.as_first(True)  # it is gone for everyone
        checkpoints.reload()
    return None, 0


def _read(path: os.PathLike):
    """The tree of a checkpoint as NumPy arrays, without the other processes."""
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
        metadata = reader.metadata(path)
        tree = getattr(metadata, "item_metadata", metadata)
        tree = getattr(tree, "tree", tree)
        template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
        return reader.restore(path, template)


def load_variables(folder: str | os.PathLike, step: int | None = None):
    """Variables of a finished run, final or of a step that was kept, as NumPy arrays.

    Raises: IcmError if the run has not finished.
    """
    folder = pathlib.Path(folder)
    if not (folder / DONE).is_file():
        raise IcmError(f"the run {folder} has not finished; run it first (same command resumes it)")
    if step is None:
        step = int(json.loads((folder / DONE).read_text())["step"])
    return read_variables(folder, step)


def read_variables(folder: str | os.PathLike, step: int):
    """Variables of a checkpoint, as NumPy arrays; the run may go on."""
    folder = pathlib.Path(folder)
    return _read(folder.absolute() / "checkpoints" / str(step) / "default")["variables"]


def _alone() -> ocp.options.MultiprocessingOptions:
    """For reading without the other processes: the report is written by the first one alone."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )


def kept_steps(folder: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints that a run has left."""
    return sorted(ocp.utils.checkpoint_steps(pathlib.Path(folder).absolute() / "checkpoints"))
