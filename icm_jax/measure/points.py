"""Points of a run: those of files, which are left to be scored, what they need of the run."""

from collections.abc import Callable, Mapping
from typing import Any

from icm_jax.data.fields import check, number
from icm_jax.data.sources import Source
from icm_jax.engine.run import Point, Run, read_point
from icm_jax.errors import IcmError
from icm_jax.measure import Accuracy, MeanIoU, Score, average_precision, classical
from icm_jax.measure.coded import AIMED, MODELS, rival
from icm_jax.measure.instances import InstancePrecision


def file_points(
    files: Mapping[str, tuple], data: Mapping[str, Any] | None = None
) -> tuple[Point, ...]:
    """The points of {format: qualities}, e.g. {"jpeg": (5, 10), "icm": (0, ("a.icmc", None))}, a
    pair being a model's file and its quality, None of a model of one rate; `data` as for `Point`.

    Raises: IcmError for a quality that is neither a number nor such a pair.
    """
    points = []
    for kind, qualities in files.items():
        for given in qualities:
            model, quality = given if _is_model(given) else ("", given)
            if not isinstance(quality, int | float | None) or (quality is None and not model):
                raise IcmError(
                    f"a quality of config.files.{kind} is {given!r}; give numbers, of icm also "
                    "(model's file, quality or None)"
                )
            points.append(Point(kind, quality, data, model))
    return tuple(points)


def _is_model(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)


def left(run: Run, records: list[dict]) -> list[Point]:
    """The points of a run that none of its records is of."""
    there = [read_point(record["asked"]) for record in records]
    return [point for point in run.evaluate if point not in there]


def written_here(point: Point) -> bool:
    """Whether a point can be scored on this machine: whether its format is installed."""
    return point.kind not in classical.FORMATS or classical.available(point.kind)


def check_quality(run: Run, point: Point) -> None:
    """Raises: FieldError if a file's quality is none that its format, or model, has; IcmError if
    there is no such model."""
    table = {kind: field for kind, field in classical.QUALITIES.items() if kind == point.kind}
    if point.kind in MODELS and rival(point.model).codec.qualities:
        table = {point.kind: number(0, 100)}
    if point.kind == AIMED and "detector" not in run.task:
        raise IcmError(
            f"{run.name} is to be scored by {str(point)!r}, but has no detector at which files are "
            "aimed; leave config.files.aimed empty"
        )
    check({point.kind: point.quality}, table, "evaluate", run=run.name)


def no_codec(run: Run, point: Point) -> IcmError:
    """The error of a point that needs a codec file, of a run that has none."""
    return IcmError(
        f"{run.name} is to be scored by {str(point)!r}, but neither trains a codec (codec_file) "
        "nor stands on one (start)"
    )


def tally(run: Run, point: Point, source: Source, protocol: str) -> Callable[[], Score]:
    """() -> what counts a task's hits, by the labels that the run needs; `protocol` is of boxes.

    Raises: IcmError as `scored_label`.
    """
    label = scored_label(run, point)
    boxes = InstancePrecision if "outlines" in run.needs else average_precision
    tallies: dict[str, Callable[[], Score]] = {
        "mask": lambda: MeanIoU(source.mask_classes),
        "objects": lambda: boxes(protocol, source.classes),
        "label": Accuracy,
    }
    return tallies[label]


def scored_label(run: Run, point: Point) -> str:
    """Which label a run's predictions are compared with. Raises: IcmError if it needs none."""
    for key in ("mask", "objects", "label"):
        if key in run.needs:
            return key
    raise IcmError(
        f"{run.name} is to be scored by {str(point)!r}, but needs none of mask, objects, label; "
        "there is nothing to compare its predictions with"
    )
