"""Codecs of runs as files: written once, by the run that trained them, and read by all that stand
on them, on whatever data. So what they write has one fingerprint, and can be exchanged."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.codecs.codec import Codec, as_float16
from icm_jax.data import pipeline
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import Run, codec_path, load_run
from icm_jax.errors import IcmError
from icm_jax.tasks import views
from icm_jax.weights import start_from

CALIBRATION = 64  # training images that set the ranges of integer networks


def write_codec(codec: Codec | None, variables, run: Run, base: str | os.PathLike) -> None:
    """Freezes what a run has trained, and writes its codec file.

    Raises: IcmError if the task has no codec, or as `bitstream.freeze` and `model_file.save` do.
    """
    if codec is None:
        raise IcmError(f"{run.name} is to write a codec file, but its task has no codec")
    path = codec_path(run, base)
    if path is None or run.codec_file is None:
        raise IcmError(f"{run.name} has no field codec_file: it writes no codec file")
    frozen = freeze(codec, variables, run)
    about: dict[str, Any] = {k: v for k, v in run.codec_file.items() if k != "weights"}
    if run.detector and "feature" in codec.outputs:
        about["detector"] = detector_facts(pathlib.Path(base) / run.detector)
    model_file.save(path, frozen, **about)


def freeze(codec: Codec, variables, run: Run) -> FrozenCodec:
    """A run's codec, its integer networks calibrated on some of the run's own training images."""
    source = open_source(run.data, "train")
    spec = pipeline.image_spec(run.data, min(CALIBRATION, source.length))
    batches = pipeline.batches(source, spec, seed=run.seed, stop=1)
    images = views.centre(next(batches)["image"], run.task.size)
    weights = (run.codec_file or {}).get("weights", "float32")
    return bitstream.freeze(codec, variables, np.asarray(images), weights=weights)


def load_codec(run: Run, base: str | os.PathLike) -> FrozenCodec | None:
    """The codec that a run trained or stands on, from its file; None where there is none.

    Raises: IcmError if the file is missing or damaged.
    """
    path = codec_path(run, base)
    return None if path is None else model_file.load(path, CODECS)


def detector_facts(folder: pathlib.Path) -> dict:
    """What `model_file.save` stores of a detector that was trained in a folder."""
    found = load_run(folder)
    classes = list(open_source(found.data, "validation").classes)
    return {"classes": classes} | {k: found.task[k] for k in ("anchor_scale", "overlap", "limit")}


def with_file(variables: Mapping[str, Any], frozen: FrozenCodec) -> dict:
    """A trained codec's variables with the weights of its file, which may be rounded to half
    precision, in place of those that both have."""
    leaves = flax.traverse_util.flatten_dict(dict(variables))
    stored = flax.traverse_util.flatten_dict(dict(frozen.variables))
    return flax.traverse_util.unflatten_dict(
        {path: stored.get(path, leaf) for path, leaf in leaves.items()}
    )


def parts_of(frozen: FrozenCodec) -> tuple[str, ...]:
    """The subtrees "collection/name" of a task's variables that are the codec's."""
    collections = ("params", "batch_stats")
    return tuple(
        f"{collection}/{name}" for name in frozen.codec.parts for collection in collections
    )


def started(variables: Mapping[str, Any], run: Run, codec: Codec | None) -> dict:
    """`variables` with the foreign weights of `run` over them, but for the parts of the codec that
    it stands on: these are what its files are written with.

    Raises: IcmError as `icm_jax.weights.start_from` does.
    """
    assert run.weights
    kept = codec.parts if codec and any(start.codec for start in run.start) else ()
    return start_from(variables, *run.weights, kept=kept)


def check_same(variables: Mapping[str, Any], frozen: FrozenCodec, run: Run) -> None:
    """That a run's variables and the codec file hold the same weights; of the run that wrote the
    file in half precision, the same when they are rounded to it.

    Raises: IcmError if the run's have drifted: streams would not be what it was trained on.
    """
    leaves: dict = flax.traverse_util.flatten_dict(jax.device_get(dict(variables)))
    stored: dict = flax.traverse_util.flatten_dict(dict(frozen.variables))
    half = (run.codec_file or {}).get("weights") == "float16"
    for path, value in stored.items():
        if path not in leaves:  # of integer networks
            continue
        own = as_float16(leaves[path]) if half else leaves[path]
        if not np.array_equal(own, value):
            raise IcmError(
                f"{run.name} does not have the weights of its codec file, model "
                f"{frozen.fingerprint.hex()}: {'/'.join(path)} differs. Start it from the run that "
                "wrote the file, with all parts of the codec, and train none of them"
            )
