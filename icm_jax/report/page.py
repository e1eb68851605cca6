"""From the records of finished runs to tables, curves and pictures: report.md and report.html.

Reads records.json and metrics.jsonl of each run (schema: `icm_jax.measure.evaluate`). What a run
has not produced yet is named in the report instead of being drawn.
"""

import base64
import html
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import NamedTuple

import jax
import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from icm_jax.files import write_whole
from icm_jax.measure.metrics import bd_rate
from icm_jax.report import pictures
from icm_jax.report.pictures import NAMES, save, title_of


class Measure(NamedTuple):
    """What is drawn over the rate: records of `curve` that have `key`, times `factor`."""

    curve: str
    key: str
    title: str
    axis: str
    factor: float = 1.0


MEASURES = (
    Measure("classify", "top1", "Classification, tail fine-tuned", "top-1 accuracy [%]", 100),
    Measure("linear", "top1", "Classification, linear", "top-1 accuracy [%]", 100),
    Measure("segment", "miou", "Semantic segmentation", "mIoU [%]", 100),
    Measure("detect", "map50", "Detection, mAP at IoU 0.5", "mAP@0.5 [%]", 100),
    Measure("detect", "map", "Detection, mAP at IoU 0.5 to 0.95", "mAP@[0.5:0.95] [%]", 100),
    Measure("image", "psnr", "Image quality, PSNR", "PSNR [dB]"),
    Measure("image", "ssim_db", "Image quality, SSIM", "SSIM [dB]"),
    Measure("image", "ms_ssim_db", "Image quality, MS-SSIM", "MS-SSIM [dB]"),
)
COLOURS = {"omni": "#0072B2", "unfiltered": "#D55E00", "jpeg": "#009E73", "webp": "#CC79A7"}
COLOURS |= {"disentangled": "#0072B2", "split": "#D55E00", "residual": "#E69F00"}
COLOURS |= {"split-cheng2020": "#8B3A00", "single": "#000000", "heif": "#56B4E9", "vvc": "#7F7F7F"}
TAB20 = colormaps["tab20"].colors
DASHES = ("-", "--", ":", "-.")
WIDE = 10  # largest over smallest loss of a panel from which on its axis is logarithmic
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "numba", "tensorflow-datasets")


ARMS_NOTE = (
    "Means and population standard deviations over the seeds; images per second are those of "
    "inference, medians over the seeds; network: of arrays on the device; from files: read by all "
    "cores, then the network. Multiply-accumulates of an image are counted on the program, with "
    "those of a codec's decoder."
)


def write_report(config, runs, workdir: str | os.PathLike) -> pathlib.Path:
    """Writes report.html, report.md and their PNG files into `workdir`; returns the HTML's path."""
    workdir = pathlib.Path(workdir)
    records = [r for run in runs for r in _read_json(workdir / run.name / "records.json", [])]
    missing = [run.name for run in runs if not (workdir / run.name / "done.json").is_file()]
    parts: list[tuple[str, str]] = [("h1", f"{config.name} on {config.data.name}")]
    if missing:
        parts.append(("p", "Not finished yet: " + ", ".join(missing)))
    for measure in MEASURES:
        own = [r for r in records if r.get("curve") == measure.curve and measure.key in r]
        if own:
            parts += [("h2", measure.title)]
            several = [m.curve for m in MEASURES].count(measure.curve) > 1
            name = f"rate_{measure.key if several else measure.curve}.png"
            parts += [("image", _draw_curves(own, workdir / name, measure))]
            seeds = len({record["seed"] for record in own})
            spread = "mean and population standard deviation over the seeds"
            parts += [("p", "One seed." if seeds == 1 else f"{seeds} seeds; {spread}.")]
            parts += [("table", _curve_table(own, measure))]
            compared = _bd_table(own, measure)
            parts += [("table", compared)] if len(compared) > 1 else []
    speeds = [record for record in records if record.get("curve") == "speed"]
    timed = {_arm(record) for record in speeds}
    arms = [r for r in records if r.get("curve") in ("arms", "classify")]
    arms = [r for r in arms if r["curve"] == "arms" or _arm(r) in timed]
    if arms:
        parts.append(("h2", "Arms: accuracy, speed and cost"))
        if speeds:
            parts.append(("image", _draw_speed(arms, speeds, workdir / "speed.png")))
        parts += [("table", _arms_table(arms, speeds)), ("p", ARMS_NOTE)]
    streams = [record for record in records if record["kind"].startswith("stream")]
    if streams:
        parts += [("h2", "Bitstreams"), ("table", _stream_table(streams))]
    detectors = [run for run in runs if run.task.name == "detection" and run.name not in missing]
    if detectors:
        frozen = [run for run in runs if (workdir / run.name / "codec.icmc").is_file()]
        parts += pictures.detections(detectors[0], frozen, workdir)
    if any(point.startswith("stream") for run in runs for point in run.evaluate):
        parts += pictures.decoded(config, runs, workdir)
    scalable = [run for run in runs if run.task.name == "scalable_compression"]
    scalable = [run for run in scalable if (workdir / run.name / "codec.icmc").is_file()]
    if scalable:
        parts += pictures.latents(scalable, workdir)
    parts += [("h2", "Training"), ("image", _draw_training(runs, workdir))]
    parts += [("h2", "How this was made"), ("code", _provenance(config, workdir))]
    write_whole(workdir / "report.md", _markdown(parts).encode())
    write_whole(workdir / "report.html", _html(parts, workdir).encode())
    return workdir / "report.html"


