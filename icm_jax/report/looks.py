"""How arms, points and figures look everywhere in a report.

What is said of an arm comes with its records, from the labels of the run that made them
(`icm_jax.engine.run`): title, colour, marker, and whether it is the reference that others are
compared with. File formats, which belong to no run, are told here.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from icm_jax.data import place_of


class Look(NamedTuple):
    """A curve's name in words, and its colour; None: the next one of the figure's cycle."""

    title: str
    colour: str | None = None


FORMATS = {
    "jpeg": Look("JPEG", "#009E73"),
    "webp": Look("WebP", "#CC79A7"),
    "avif": Look("AVIF", "#B8A9C9"),
    "heif": Look("HEIF (HEVC intra)", "#56B4E9"),
    "vvc": Look("VVC intra", "#7F7F7F"),
    "jpeg2000": Look("JPEG 2000"),
    "icm": Look("learned pictures (photo.icmc)", "#332288"),
    "aimed": Look("the same files, aimed at the detector", "#117733"),
}


SOURCE = "source files as they are"


def title_of_arm(labels: Mapping[str, Any]) -> str:
    """An arm in words; by its name where its labels say no more."""
    return labels.get("title") or labels["arm"]


def name_and_point(record: Mapping[str, Any]) -> tuple[str, str]:
    """The curve that a record belongs to, an arm or a file format, and which point of it."""
    quality = "" if record.get("quality") is None else f"{record['quality']:g}"
    if record["kind"] == "stream":
        return record["arm"], f"{record['point']} {quality}".strip()
    model = (record.get("asked") or {}).get("model")
    if model and not quality:  # of one rate: their points are one curve
        return f"{record['kind']} models", pathlib.Path(model).parent.name
    return " ".join(filter(None, (record["kind"], model))), quality


def looks_of(records: list[dict]) -> dict[str, Look]:
    """{curve: its look} of all records."""
    looks = {}
    for record in records:
        name, _ = name_and_point(record)
        if record["kind"] == "stream":
            looks[name] = Look(title_of_arm(record), record.get("colour") or None)
        else:
            looks[name] = FORMATS.get(name, Look(name.replace("icm ", "learned pictures: ")))
    return looks


def set_of(record: Mapping[str, Any]) -> str:
    """The data set that a record's point names, in words; "": the run's own."""
    data = (record.get("asked") or {}).get("data")
    return place_of(data) if data else ""


def placed(stem: str, place: str, suffix: str = ".png") -> str:
    """The name of a file of which there is one for each data set, by its words; "": there is one.

    >>> placed("objects", "street, train.json")
    'objects_street_train_json.png'
    """
    return stem + ("_" + re.sub(r"\W+", "_", place) if place else "") + suffix


def title_of(point: str) -> str:
    """A point's label: numbers alone are λ."""
    return f"λ = {point}" if point.replace(".", "").replace("e-", "").isdigit() else point


def save(figure: Figure, path: pathlib.Path) -> str:
    """Writes a PNG file; returns its name, for a part of the page."""
    figure.savefig(path, bbox_inches="tight")
    return path.name
