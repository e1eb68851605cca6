"""An image codec beside JPEG, WebP and what else is installed: rate, distortion and time of whole
files, image by image; their means, BD-rates and curves. `icm eval` prints and writes them.
"""

import csv
import io
import json
import pathlib
import time

import numpy as np
from matplotlib.figure import Figure

from icm_jax.codecs import bitstream
from icm_jax.files import write_whole
from icm_jax.measure import classical, metrics

RIVALS = {  # points of each; of JPEG 2000 in dB, of VVC quantisation parameters
    "jpeg": (5, 10, 20, 40, 60, 80, 90),
    "webp": (0, 10, 25, 50, 75, 90),
    "avif": (10, 30, 50, 70, 85),
    "jpeg2000": (25, 28, 31, 34, 38),
    "heif": (10, 20, 35, 50),
    "jxl": (10, 30, 50, 70, 85),
    "vvc": (47, 42, 37, 32, 27),
}


def points(qualities, *, rivals: bool = True) -> list[tuple[str, float | None]]:
    """(codec, quality) of all that is measured: "icm" at `qualities`, then the formats of `RIVALS`
    that can be written here."""
    listed = [("icm", quality) for quality in qualities]
    if rivals:
        known = filter(classical.available, RIVALS)
        listed += [(name, quality) for name in known for quality in RIVALS[name]]
    return listed


def measured(codec, image: np.ndarray, points, name: str) -> list[dict]:
    """A row per point of one image: "image" (its name), "codec", "quality", "bytes", "bpp",
    "bpp_estimated" (by the entropy model, of icm alone), "psnr" [dB], "ms_ssim" (None of images
    that are too small for it), "encode_ms" and "decode_ms".

    Args:
      codec: a `FrozenCodec` with the output "image".
      image: uint8 [H, W, 3], or [H, W]; the other formats code it as [H, W, 3] either way.
    """
    colour = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    height, width = image.shape[:2]
    rows = []
    for kind, quality in points:
        began = time.perf_counter()
        if kind == "icm":
            data = codec.compress(image, quality)
        else:
            data = classical.encode(colour, kind, quality)
        encoded = time.perf_counter()
        given = codec.decompress(data) if kind == "icm" else classical.decode(data)
        decoded = time.perf_counter()
        row = {"image": name, "codec": kind, "quality": quality, "bytes": len(data)}
        row["bpp"] = metrics.bpp(len(data), height, width)
        row["bpp_estimated"] = None
        if kind == "icm":
            estimated = bitstream.estimate(codec, colour[None], quality=quality)
            bits = sum(float(value[0]) for value in estimated.values())
            row["bpp_estimated"] = bits / (height * width)
        reference = image if given.ndim == image.ndim else colour
        row["psnr"] = metrics.psnr(reference, given)
        large = min(height, width) >= metrics.SMALLEST
        row["ms_ssim"] = metrics.ms_ssim(reference, given) if large else None
        row["encode_ms"] = 1e3 * (encoded - began)
        row["decode_ms"] = 1e3 * (decoded - encoded)
        rows.append(row)
    return rows


def averaged(rows: list[dict]) -> list[dict]:
    """Means over images of each point, in the order of the points; times are medians."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["codec"], row["quality"]), []).append(row)
    listed = []
    for (name, quality), of_quality in groups.items():
        mean = {"codec": name, "quality": quality, "images": len(of_quality)}
        for key in ("bytes", "bpp", "bpp_estimated", "psnr", "ms_ssim", "encode_ms", "decode_ms"):
            values = [row[key] for row in of_quality if row[key] is not None]
            average = np.median if key.endswith("_ms") else np.mean
            mean[key] = float(average(values)) if values else None
        listed.append(mean)
    return listed


def bd_rates(means: list[dict], rates: tuple[float, float]) -> list[str]:
    """A line per rival: bits that icm needs at equal PSNR and MS-SSIM, of the curves of means,
    between two rates of the rival in bits per pixel."""
    lines = []
    for rival in dict.fromkeys(row["codec"] for row in means if row["codec"] != "icm"):
        parts = []
        for key, name in (("psnr", "PSNR"), ("ms_ssim", "MS-SSIM")):
            curves = [
                np.array([(row["bpp"], row[key]) for row in means if row["codec"] == codec])
                for codec in (rival, "icm")
            ]
            if means[0][key] is not None:
                value = metrics.bd_rate(*curves, rates=rates)
                parts.append("no overlap" if np.isnan(value) else f"{value:+.1f} % at equal {name}")
        lines.append(
            f"BD-rate against {rival}, {rates[0]:g} to {rates[1]:g} bpp: {', '.join(parts)}"
        )
    return lines


def table(rows: list[dict]) -> str:
    """Rows with equal keys as lines of equal length."""
    digits = {"bytes": 0, "quality": 1, "psnr": 2, "encode_ms": 1, "decode_ms": 1, "images": 0}
    cells = [list(rows[0])]
    for row in rows:
        cells.append(
            [
                "–"
                if value is None
                else value
                if isinstance(value, str)
                else f"{value:.{digits.get(key, 4)}f}"
                for key, value in row.items()
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def write(folder: pathlib.Path, rows: list[dict], means: list[dict]) -> None:
    """results.csv (rows), results.json (both) and curves.png (means) into a folder.

    Raises: IcmError if one cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", text.getvalue().encode())
    content = json.dumps({"means": means, "images": rows}, indent=1)
    write_whole(folder / "results.json", content.encode())
    measures = [key for key in ("psnr", "ms_ssim") if means[0][key] is not None]
    figure = Figure(figsize=(5.5 * len(measures), 4.5), dpi=110)
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for axis, key in zip(axes, measures, strict=True):
        for name in dict.fromkeys(row["codec"] for row in means):
            curve = sorted((row["bpp"], row[key]) for row in means if row["codec"] == name)
            rates, scores = np.array(curve).T
            if key == "ms_ssim":  # in decibels, or all good files lie on one line
                scores = [metrics.decibels(score) for score in scores]
            axis.plot(rates, scores, marker="o", label=name)
        axis.set_xlabel("bits per pixel")
        axis.set_ylabel({"psnr": "PSNR [dB]", "ms_ssim": "-10 log10(1 - MS-SSIM) [dB]"}[key])
        axis.grid(alpha=0.3)
        axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, bbox_inches="tight")
    write_whole(folder / "curves.png", picture.getvalue())
