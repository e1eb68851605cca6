"""Curves that other software made, as HM and VTM: CSV files, a row a point.

Columns, in any order:

    name       of the curve, as "VVC intra (VTM-12.3)"
    command    by which the point was made; the report shows it
    bpp        bits per pixel of whole files
    and one or more of map50, map (0 to 1), psnr, ms_ssim_db (means over images, in dB; of MS-SSIM
               those of -10 log10(1 - s), not that of the mean s)
    images     how many it is the mean of
    quality    which point: a quantisation parameter
"""

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from icm_jax.data.fields import NAME, check, several
from icm_jax.errors import IcmError

CURVES = {"map50": "detect", "map": "detect", "psnr": "image", "ms_ssim_db": "image"}
"""Column -> curve of the records that it goes to."""
NEEDED = ("name", "command", "bpp", "images", "quality")


def read(paths: Sequence[str], data: Mapping[str, Any] | None = None, seed: int = 0) -> list[dict]:
    """Records of all rows, as `icm_jax.measure.evaluate` has them, of kind `name`, with their
    "command".

    Args:
      data: the pictures' data set, as `engine.run.Point` names it. seed: of the records.

    Raises: IcmError that names file and line of what cannot be read.
    """
    check({"outside": paths}, {"outside": several(NAME, least=0)})
    found = [record for path in paths for record in _records(pathlib.Path(path), data)]
    return [record | {"seed": seed} for record in found]


def _records(path: pathlib.Path, data) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise IcmError(f"cannot read the curves of {path}: {error}") from error
    head = rows[0][1] if rows else {}
    missing = [name for name in NEEDED if name not in head]
    if missing or not any(key in head for key in CURVES):
        raise IcmError(
            f"{path} has no column {', '.join(missing) or 'of scores'}; it needs "
            f"{', '.join(NEEDED)} and one or more of {', '.join(CURVES)}"
        )
    return [record for line, row in rows for record in _of_row(row, f"{path}:{line}", data)]


def _of_row(row: dict, place: str, data) -> list[dict]:
    keys = [key for key in CURVES if row.get(key)]
    try:
        scores = {key: float(row[key]) for key in keys}
        numbers = {key: float(row[key]) for key in ("bpp", "quality")} | {
            "images": int(row["images"])
        }
    except (TypeError, ValueError) as error:
        raise IcmError(f"{place}: {error}; scores and rates are numbers") from error
    wrong = [k for k in keys if CURVES[k] == "detect" and not 0 <= scores[k] <= 1]
    if wrong or not 0 < numbers["bpp"] < math.inf or not all(map(math.isfinite, scores.values())):
        told = f"{wrong[0]} is {scores[wrong[0]]}; it goes from 0 to 1" if wrong else "not finite"
        raise IcmError(f"{place}: {told}, and bpp is above 0")
    shared = {"kind": row["name"], "arm": "", "point": "", "command": row["command"]}
    found = []
    for curve in ("detect", "image"):
        own = {k: v for k, v in scores.items() if CURVES[k] == curve}
        if own:
            asked = {"asked": {"data": data}} if curve == "image" and data else {}
            found.append({**shared, **numbers, **asked, "curve": curve, **own})
    return found


def commands(records: Sequence[dict]) -> list[list[str]]:
    """A table: each curve from outside and how it was made."""
    rows = dict.fromkeys((r["kind"], r["command"]) for r in records if "command" in r)
    return [["curve from outside", "made by"], *map(list, rows)]
