"""A run of an experiment as data: what the files in `configs/` make, and the loop reads."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from icm_jax.data import data_fields, place_of
from icm_jax.data.fields import leaves
from icm_jax.engine.fields import check_run, defaults
from icm_jax.errors import IcmError
from icm_jax.files import read_json, unsealed, write_json

CODEC = "codec.icmc"
"""The file, in a run's folder, of the codec that it trained."""
DONE = "done.json"
"""The file, in a run's folder, that is written last by training."""
RECORDS = "records.json"
"""The file, in a run's folder, of what `icm_jax.measure.evaluate` scored."""
SCHEDULE = ("plateau", "rate_scaling", "rate_batch")
"""Settings of the learning rate that not every experiment has; see `icm_jax.engine.optim`."""


FREE = ("log_every", "save_every", "keep_every", "fsdp", "remat", "evaluate", "labels")
"""Fields that may differ when a run is resumed: they do not change what is computed."""
SCORED = ("labels.curve", "side", "detector", "codec_file", "data.validation")
SCORED += ("task.least", "task.overlap", "task.limit", "task.protocol")
"""Fields that may differ, for training does not read them: what was scored is scored anew, and a
codec file written anew. All others are what a run is."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a curve: by which way images reach what is scored.

    Attributes:
      kind: "stream", "pixels", "noise", "picture", "detect", "speed", or "icm" or a format of
        `icm_jax.measure.classical.FORMATS`; see `icm_jax.measure.evaluate`.
      quality: of a file, or of a codec with qualities (0 to 100); of "speed", images of a batch; of
        "noise", its deviation in levels.
      model: of "icm" the codec file; "": the model in the package.
      data: fields of the data set whose validation split is scored; None: the run's own, or for
        "detect" the detector's.
      effort: of files that "detect" scores; above 0 they are refined for the detector.
    """

    kind: str
    quality: float | None = None
    data: Mapping[str, Any] | None = None
    model: str = ""
    effort: int = 0

    def __str__(self) -> str:
        words = self.kind, self.model, "" if self.quality is None else f"{self.quality:g}"
        words = *words, f"effort {self.effort}" if self.effort else ""
        text = " ".join(filter(None, words))
        return text if self.data is None else f"{text} on {place_of(self.data)}"


def read_point(tree: Mapping[str, Any]) -> Point:
    """The point that `to_json` or a record made the tree from. Raises: TypeError if it is none."""
    return Point(**{name: _tupled(value) for name, value in tree.items()})


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a record, and so the report, knows of a run's curve.

    Attributes:
      curve: what is scored: "classify", "linear", "segment", "detect", "instances", "arms" or
        "image".
      arm: which of several that are compared. point: which point of the arm's curve, or "".
      title: of the arm, in words; "": its name. colour: "#rrggbb", marker: of Matplotlib;
        "": the report chooses.
      reference: whether the other arms are compared with this one.
    """

    curve: str
    arm: str
    point: str = ""
    title: str = ""
    colour: str = ""
    marker: str = ""
    reference: bool = False


@dataclasses.dataclass(frozen=True)
class Start:
    """An earlier run that a run starts from.

    Attributes:
      run: its name. workdir: its work directory; "": that of the run itself.
      parts: subtrees "collection/name" of its variables, e.g. "params/tail".
      codec: whether the run stands on that run's codec: it uses its codec file, and takes all parts
        of the codec without their being named.
    """

    run: str
    parts: tuple[str, ...] = ()
    workdir: str = ""
    codec: bool = False

    def folder(self, base: str | os.PathLike) -> pathlib.Path:
        """Where that run lies, seen from a run in the work directory `base`."""
        return pathlib.Path(self.workdir or base) / self.run


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. Raises FieldError where a field is not as `icm_jax.engine.fields` has it.

    Attributes:
      name: its folder, in the work directory. seed: of weights, order of examples and random keys.
      task: fields of a task in `icm_jax.tasks.TASKS`. data: fields of a data set in
        `icm_jax.data.DATASETS`. optim: see `icm_jax.engine.optim.make_optimiser`.
      labels: of its records; None if nothing is evaluated.
      batch_size: images of a step, of all devices together. steps: how many.
      log_every, save_every, keep_every: steps between lines of the log, checkpoints, and
        checkpoints that stay (0: the newest alone).
      fsdp: devices that share the parameters. remat: a key of `icm_jax.engine.train.REMAT`.
      ema: decay of the averaged parameters, which the run then gives; 0: none are kept.
      start: earlier runs, whose parts are copied over the initial variables in this order.
      weights: (a key of `icm_jax.weights.READERS`, path) of foreign weights to start from; with
        steps = 0 they are taken as they are.
      decode_once: train on features that the codec file decoded beforehand, instead of decoding
        views at every step.
      needs: what of an example task and score use besides the image: "label", "mask", "objects",
        "outlines".
      evaluate: points that are scored once it is trained.
      codec_file: of the codec file that the run writes at its end: weights ("float32", the
        default, or "float16"), licence, description; None: it writes none.
      detector: name of the run whose detector a scalable codec is trained for and scored with.
      side: images are scored as their middle of so many pixels, or (height, width), as a network
        sees them; 0: whole.
      classes_of: fields of the data set whose classes the task knows; None: those of `data`. So a
        codec learns from photographs without labels, for a detector that learned elsewhere.
    """

    name: str
    seed: int
    task: ml_collections.ConfigDict
    data: ml_collections.ConfigDict
    optim: ml_collections.ConfigDict
    batch_size: int
    steps: int
    log_every: int
    save_every: int
    keep_every: int = 0
    fsdp: int = 1
    remat: str = "none"
    ema: float = 0.0
    labels: Labels | None = None
    start: tuple[Start, ...] = ()
    weights: tuple[str, str] | None = None
    decode_once: bool = False
    needs: tuple[str, ...] = ()
    evaluate: tuple[Point, ...] = ()
    codec_file: Mapping[str, str] | None = None
    detector: str = ""
    side: int | tuple[int, int] = 0
    classes_of: ml_collections.ConfigDict | None = None

    def __post_init__(self):
        check_run(self)


