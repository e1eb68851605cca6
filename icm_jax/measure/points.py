"""Points of a run: which are left to be scored, and what they need of the run."""

from icm_jax.engine.run import Point, Run, read_point
from icm_jax.errors import IcmError
from icm_jax.measure import classical


def left(run: Run, records: list[dict]) -> list[Point]:
    """The points of a run that none of its records is of."""
    there = [read_point(record["asked"]) for record in records]
    return [point for point in run.evaluate if point not in there]


def written_here(point: Point) -> bool:
    """Whether a point can be scored on this machine: whether its format is installed."""
    return point.kind not in classical.FORMATS or classical.available(point.kind)


def no_codec(run: Run, point: Point) -> IcmError:
    """The error of a point that needs a codec file, of a run that has none."""
    return IcmError(
        f"{run.name} is to be scored by {str(point)!r}, but neither trains a codec (codec_file) "
        "nor stands on one (start)"
    )


def scored_label(run: Run, point: Point) -> str:
    """Which label a run's predictions are compared with. Raises: IcmError if it needs none."""
    for key in ("mask", "objects", "label"):
        if key in run.needs:
            return key
    raise IcmError(
        f"{run.name} is to be scored by {str(point)!r}, but needs none of mask, objects, label; "
        "there is nothing to compare its predictions with"
    )
