"""What the fields of a run may be: its own, those of its optimiser, its data and its task."""

import dataclasses
import inspect
from typing import Any

from icm_jax import data
from icm_jax.codecs import CODECS
from icm_jax.data import geometry
from icm_jax.data.fields import (
    COLOUR,
    FLAG,
    NAME,
    TEXT,
    Field,
    FieldError,
    Table,
    check,
    either,
    number,
    one_of,
    optional,
    several,
    whole,
)
from icm_jax.engine.optim import OPTIMISERS, SCALINGS, SCHEDULES
from icm_jax.tasks import fields as of_tasks


def _is_folder(name) -> bool:
    return isinstance(name, str) and all(p not in ("", ".", "..") for p in name.split("/"))


REMAT = ("none", "convolutions", "blocks")
"""See `icm_jax.engine.train.REMAT`."""
RUN: Table = {
    "name": Field("the name of a folder below the work directory", _is_folder),
    "seed": whole(0, 2**32 - 1),
    "batch_size": whole(1),
    "steps": whole(),
    "log_every": whole(1),
    "save_every": whole(1),
    "keep_every": whole(),
    "fsdp": whole(1),
    "remat": one_of(*REMAT),
    "ema": number(0, below=1),
    "decode_once": FLAG,
    "needs": several(one_of("label", "mask", "objects", "outlines"), least=0),
    "detector": TEXT,
    "side": either(Field("0", lambda value: value == 0), of_tasks.SIZE),
}
OPTIM: Table = {
    "name": one_of(*OPTIMISERS),
    "learning_rate": number(0),
    "schedule": one_of(*SCHEDULES),
    "warmup_steps": whole(),
    "weight_decay": number(0),
    "clip_norm": number(0),
    "accumulate": optional(whole(1)),
    "rate_scaling": optional(one_of(*SCALINGS)),
    "rate_batch": optional(whole(1)),
}
PLATEAU: Table = {"interval": whole(1), "patience": whole(1), "examples": optional(whole())}
CODEC_FILE: Table = {
    "weights": optional(one_of("float32", "float16")),
    "licence": optional(TEXT),
    "description": optional(TEXT),
}
QUALITY = either(Field("None", lambda value: value is None), number())
LABELS: Table = {"curve": NAME, "arm": NAME, "point": TEXT, "title": TEXT, "colour": COLOUR}
LABELS |= {"marker": TEXT, "reference": FLAG}


def check_run(run: Any) -> None:
    """That every field of a `Run` is of its type and in its range; of its task, those of a task in
    `icm_jax.tasks.fields.TASKS`. Empty `optim`, and data and task without a name, are passed over.

    Raises: FieldError.
    """
    of_run: dict[str, Any] = {"run": str(run.name)}
    check({name: getattr(run, name) for name in RUN}, RUN, **of_run)
    if run.optim:
        check(run.optim, OPTIM, "optim", **of_run)
        if run.optim.schedule == "plateau":
            check(run.optim.get("plateau", {}), PLATEAU, "optim", "plateau", **of_run)
        warmup = run.optim.warmup_steps
        if run.steps and warmup >= run.steps:
            told = f"is {warmup}; it must be below the run's {run.steps} steps"
            raise FieldError(("optim", "warmup_steps"), warmup, told, run.name)
    if run.data.get("name") in data.DATASETS:
        check(run.data, data.BATCHES, "data", **of_run)
    for given in (run.data, run.classes_of, *(point.data for point in run.evaluate)):
        if given is not None and given.get("name") in data.DATASETS:
            own = {**data.BATCHES, **data.DATASETS[given["name"]].table}  # all have defaults
            check(given, {name: optional(own[name]) for name in own}, "data", **of_run)
    check(run.task, of_tasks.TASKS.get(run.task.get("name"), {}), "task", **of_run)
    _check_views(run)
    for point in run.evaluate:
        check({"quality": point.quality}, {"quality": QUALITY}, "evaluate", **of_run)
    if run.codec_file is not None:
        for name in run.codec_file:
            if name not in CODEC_FILE:
                told = f"is no field; there are {', '.join(CODEC_FILE)}"
                raise FieldError(("codec_file", name), run.codec_file[name], told, run.name)
        check(run.codec_file, CODEC_FILE, "codec_file", **of_run)
    if run.labels is not None:
        check(dataclasses.asdict(run.labels), LABELS, "labels", **of_run)


def _check_views(run: Any) -> None:
    """That the views of a task of ours are no larger than the canvas, and those of a detector are
    the canvas; and that a queue is made of whole batches."""
    task = run.task
    if task.get("name") not in of_tasks.TASKS or "canvas" not in run.data:
        return
    size, canvas = geometry.sides(task.size), geometry.sides(run.data.canvas)
    place, told = ("task", "size"), f"is {task.size}; "
    if any(side > most for side, most in zip(size, canvas, strict=True)):
        told += f"a canvas (data.canvas) of {canvas[0]} × {canvas[1]} pixels holds no such view"
        raise FieldError(place, task.size, told, run.name)
    if task.name in ("detection", "object_detection") and size != canvas:
        told += f"a detector sees whole images, so it must be data.canvas, {run.data.canvas}"
        raise FieldError(place, task.size, told, run.name)
    if task.name == "contrastive" and task.queue % run.batch_size:
        told = f"is {task.queue}, which the batch size {run.batch_size} does not divide"
        raise FieldError(("task", "queue"), task.queue, told, run.name)


def defaults(run: Any) -> dict[str, Any]:
    """What is meant where a run's fields, as config.json of an earlier version has them, are not
    there: nested dicts of those that have a default."""
    found: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(run)
        if field.default is not dataclasses.MISSING
    }
    found["optim"] = {"accumulate": 1, "rate_scaling": "none", "rate_batch": 256}
    found["optim"] |= {"plateau": {"examples": 0}}
    found["data"] = {"boxes": 0, "letterbox": "corner", "outlines": 0, "coefficients": ""}
    found["data"] |= {"crop": [1.0, 1.0]}
    if run.data.get("name") in data.DATASETS:
        found["data"] |= data.DATASETS[run.data.name].fields
    found["task"] = {"bn_groups": 0, "output_weight": 0.0, "protocol": "coco"}
    found["task"] |= {"stride_in_1x1": run.task.get("frontend") in ("code", "decoded")}
    codec = run.task.get("codec", {}).get("name")
    if codec in CODECS:
        arguments = inspect.signature(CODECS[codec]).parameters.values()
        given = {a.name: a.default for a in arguments if a.default is not a.empty}
        found["task"] |= {"codec": given}
    return found
