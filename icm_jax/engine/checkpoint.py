"""Saving and restoring a run with orbax: asynchronous, atomic, onto any number of devices.

A checkpoint holds digests of its files, which are written before it gets its name: it is whole, or
it is not there. They are checked before orbax reads it.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from icm_jax.engine import digests, sharding
from icm_jax.engine.run import DONE, what_is_done
from icm_jax.errors import IcmError, reason
from icm_jax.files import make_folder

ITEM = "default"  # orbax's name of what a checkpoint holds


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's own, with digests of what all processes have written."""

    def finalize(self, directory) -> None:
        """The first process calls it once all have written, before the checkpoint has a name."""
        super().finalize(directory)
        digests.write(pathlib.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
    """What is to be saved, for that handler."""


@contextlib.contextmanager
def manager(folder: str | os.PathLike, keep: int = 2, period: int = 0):
    """The checkpoints of one run; the newest `keep` stay, and those of every `period` steps.

    Leaving waits until all is written; raises IcmError as `wait` does.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=period or None, enable_async_checkpointing=True
    )
    path = _place(folder)
    make_folder(path)
    with _writing(path), _quiet():
        checkpoints = ocp.CheckpointManager(path, options=options, item_handlers=_Handler())
    try:
        yield checkpoints
    finally:
        with _writing(path):
            checkpoints.close()


@contextlib.contextmanager
def _quiet():
    """Orbax tells of damaged descriptions of steps, which nothing here reads."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def save(checkpoints: ocp.CheckpointManager, step: int, state) -> None:
    """Starts writing; the state may be donated right after.

    Raises: IcmError if this or the writing of an earlier step fails (full disk, lost storage).
    """
    with _writing(checkpoints.directory):
        checkpoints.save(step, args=_Save(state), force=True)


def wait(checkpoints: ocp.CheckpointManager) -> None:
    """Returns when all is written. Raises IcmError if it cannot be."""
    with _writing(checkpoints.directory):
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except Exception as error:  # orbax, tensorstore and the system have no common base
        raise IcmError(
            f"cannot write a checkpoint to {path}: {reason(error)}. Earlier "
            "ones are kept: once there is room, or the storage is back, the same command resumes"
        ) from error


def restore_newest(checkpoints: ocp.CheckpointManager, abstract: Any) -> tuple[Any, int]:
    """(state, step) of the newest whole checkpoint, or (None, 0) where there is none.

    Args:
      abstract: tree of ShapeDtypeStruct with shardings; they may differ from those saved.

    Damaged ones that are newer are passed over, and moved beside the others; one line says so.

    Of several processes each checks its share of the files before any reads: restoring is
    collective, and who fails alone would leave the others waiting.

    Raises: IcmError if there are checkpoints, but no whole one; nothing is moved then.
    """
    folder = pathlib.Path(checkpoints.directory).parent
    damaged: dict[int, str] = {}
    steps = sorted(checkpoints.all_steps(), reverse=True)
    for step in steps:
        damage = _damage(folder, step)
        if not damage:
            break
        damaged[step] = damage
    else:
        if not steps:
            return None, 0
        raise IcmError(
            f"no checkpoint of {folder} is whole ({_listed(damaged)}); put back a copy, or remove "
            f"{_place(folder)}, and the same command trains from the beginning"
        )
    if damaged:
        _set_aside(folder, damaged, step)
        with _quiet():
            checkpoints.reload()
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(_place(folder) / str(step) / ITEM, abstract), step
    except Exception as error:  # as above
        raise IcmError(
            f"checkpoint {step} of {folder} is whole, but not of this run as this icm_jax trains "
            f"it ({reason(error)}); resume with the version that wrote it, or choose another "
            "--workdir"
        ) from error


def _place(folder: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(folder).absolute() / "checkpoints"


def _listed(damaged: dict[int, str]) -> str:
    return ", ".join(f"{step}: {damage}" for step, damage in damaged.items())


def _damage(folder: pathlib.Path, step: int) -> str:
    """What is wrong with a checkpoint, the same on all processes; "" if it is whole.

    One that has no digests, as earlier versions wrote them, is read by the first process alone.
    """
    item = _place(folder) / str(step) / ITEM
    if sharding.as_first(item.is_dir() and not (item / digests.SUMS).exists()):
        damage = ""
        if jax.process_index() == 0:
            try:
                _read_parts(item)
                _read(item)
                print(
                    f"checkpoint {step} of {folder} has no digests, as of an earlier icm_jax: "
                    "whether all its numbers are those that were written is not known",
                    file=sys.stderr,
                )
            except Exception as error:  # as above, and JSON
                damage = reason(error)
        return sharding.gathered({0: damage} if jax.process_index() == 0 else {})[0]
    return digests.damage(item, together=True)


def _set_aside(folder: pathlib.Path, damaged: dict[int, str], whole: int) -> None:
    """Moves checkpoints out of the way, and says so."""
    if jax.process_index() == 0:
        for step in damaged:
            aside = folder / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(_place(folder) / str(step), aside)
        print(
            f"damaged checkpoints of {folder} are passed over ({_listed(damaged)}) and kept as "
            f"{', '.join(f'damaged-{step}' for step in damaged)}; it goes on from step {whole}",
            file=sys.stderr,
        )
    sharding.as_first(True)  # they are gone for everyone


def _read_parts(path: pathlib.Path) -> None:
    """Reads all stored bytes, one part after the other. Orbax reads many at once, and where one
    cannot be read the others complain at length."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": path.as_uri() + "/"}).result()
    for key in store.list().result():
        store.read(key).result()


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

    Raises: IcmError if the run has not finished, or as `read_variables` does.
    """
    done = what_is_done(folder)
    if done is None:
        raise IcmError(
            f"the run {folder} has not finished, or its {DONE} is damaged; run it first (same "
            "command resumes it)"
        )
    return read_variables(folder, done["step"] if step is None else step)


def read_variables(folder: str | os.PathLike, step: int):
    """Variables of a checkpoint, as NumPy arrays; the run may go on.

    Raises: IcmError if it is missing or damaged.
    """
    item = _place(folder) / str(step) / ITEM
    try:
        damage = digests.damage(item) if (item / digests.SUMS).exists() else ""
        if not damage:
            return _read(item)["variables"]
    except Exception as error:  # as above
        damage = reason(error)
    raise IcmError(
        f"checkpoint {step} of {folder} cannot be read ({damage}); put back a copy, or remove "
        f"{pathlib.Path(folder) / DONE}, and the command that trained it trains on from the newest "
        "whole one"
    )


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
    return sorted(ocp.utils.checkpoint_steps(_place(folder)))