def to_json(run: Run) -> dict:
    """A run as plain dicts, lists, strings and numbers: what config.json of its folder holds."""
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return json.loads(json.dumps(fields, default=_plain))


def from_json(tree: Mapping[str, Any]) -> Run:
    """The run that `to_json` made the tree from.

    Raises: IcmError if fields are missing or unknown, as in a folder of another version.
    """
    fields: dict[str, Any] = {name: _tupled(value) for name, value in tree.items()}
    try:
        fields |= {k: ml_collections.ConfigDict(fields[k]) for k in ("task", "data", "optim")}
        fields["start"] = tuple(Start(**item) for item in fields["start"])
        fields["evaluate"] = tuple(read_point(item) for item in fields["evaluate"])
        if fields.get("classes_of") is not None:
            fields["classes_of"] = ml_collections.ConfigDict(fields["classes_of"])
        fields["labels"] = Labels(**fields["labels"]) if fields["labels"] else None
        return Run(**fields)
    except (KeyError, TypeError) as error:
        raise IcmError(
            f"this is not a run as this icm_jax writes it ({error}): it is of another version; "
            "run the experiment anew in another --workdir"
        ) from error


def load_run(folder: str | os.PathLike) -> Run:
    """The run that was started in a folder. Raises IcmError if there is none."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise IcmError(f"there is no run {folder}; run it first")
    return from_json(_config_of(folder))


def _config_of(folder: str | os.PathLike) -> dict:
    return read_json(
        pathlib.Path(folder) / "config.json",
        dict,
        "put back a copy; or, if it is still the same experiment, remove the file, and the command "
        "of the run writes it anew",
    )


def what_is_done(folder: str | os.PathLike) -> dict | None:
    """{"step", "metrics"} of a finished run, the latter of its last logging interval; None if it
    has not finished, or done.json is damaged: the command of the run then writes it anew."""
    path = pathlib.Path(folder) / DONE
    try:
        done = unsealed(read_json(path, dict, "")) if path.is_file() else None
    except IcmError:
        return None
    if done is None:
        return None
    fits = isinstance(done.get("step"), int) and isinstance(done.get("metrics"), dict)
    return done if fits else None


def read_records(folder: str | os.PathLike) -> list[dict]:
    """The records of a run; none if it has not been scored.

    Raises: IcmError if the file is damaged.
    """
    path = pathlib.Path(folder) / RECORDS
    if not path.is_file():
        return []
    remedy = "the command of the run, without --mode=report, scores it anew"
    records = read_json(path, list, remedy)
    whole = [unsealed(record) if isinstance(record, dict) else None for record in records]
    if all(record and "kind" in record for record in whole):
        return [record for record in whole if record]
    raise IcmError(f"{path} does not hold the records that were written; {remedy}")


def codec_path(run: Run, base: str | os.PathLike) -> pathlib.Path | None:
    """The file of the codec that a run trains, or else stands on; None if there is no codec."""
    if run.codec_file is not None:
        return pathlib.Path(base) / run.name / CODEC
    return next((start.folder(base) / CODEC for start in run.start if start.codec), None)


def check_starts(runs: Iterable[Run], base: str | os.PathLike) -> None:
    """That what every unfinished run starts from has finished, or comes before it.

    Raises: IcmError that names the run, and what it lacks.
    """
    before = set()
    for run in runs:
        finished = what_is_done(pathlib.Path(base) / run.name) is not None
        for start in () if finished else run.start:
            folder = start.folder(base)
            if not start.workdir and start.run in before:
                continue
            if what_is_done(folder) is None:
                raise IcmError(
                    f"{run.name} starts from {folder}, where no run has finished (or its {DONE} is "
                    "damaged); train it first, or give the work directory that holds it"
                )
            if start.codec and not (folder / CODEC).is_file():
                raise IcmError(f"{run.name} stands on a codec, but {folder} has no {CODEC}")
        before.add(run.name)


def make_run(
    config: ml_collections.ConfigDict,
    stage: ml_collections.ConfigDict,
    *,
    name: str,
    seed: int,
    task: Mapping[str, Any],
    weight_decay: float,
    data: Mapping[str, Any] | None = None,
    **fields,
) -> Run:
    """A run with what an experiment's config says of all its runs.

    Args:
      config: the experiment; `data` and what all runs share in `train`: batch_size, log_every,
        save_every, clip_norm, fsdp, remat, accumulate, ema.
      stage: what is this run's alone: optimiser, learning_rate, warmup_steps, steps, and if it is
        not as for the others batch_size (0: as for the others) and schedule (cosine); it may be
        config.train itself.
      data: if it is not that of the config.
      fields: further fields of `Run`, which go before those of the config.
    """
    train = config.train
    optim = dict(
        name=stage.optimiser,
        learning_rate=stage.learning_rate,
        schedule=stage.get("schedule", "cosine"),
        warmup_steps=stage.warmup_steps,
        weight_decay=weight_decay,
        clip_norm=train.clip_norm,
        accumulate=train.accumulate,
    )
    optim |= {field: train[field] for field in SCHEDULE if field in train}
    shared = {field: train[field] for field in ("log_every", "save_every", "fsdp", "remat", "ema")}
    shared |= dict(batch_size=stage.get("batch_size", 0) or train.batch_size)
    shared |= dict(steps=stage.get("steps"))
    return Run(
        name=name,
        seed=seed,
        task=_config(task),
        data=_config(data_fields(_config(config.data if data is None else data))),
        optim=ml_collections.ConfigDict(optim),
        **(shared | fields),
    )


def _config(fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A config of its own: nothing is shared with the experiment's."""
    return ml_collections.ConfigDict(dict(fields)).copy_and_resolve_references()


