"""Image codecs beside JPEG, WebP and what else is installed: rate, distortion and time of whole
files, image by image; their means, BD-rates and curves. `icm eval` prints and writes them.
"""

import collections
import concurrent.futures
import contextlib
import csv
import io
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from matplotlib.figure import Figure

from icm_jax.codecs import bitstream
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.data.images import read_image
from icm_jax.errors import IcmError
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
SLOW = ("vvc",)
"""What takes minutes a picture, and is measured only where it is asked for."""


class Subject(NamedTuple):
    """What an image is coded with: one point of a curve.

    Attributes:
      curve: its name; of a classical format its key in `RIVALS`. quality: None of a single rate.
      codec: with the output "image", or None for a classical format. model: its name, or "".
      effort: of its files.
    """

    curve: str
    quality: float | None
    codec: FrozenCodec | None = None
    model: str = ""
    effort: int = 0


def ours(
    models: dict[str, FrozenCodec], qualities: Sequence[float], efforts: Sequence[int] = (0,)
) -> list[Subject]:
    """The points of our models: a curve each at `qualities`; models of one rate are one curve
    together. The curve is "icm", or of several has the model's name; with an effort it says so.

    Raises: IcmError for an effort above 0 of a model of one rate.
    """
    single = [name for name, codec in models.items() if not codec.codec.qualities]
    if single and any(efforts):
        raise IcmError(f"{', '.join(single)}: a model of one rate takes no --effort; leave it out")
    several = len(models) - len(single) + bool(single) > 1
    subjects = [Subject("icm", None, models[name], name) for name in single]
    for name, codec in models.items():
        if codec.codec.qualities:
            curve = name if several else "icm"
            for effort in efforts:
                title = f"{curve} effort {effort}" if effort else curve
                subjects += [Subject(title, q, codec, name, effort) for q in qualities]
    return subjects


def rivals(names: Sequence[str] | None = None) -> list[Subject]:
    """The points of classical formats: those named, or all that are installed but the `SLOW` ones,
    which are then told.

    Raises: IcmError for a name that is unknown or not installed.
    """
    if names is None:
        names = [name for name in RIVALS if classical.available(name) and name not in SLOW]
        left = f"left out: {', '.join(SLOW)}, minutes a picture"
        print(f"{left}; --rivals names what to measure", file=sys.stderr)
    for name in names:
        if name not in RIVALS or not classical.available(name):
            here = ", ".join(filter(classical.available, RIVALS))
            raise IcmError(f"cannot write {name!r} here; formats that can be: {here}")
    return [Subject(name, quality) for name in names for quality in RIVALS[name]]


def measured(subject: Subject, image: np.ndarray, name: str) -> dict:
    """The row of one image: "image" (its name), "codec" (the curve), "model", "quality", "bytes",
    "bpp", "bpp_estimated" (by the entropy model, of ours without effort), "psnr" [dB], "ms_ssim"
    (None of images that are too small for it), "encode_ms" and "decode_ms".

    Args:
      image: uint8 [H, W, 3], or [H, W]; the other formats code it as [H, W, 3] either way.
    """
    colour = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    height, width = image.shape[:2]
    codec, quality = subject.codec, subject.quality
    began = time.perf_counter()
    if codec is not None:
        data = codec.compress(image, quality, subject.effort)
    else:
        data = classical.encode(colour, subject.curve, quality)
    encoded = time.perf_counter()
    given = classical.decode(data) if codec is None else codec.decompress(data)
    decoded = time.perf_counter()
    estimated = None
    if codec is not None and not subject.effort:
        bits = bitstream.estimate(codec, colour[None], quality=quality)
        estimated = sum(float(value[0]) for value in bits.values()) / (height * width)
    reference = image if given.ndim == image.ndim else colour
    large = min(height, width) >= metrics.SMALLEST
    return {
        "image": name,
        "codec": subject.curve,
        "model": subject.model,
        "quality": quality,
        "bytes": len(data),
        "bpp": metrics.bpp(len(data), height, width),
        "bpp_estimated": estimated,
        "psnr": metrics.psnr(reference, given),
        "ms_ssim": metrics.ms_ssim(reference, given) if large else None,
        "encode_ms": 1e3 * (encoded - began),
        "decode_ms": 1e3 * (decoded - encoded),
    }


def rows_of(
    subjects: Sequence[Subject], images: Iterable[tuple[str, np.ndarray]], jobs: int
) -> Iterator[dict | tuple[str, IcmError]]:
    """`measured` of every image by every subject, in the order in which they are done; in place of
    a row (the image's name, what is wrong) where a subject fails on it.

    Our codecs code one image after the other, whose networks use all cores as it is; `jobs` of the
    other formats' encoders work beside them. With one job there is no beside, as for measuring
    times.
    """

    def attempt(subject: Subject, image: np.ndarray, name: str):
        try:
            return measured(subject, image, name)
        except IcmError as error:
            return name, error

    with contextlib.ExitStack() as stack:
        beside = concurrent.futures.ThreadPoolExecutor(jobs)
        first = beside if jobs == 1 else concurrent.futures.ThreadPoolExecutor(1)
        for pool in {first, beside}:  # what has not begun when the caller stops never does
            stack.callback(pool.shutdown, cancel_futures=True)
        pending: list[concurrent.futures.Future] = []
        for name, image in images:
            pending += [
                (beside if subject.codec is None else first).submit(attempt, subject, image, name)
                for subject in subjects
            ]
            while len(pending) > len(subjects):  # at most two images are in memory
                done, _ = concurrent.futures.wait(
                    pending, return_when=concurrent.futures.FIRST_COMPLETED
                )
                yield from (future.result() for future in pending if future in done)
                pending = [future for future in pending if future not in done]
        yield from (future.result() for future in concurrent.futures.as_completed(pending))


