"""Whether all is there that training, evaluation and report will need: said before the first step.

Without it a mistake in what comes after training would be found hours later.
"""

import contextlib
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from icm_jax.data import label_keys, pipeline
from icm_jax.data.fields import FieldError, check, number, one_of, whole
from icm_jax.data.sources import Source
from icm_jax.engine import frozen, plateau
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import (
    CODEC,
    DONE,
    Point,
    Run,
    check_starts,
    codec_path,
    outdate,
    read_records,
    scored_changes,
    what_is_done,
)
from icm_jax.engine.train import complete, initial, prepare
from icm_jax.errors import IcmError
from icm_jax.measure.classical import FORMATS, available
from icm_jax.measure.coded import MODELS
from icm_jax.measure.evaluate import check_points
from icm_jax.measure.points import left, no_codec, scored_label
from icm_jax.tasks import build_task
from icm_jax.tasks.task import Task, require_output
from icm_jax.weights import PACKAGED, READERS

MARKERS = tuple("ovsP*XDdp^<>hH8.+x1234|_")
"""Of Matplotlib, for points of a curve."""


LOOKED_AT = 1000
"""Images of a split, of which one must have an outline where masks of objects are learned."""


def check_ready(runs: Sequence[Run], base: str | os.PathLike) -> None:
    """Checks all runs of an experiment; opens the data of those that are not finished, but trains
    nothing. Names the formats that are left out, for nothing here writes them.

    Raises: IcmError that names the run or the field, and what is missing.
    """
    check_starts(runs, base)
    changed = {run.name: scored_changes(pathlib.Path(base) / run.name, run) for run in runs}
    for run in runs:
        check_points(run)
        _check_labels(run)
        if run.weights is not None:
            _check_weights(run, *run.weights)
    first = jax.process_index() == 0
    for run in runs if first else ():  # what was scored with a detector that is now asked otherwise
        if changed.get(run.detector):
            outdate(pathlib.Path(base) / run.name, codec=True)
    unfinished = [run for run in runs if changed[run.name] or not _finished(run, base)]
    kinds = {point.kind for run in unfinished for point in run.evaluate}
    absent = [kind for kind in FORMATS if kind in kinds and not available(kind)]
    if absent and first:
        hint = "nothing here writes them; pip install 'icm_jax[formats]' adds some"
        print(f"left out: {', '.join(absent)}; {hint}", file=sys.stderr, flush=True)
    opened: dict[str, list[Source]] = {}
    for run in unfinished:
        _check_needs(run)
        sources = _sources(run, opened)
        _check_data(run, sources)
        config = complete(run, sources[0])
        _check_scored(run, config.classes)
        task = build_task(config)
        training = prepare(run, task)
        if run.weights is not None:
            with contextlib.redirect_stderr(io.StringIO()):  # training says what it leaves
                frozen.started(initial(training)[1].variables, run, task.codec)
        _check_codec(run, task, base)
        for point in run.evaluate:
            _check_point(run, point, task, base, [other.name for other in runs])


def _finished(run: Run, base: str | os.PathLike) -> bool:
    """Whether nothing of a run is left to be done."""
    folder = pathlib.Path(base) / run.name
    if what_is_done(folder) is None or (run.codec_file is not None and not _has(folder, CODEC)):
        return False
    if not run.evaluate:
        return True
    try:
        return not left(run, read_records(folder))
    except (IcmError, KeyError, TypeError):  # damaged: scored anew
        return False


def _has(folder: pathlib.Path, name: str) -> bool:
    return (folder / name).is_file()


def _check_labels(run: Run) -> None:
    if run.labels is None and run.evaluate:
        raise IcmError(f"{run.name} is to be scored, but its field labels is None; give Labels")
    if run.labels is not None:
        table = {"marker": one_of("", *MARKERS)}
        check({"marker": run.labels.marker}, table, "labels", run=run.name)


def _check_weights(run: Run, reader: str, path: str) -> None:
    check({"reader": reader}, {"reader": one_of(*READERS)}, "weights", run=run.name)
    if not path and reader == PACKAGED:
        return
    if not pathlib.Path(path).is_file():
        raise FieldError(("weights", "path"), path, f"is {path!r}, which is no file", run.name)


def _sources(run: Run, opened: dict[str, list[Source]]) -> list[Source]:
    """The training split of a run's data and, if it is scored or the learning rate goes by it, the
    other; opened once for all."""
    name = run.data.to_json_best_effort()
    given = opened.setdefault(name, [])
    watched = plateau.asked(run)
    for split in ("train", "validation")[len(given) : 1 + (watched or bool(run.evaluate))]:
        by_it = watched and split == "validation"
        given.append(plateau.held_out(run) if by_it else open_source(run.data, split))
    return given


def _check_needs(run: Run) -> None:
    """That the data have what the run learns from."""
    pipeline.batch_spec(run.data, run.batch_size)
    keys = label_keys(run.data)
    for need in run.needs:
        if need not in keys:
            there = ", ".join(keys) or "nothing"
            raise IcmError(
                f"{run.name} needs {need} of each image; the data set {run.data.name} has {there}"
            )
    boxes = run.data.get("boxes", 0)
    if "objects" in run.needs and not boxes:
        told = f"is {boxes}, but objects are learned from; say how many an image has at most"
        raise FieldError(("data", "boxes"), boxes, told, run.name)
    if "outlines" in run.needs and not run.data.get("outlines", 0):
        told = "is 0, but masks of objects are learned from; say at every how many pixels"
        raise FieldError(("data", "outlines"), 0, told, run.name)


def _check_data(run: Run, sources: Sequence[Source]) -> None:
    """That the splits have examples, and the same classes, of which there is a choice."""
    for source, split in zip(sources, ("training", "validation"), strict=False):
        if not source.length:
            raise IcmError(f"{source.name} has no examples for {split}")
    for kind in ("classes", "mask_classes"):
        names = [getattr(source, kind) for source in sources]
        if names[0] != names[-1]:
            more = [name for name in names[-1] if name not in names[0]]
            what = (
                f"classes that training lacks: {', '.join(more[:5])}" if more else "other classes"
            )
            raise IcmError(
                f"{sources[-1].name} has {what}; training has {len(names[0])}, validation "
                f"{len(names[-1])}, and both must have the same in the same order"
            )
    counts = {"label": len(sources[0].classes), "mask": len(sources[0].mask_classes)}
    for need in run.needs:
        if counts.get(need, 2) < 2:
            raise IcmError(
                f"{run.name} tells classes apart, and {sources[0].name} has {counts[need]}; "
                "give it two or more"
            )
    for source in sources if "outlines" in run.needs else ():
        seen = min(source.length, LOOKED_AT)
        if not any(any(source.load(number)["outlines"]()) for number in range(seen)):
            raise IcmError(
                f"{run.name} learns masks of objects, and {source.name} has the outline of none in "
                f"its first {seen} images; learn boxes alone"
            )


def _check_scored(run: Run, classes: int) -> None:
    """That data sets which points name can be opened, and have the classes of what is scored."""
    opened: dict[str, Source] = {}
    for point in run.evaluate:
        if point.data is None:
            continue
        if repr(point.data) not in opened:
            opened[repr(point.data)] = open_source(point.data, "validation")
        source = opened[repr(point.data)]
        if (run.needs or point.kind == "detect") and len(source.classes) != classes:
            raise IcmError(
                f"{run.name} cannot be scored by {str(point)!r}: {source.name} has "
                f"{len(source.classes)} classes, and the network is made for {classes}"
            )


def _check_codec(run: Run, task: Task, base: str | os.PathLike) -> None:
    """That a codec file can be written, and that one is there where it is needed."""
    if run.codec_file is not None and task.codec is None:
        raise IcmError(f"{run.name} is to write a codec file, but its task has no codec")
    if run.decode_once and not any(start.codec for start in run.start):
        raise IcmError(f"{run.name} is to decode once, but no `start` of it has codec=True")
    if run.decode_once and tuple(run.data.get("crop", (1, 1))) != (1, 1):
        raise IcmError(f"{run.name} is to decode once, but data.crop takes other pixels each time")
    for point in run.evaluate:
        if point.kind in ("stream", "picture", "detect"):
            if codec_path(run, base) is None or task.codec is None:
                raise no_codec(run, point)


def _check_point(
    run: Run, point: Point, task: Task, base: str | os.PathLike, names: Sequence[str]
) -> None:
    """That a point fits the run's task and codec; `names` are those of all runs."""
    kind, codec = point.kind, task.codec
    place: dict[str, Any] = {"run": run.name}
    if kind in ("stream", "pixels", "noise") or (kind in (*FORMATS, *MODELS) and run.needs):
        scored_label(run, point)
    if kind == "noise":
        check({kind: point.quality}, {kind: number(above=0, most=255)}, "evaluate", **place)
        if run.data.get("coefficients"):
            raise IcmError(f"{run.name} reads coefficients of files; noise is added to pixels")
    if kind == "speed":
        check({kind: point.quality or 1}, {kind: whole(1)}, "evaluate", **place)
    if kind in ("picture", "detect") and codec is not None:
        if kind == "picture":
            require_output(codec, "image", f"{run.name} {point}")
        if codec.qualities:
            check({"quality": point.quality}, {"quality": number(0, 100)}, "evaluate", **place)
        elif point.quality is not None:
            told = f"is {point.quality:g}, but the codec has one rate; leave it out"
            raise FieldError(("evaluate", "quality"), point.quality, told, run.name)
    if kind == "stream" and codec is not None and codec.qualities:
        raise IcmError(f"{run.name} {point} needs a codec of one rate, and this one has qualities")
    if point.effort:
        check({"effort": point.effort}, {"effort": whole(0, 3)}, "evaluate", **place)
    if kind == "detect":
        there = run.detector in names or _has(pathlib.Path(base) / run.detector, DONE)
        if not run.detector or not there:
            raise IcmError(f"{run.name} is scored by a detector, but no run is {run.detector!r}")