def curves_of(records: list[dict], key: str, rate: str = "bpp") -> dict[str, np.ndarray]:
    """Points of each curve, averaged over seeds: {name: float [n, 4]} of (bpp, value, ± both)."""
    points: dict[tuple, list] = {}
    for record in records:
        if rate not in record:
            continue
        name, point = _name_and_point(record)
        points.setdefault((name, point), []).append((record[rate], record[key]))
    curves: dict[str, list] = {}
    for (name, _), values in points.items():
        values = np.array(values)
        curves.setdefault(name, []).append([*values.mean(axis=0), *values.std(axis=0)])
    return {name: np.array(sorted(rows)) for name, rows in curves.items()}


def _name_and_point(record: dict) -> tuple[str, str]:
    """The curve that a record belongs to, and which point of it."""
    method, _, quality = record["kind"].partition("-")
    if method == "stream":
        return record["arm"], f"{record['point']} {quality}".strip()
    return method, quality


def _draw_curves(records, path, measure: Measure):
    figure = Figure(figsize=(7.5, 5), dpi=120)
    axes = figure.subplots()
    for name, rows in curves_of(records, measure.key).items():
        axes.errorbar(
            rows[:, 0],
            measure.factor * rows[:, 1],
            measure.factor * rows[:, 3],
            rows[:, 2],
            marker="o",
            color=COLOURS.get(name),
            label=NAMES.get(name, name),
            capsize=2,
        )
    jpeg = [record for record in records if record["kind"].partition("-")[0] == "jpeg"]
    for rows in curves_of(jpeg, measure.key, "bpp_without_tables").values():
        axes.plot(
            rows[:, 0],
            measure.factor * rows[:, 1],
            "--",
            color=COLOURS["jpeg"],
            linewidth=1,
            label="JPEG without its tables",
        )
    pixels = [record[measure.key] for record in records if record["kind"] == "pixels"]
    if pixels:
        value = measure.factor * np.mean(pixels)
        axes.axhline(value, color="grey", linestyle=":", label="uncompressed pixels")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("bits per pixel, measured on whole files")
    axes.set_ylabel(measure.axis)
    axes.set_title(measure.title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save(figure, path)


def _curve_table(records, measure: Measure) -> list[list[str]]:
    top5 = any("top5" in record for record in records)
    head = ["curve", "point", "seed", "bpp measured", "bpp without tables", measure.axis]
    rows = [[*head, *(["top-5 [%]"] if top5 else []), "images"]]
    for r in sorted(records, key=lambda r: (r["arm"], r["kind"].split("-")[0], r.get("bpp", 99))):
        name, point = _name_and_point(r)
        stream = r["kind"].startswith("stream")
        rates = [f"{r[key]:.4f}" if key in r else "–" for key in ("bpp", "bpp_without_tables")]
        last = [f"{100 * r['top5']:.1f}"] if top5 else []
        value = f"{measure.factor * r[measure.key]:.{1 if measure.factor == 100 else 2}f}"
        title = NAMES.get(name, name) if stream else f"pixels: {name}"
        if measure.curve == "image":
            title = NAMES.get(name, name)
        elif stream:
            point = title_of(point)
        rows.append([title, point, str(r["seed"]), *rates, value, *last, str(r["images"])])
    return rows


def _arm(record: dict) -> str:
    """A network, at its operating point if it has one."""
    return f"{record['arm']} {record['point']}".strip()


def _by_arm(records) -> dict[str, list[dict]]:
    """Records of each arm, in order of appearance."""
    found: dict[str, list] = {}
    for record in records:
        found.setdefault(_arm(record), []).append(record)
    return found


def _arms_table(arms, speeds) -> list[list[str]]:
    """One row an arm, as in the tables of Gueguen et al. 2018; factors are to the first arm."""
    head = ["arm", "top-1 [%]", "top-5 [%]", "seeds", "network [images/s]", "from files [images/s]"]
    rows = [[*head, "G multiply-accumulates", "M parameters"]]
    speeds, first = _by_arm(speeds), {}
    for arm, own in _by_arm(arms).items():
        scores = []
        for key in ("top1", "top5"):
            values = 100 * np.array([r[key] for r in own])
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            scores.append(f"{values.mean():.1f}{spread}")
        cells = ["–"] * 4
        if arm in speeds:
            for place, key in enumerate(("network_images_per_second", "images_per_second")):
                value = float(np.median([r[key] for r in speeds[arm]]))
                first.setdefault(key, value)
                cells[place] = f"{value:.0f} ({value / first[key]:.2f} ×)"
            cells[2] = f"{speeds[arm][0]['multiply_accumulates'] / 1e9:.3f}"
            cells[3] = f"{speeds[arm][0]['parameters'] / 1e6:.2f}"
        rows.append([arm, *scores, str(len(own)), *cells])
    return rows if speeds else [row[:4] for row in rows]  # with speed=0 nothing is measured


def _draw_speed(arms, speeds, path):
    """Accuracy over images per second, of the network alone and from files."""
    figure = Figure(figsize=(11, 4.8), dpi=110)
    titles = {"network_images_per_second": "network alone", "images_per_second": "from files"}
    speeds, points = _by_arm(speeds), []
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for arm, own in _by_arm(arms).items():
            if arm in speeds:
                values = 100 * np.array([r["top1"] for r in own])
                at = float(np.median([r[key] for r in speeds[arm]]))
                reads_pixels = arm.startswith(("rgb", "ycbcr", "r50", "r71"))
                marker = "s" if reads_pixels else "o" if arm.startswith(("jpeg", "c")) else "^"
                axes.errorbar(at, values.mean(), values.std(), marker=marker, capsize=2, label=arm)
                points.append((axes, arm, (at, values.mean())))
        axes.set_title(title)
        axes.set_xlabel("images per second, inference")
        axes.grid(alpha=0.3)
        axes.margins(x=0.2)
    figure.axes[0].set_ylabel("top-1 accuracy [%]")
    figure.tight_layout()
    _name(points, FigureCanvasAgg(figure).get_renderer())
    return save(figure, path)


def _name(points, renderer) -> None:
    """Names beside points (axes, name, (x, y)), on the side where they cover least."""
    centres = (axes.transData.transform(at) for axes, _, at in points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    for axes, name, at in points:
        options = []
        for x, y, side in ((4, 4, "left"), (4, -9, "left"), (-4, 4, "right"), (-4, -9, "right")):
            text = axes.annotate(name, at, (x, y), textcoords="offset points", size=7, ha=side)
            box = text.get_window_extent(renderer)
            outside = not (axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1)
            options.append((outside + sum(box.overlaps(other) for other in taken), text, box))
        best = min(options, key=lambda option: option[0])
        taken.append(best[2])
        for option in options:
            if option is not best:
                option[1].remove()


def _stream_table(records) -> list[list[str]]:
    """Each codec once: where its bits go, how near they are to the estimate, how long it takes."""
    segments = list(dict.fromkeys(key for r in records for key in r if key.startswith("bpp_")))
    segments = [key for key in segments if key not in ("bpp_estimated", "bpp_header")]
    rows = [
        [
            "codec",
            "point",
            "seed",
            "bpp measured",
            "bpp estimated",
            "header bpp",
            *(f"{key.removeprefix('bpp_')} bpp" for key in segments),
            "worst bytes above estimate + 1 %",
            "encode [ms]",
            "decode [ms]",
        ]
    ]
    codecs_seen = {(*_name_and_point(r), r["seed"]): r for r in reversed(records)}
    for (arm, point, seed), r in sorted(codecs_seen.items(), key=lambda item: item[1]["bpp"]):
        rates = ("bpp", "bpp_estimated", "bpp_header", *segments)
        others = ("worst_gap_bytes", "encode_ms", "decode_ms")
        rows.append(
            [
                NAMES.get(arm, arm),
                point,
                str(seed),
                *(f"{r[key]:.4f}" if key in r else "–" for key in rates),
                *(f"{r[key]:.1f}" if key in r else "–" for key in others),
            ]
        )
    return rows


def _bd_table(records, measure: Measure) -> list[list[str]]:
    """BD-rate of Omni-ICM, or the first learned codec, against every other curve, seed by seed.

    A curve that does not depend on the seed (one file format on one network) stands against all.
    """
    arms = [r["arm"] for r in records if r["kind"].startswith("stream")]
    known = ("omni", "disentangled", "c51", "c51-d")
    ours = next((arm for arm in known if arm in arms), next(iter(arms), None))
    rows = [[f"BD-rate of {NAMES.get(ours, ours)} against", "bits at equal quality"]]
    seeds = sorted({record["seed"] for record in records})
    each = [curves_of([r for r in records if r["seed"] == s], measure.key) for s in seeds]
    for name in curves_of(records, measure.key):
        if ours is None or name == ours:
            continue
        pairs = [(own[name], own[ours]) for own in each if name in own and ours in own]
        values = np.array([bd_rate(anchor[:, :2], curve[:, :2]) for anchor, curve in pairs])
        if not len(values) or np.isnan(values).any():
            few = any(min(map(len, pair)) < 2 for pair in pairs)
            text = "– (needs two points)" if few else "– (no quality that both curves reach)"
        elif len(values) == 1:
            text = f"{values[0]:+.1f} %"
        else:
            each_text = ", ".join(f"{value:+.1f}" for value in values)
            text = f"{values.mean():+.1f} ± {values.std():.1f} % (by seed: {each_text})"
        rows.append([NAMES.get(name, name), text])
    return rows


def _draw_training(runs, workdir):
    """Loss over steps, a panel per task with names beneath; seeds share a name and a colour."""
    logs = {run.name: _read_lines(workdir / run.name / "metrics.jsonl") for run in runs}
    kinds = sorted({run.task.name for run in runs})
    figure = Figure(figsize=(5 * len(kinds), 3.4), dpi=110)
    figure.subplots_adjust(wspace=0.3)
    axes = figure.subplots(1, len(kinds), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        looks, losses = {}, []
        for run in runs:
            if run.task.name != kind or not logs[run.name]:
                continue
            name = re.sub(r"^seed\d+/", "", run.name)
            label = name if name not in looks else None
            dashes, colour = divmod(looks.setdefault(name, len(looks)), len(TAB20))
            look = dict(color=TAB20[colour], linestyle=DASHES[dashes % len(DASHES)], linewidth=1)
            own = [line["loss"] for line in logs[run.name]]
            axis.plot([line["step"] for line in logs[run.name]], own, label=label, **look)
            losses += own
        if losses:
            if min(losses) > 0 and max(losses) > WIDE * min(losses):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            beneath = dict(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
            axis.legend(fontsize=6, ncols=1 if len(looks) < 4 else 3, **beneath)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
    return save(figure, workdir / "training.png")


def _provenance(config, workdir) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    command = _read_json(workdir / "command.json", {}).get("command", "unknown")
    return "\n".join(
        [
            command,
            "",
            f"python {platform.python_version()}, {platform.machine()}, "
            f"{os.cpu_count()} CPU cores; {jax.device_count()} × {jax.devices()[0].device_kind}",
            ", ".join(versions),
            f"commit {_commit()}",
            "",
            json.dumps(json.loads(config.to_json_best_effort()), indent=1),
        ]
    )


def _commit() -> str:
    try:
        here = pathlib.Path(__file__).parent
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _markdown(parts) -> str:
    lines = []
    for kind, content in parts:
        if kind in ("h1", "h2"):
            lines.append(f"{'#' * int(kind[1])} {content}")
        elif kind == "image":
            lines.append(f"![{content}]({content})")
        elif kind == "code":
            lines.append(f"```\n{content}\n```")
        elif kind == "table":
            head, *rest = content
            ruled = [head, ["---"] * len(head), *rest]
            lines.append("\n".join("| " + " | ".join(row) + " |" for row in ruled))
        else:
            lines.append(content)
    return "\n\n".join(lines) + "\n"


def _html(parts, workdir) -> str:
    body = []
    for kind, content in parts:
        if kind == "image":
            data = base64.b64encode((workdir / content).read_bytes()).decode()
            body.append(f'<img alt="{content}" src="data:image/png;base64,{data}">')
        elif kind == "table":
            head, *rest = ([html.escape(cell) for cell in row] for row in content)
            cells = ["<tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>"]
            cells += ["<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rest]
            body.append("<table>" + "".join(cells) + "</table>")
        else:
            tag = {"code": "pre"}.get(kind, kind)
            body.append(f"<{tag}>{html.escape(content)}</{tag}>")
    style = (
        "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{border:1px solid #ccc;"
        "padding:.2em .6em;text-align:right}pre{background:#f4f4f4;padding:1em;overflow:auto}"
    )
    title = html.escape(parts[0][1])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style><body>" + "\n".join(body) + "</body></html>\n"
    )


def _read_json(path: pathlib.Path, absent):
    return json.loads(path.read_text()) if path.is_file() else absent


def _read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