@contextlib.contextmanager
def as_they_come(path: pathlib.Path | None) -> Iterator[Callable[[dict], None]]:
    """(row) -> None that adds rows to a CSV file at once, so that a stop loses none.

    Raises: IcmError if they cannot be written.
    """
    if path is None:
        yield lambda row: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)

            def add(row: dict) -> None:
                if not file.tell():
                    writer.writerow(row)
                writer.writerow(row.values())
                file.flush()

            yield add
    except OSError as error:
        raise IcmError(f"cannot write {path}: {error.strerror or error}") from error


def in_order(rows: list[dict], names: Sequence[str], subjects: Sequence[Subject]) -> list[dict]:
    """Rows by image, then by subject."""
    images = {name: place for place, name in enumerate(names)}
    points = {(s.curve, s.model, s.quality): place for place, s in enumerate(subjects)}
    return sorted(
        rows,
        key=lambda row: (images[row["image"]], points[row["codec"], row["model"], row["quality"]]),
    )


def compare(
    subjects: Sequence[Subject],
    paths: Sequence[str],
    failed: Callable[[str, Exception], object],
    *,
    jobs: int,
    rates: tuple[float, float],
    out: pathlib.Path | None,
) -> int:
    """Measures images, prints means and BD-rates, and writes what `write` does into the folder
    `out`. Ctrl-C ends it early, with the means of what is there.

    Args:
      failed: (image's name, what is wrong) -> anything; the others go on.
      jobs: of `rows_of`. rates: of `bd_rates`.
    Returns: an exit code: 0, 1 if something failed, 130 if it was stopped.
    Raises: IcmError if the first of the rates is not the lower one.
    """
    if not rates[0] < rates[1]:
        raise IcmError("--rates takes the lower rate first")
    rows, faults = [], []

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            try:
                yield path, read_image(_read(path), path)
            except IcmError as error:
                faults.append(failed(path, error))
                bar.update(len(subjects))

    with (
        tqdm.tqdm(total=len(paths) * len(subjects), unit="point") as bar,
        as_they_come(out and out / "results.csv") as keep,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for row in rows_of(subjects, images(), jobs):
            bar.update()
            if isinstance(row, tuple):
                faults.append(failed(*row))
                continue
            keep(row)
            rows.append(row)
    stopped = bar.n < bar.total
    if rows:
        rows = in_order(rows, paths, subjects)
        means = averaged(rows)
        print("\n".join([table(means), *bd_rates(means, rates)]))
        if out:
            write(out, rows, means)
            print(f"written to {out}: results.csv, results.json, curves.png")
    if stopped:
        print(f"stopped after {bar.n} of {bar.total} points; means are of these", file=sys.stderr)
    return 130 if stopped else int(not rows or bool(faults))


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise IcmError(f"cannot read {path}: {error.strerror or error}") from error


def averaged(rows: list[dict]) -> list[dict]:
    """Means over images of each point, in the order of the points; times are medians."""
    groups: dict[tuple, list[dict]] = collections.defaultdict(list)
    for row in rows:
        groups[row["codec"], row["model"], row["quality"]].append(row)
    listed = []
    for (curve, model, quality), of_point in groups.items():
        mean = {"codec": curve, "model": model, "quality": quality, "images": len(of_point)}
        for key in ("bytes", "bpp", "bpp_estimated", "psnr", "ms_ssim", "encode_ms", "decode_ms"):
            values = [row[key] for row in of_point if row[key] is not None]
            average = np.median if key.endswith("_ms") else np.mean
            mean[key] = float(average(values)) if values else None
        listed.append(mean)
    return listed


def bd_rates(means: list[dict], rates: tuple[float, float]) -> list[str]:
    """A line per curve of ours and rival: bits that ours needs at equal PSNR and MS-SSIM, of the
    curves of means, between two rates of the rival in bits per pixel. The first of our curves is a
    rival of the others."""
    curves = list(dict.fromkeys(row["codec"] for row in means))
    own = list(dict.fromkeys(row["codec"] for row in means if row["model"]))
    lines = []
    for curve in own:
        for rival in curves:
            if rival == curve or (rival in own and rival != own[0]):
                continue
            parts = []
            for key, name in (("psnr", "PSNR"), ("ms_ssim", "MS-SSIM")):
                pair = [
                    np.array([(row["bpp"], row[key]) for row in means if row["codec"] == codec])
                    for codec in (rival, curve)
                ]
                if means[0][key] is not None:
                    value = metrics.bd_rate(*pair, rates=rates)
                    parts.append(
                        "no overlap" if np.isnan(value) else f"{value:+.1f} % at equal {name}"
                    )
            whose = f"BD-rate of {curve}" if len(own) > 1 else "BD-rate"
            lines.append(
                f"{whose} against {rival}, {rates[0]:g} to {rates[1]:g} bpp: {', '.join(parts)}"
            )
    return lines


def table(rows: list[dict]) -> str:
    """Rows with equal keys as lines of equal length."""
    digits = {"bytes": 0, "quality": 1, "psnr": 2, "encode_ms": 1, "decode_ms": 1, "images": 0}
    cells = [list(rows[0])]
    for row in rows:
        cells.append(
            [
                "-"
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