def _plain(value):
    """For `json.dumps`: configs and dataclasses as dicts."""
    if isinstance(value, ml_collections.ConfigDict):
        return value.to_dict()
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _tupled(value):
    if isinstance(value, dict):
        return {name: _tupled(item) for name, item in value.items()}
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def claim(folder: pathlib.Path, run: Run, writes: bool = True) -> None:
    """Checks that a folder's run is this one, and if this process `writes`, writes its config.json.
    Where fields of `SCORED` differ, what depends on them is removed, to be made anew.

    Raises: IcmError if it is another.
    """
    differing = scored_changes(folder, run)
    if writes:
        if differing:
            outdate(folder, any(name.startswith("codec_file") for name in differing))
        write_json(folder / "config.json", to_json(run))


def outdate(folder: pathlib.Path, codec: bool) -> None:
    """Removes what was scored, and the `codec` file if it is to be written anew."""
    for name in (RECORDS, *([CODEC] if codec else [])):
        (folder / name).unlink(missing_ok=True)


def scored_changes(folder: pathlib.Path, run: Run) -> list[str]:
    """Which fields of `SCORED` differ in the run that a folder holds; none without a run.

    Raises: IcmError that names the others that differ, if any do: it is another run.
    """
    path = folder / "config.json"
    if not path.is_file():
        return []
    absent = json.loads(json.dumps(defaults(run), default=_plain))
    differing = changes(_config_of(folder), to_json(run), absent)
    scored = [name for name in differing if _below(name, SCORED)]
    others = [name for name in differing if not _below(name, SCORED + FREE)]
    if others:
        said = "; ".join(differing[name] for name in others)
        raise IcmError(
            f"{folder} holds a run with another config: {said}; give these back, or choose another "
            "--workdir, or remove that folder"
        )
    return scored


def _below(name: str, fields: Iterable[str]) -> bool:
    return any(name == field or name.startswith(field + ".") for field in fields)


def changes(kept: Mapping, given: Mapping, absent: Mapping | None = None) -> dict[str, str]:
    """{dotted name: "name was 1, is 2"} of the fields in which two trees of JSON differ. What one
    lacks is taken for its value in `absent`.

    >>> changes({"a": {"b": 1}}, {"a": {"b": 2, "c": 0}}, {"a": {"c": 0}})
    {'a.b': 'a.b was 1, is 2'}
    """
    known = dict(leaves(absent or {}))
    before, now = (known | dict(leaves(tree)) for tree in (kept, given))
    return {
        name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }
