"""From the records of finished runs to tables, curves and pictures: report.md and report.html.

Reads records.json and metrics.jsonl of each run (schema: `icm_jax.evaluate`). What a run has not
produced yet is named in the report instead of being drawn.
"""

import base64
import html
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax
import numpy as np
from matplotlib.figure import Figure

from icm_jax import views
from icm_jax.codecs import CODECS
from icm_jax.codecs import codec as codecs
from icm_jax.data import open_source, pipeline
from icm_jax.evaluators.metrics import bd_rate

TITLES = {
    "classify": "Classification, tail fine-tuned",
    "linear": "Classification, linear",
    "segment": "Semantic segmentation",
}
COLOURS = {"omni": "#0072B2", "unfiltered": "#D55E00", "jpeg": "#009E73", "webp": "#CC79A7"}
NAMES = {"omni": "Omni-ICM (α > 0)", "unfiltered": "α = 0 twin", "jpeg": "JPEG", "webp": "WebP"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "numba", "tensorflow-datasets")


def write_report(config, runs, workdir: str | os.PathLike) -> pathlib.Path:
    """Writes report.html, report.md and their PNG files into `workdir`; returns the HTML's path."""
    workdir = pathlib.Path(workdir)
    records = [r for run in runs for r in _read_json(workdir / run.name / "records.json", [])]
    missing = [run.name for run in runs if not (workdir / run.name / "done.json").is_file()]
    parts: list[tuple[str, str]] = [("h1", f"{config.name} on {config.data.name}")]
    if missing:
        parts.append(("p", "Not finished yet: " + ", ".join(missing)))
    for curve in TITLES:
        own = [record for record in records if record.get("curve") == curve]
        if own:
            parts += [("h2", TITLES[curve])]
            parts += [("image", _draw_curves(own, workdir / f"rate_{curve}.png", curve))]
            seeds = len({record["seed"] for record in own})
            spread = "mean and population standard deviation over the seeds"
            parts += [("p", "One seed." if seeds == 1 else f"{seeds} seeds; {spread}.")]
            parts += [("table", _curve_table(own)), ("table", _bd_table(own))]
    streams = [record for record in records if record["kind"] == "stream"]
    if streams:
        parts += [("h2", "Bitstreams"), ("table", _stream_table(streams))]
    parts += [("h2", "Decoded features"), *_samples(config, runs, workdir)]
    parts += [("h2", "Training"), ("image", _draw_training(runs, workdir))]
    parts += [("h2", "How this was made"), ("code", _provenance(config, workdir))]
    _write(workdir / "report.md", _markdown(parts))
    _write(workdir / "report.html", _html(parts, workdir))
    return workdir / "report.html"


def quality_of(record: dict) -> float:
    """top1 or miou of a record, as a share."""
    return record["miou"] if "miou" in record else record["top1"]


def curves_of(records: list[dict], rate: str = "bpp") -> dict[str, np.ndarray]:
    """Points of each curve, averaged over seeds: {name: float [n, 4]} of (bpp, quality, ± both)."""
    points: dict[tuple, list] = {}
    for record in records:
        if rate not in record:
            continue
        stream = record["kind"] == "stream"
        name = record["arm"] if stream else record["kind"].split("-")[0]
        point = record["point"] if stream else record["kind"]
        points.setdefault((name, point), []).append((record[rate], quality_of(record)))
    curves: dict[str, list] = {}
    for (name, _), values in points.items():
        values = np.array(values)
        curves.setdefault(name, []).append([*values.mean(axis=0), *values.std(axis=0)])
    return {name: np.array(sorted(rows)) for name, rows in curves.items()}


def _draw_curves(records, path, curve):
    figure = Figure(figsize=(7.5, 5), dpi=120)
    axes = figure.subplots()
    for name, rows in curves_of(records).items():
        axes.errorbar(
            rows[:, 0],
            100 * rows[:, 1],
            100 * rows[:, 3],
            rows[:, 2],
            marker="o",
            color=COLOURS[name],
            label=NAMES[name],
            capsize=2,
        )
    bare = curves_of([r for r in records if r["kind"].startswith("jpeg")], "bpp_without_tables")
    for rows in bare.values():
        axes.plot(
            rows[:, 0],
            100 * rows[:, 1],
            "--",
            color=COLOURS["jpeg"],
            linewidth=1,
            label="JPEG without its tables",
        )
    pixels = [quality_of(record) for record in records if record["kind"] == "pixels"]
    if pixels:
        axes.axhline(
            100 * np.mean(pixels), color="grey", linestyle=":", label="uncompressed pixels"
        )
    axes.set_xscale("log")
    axes.set_xlabel("bits per pixel, measured on whole files")
    axes.set_ylabel("mIoU [%]" if curve == "segment" else "top-1 accuracy [%]")
    axes.set_title(TITLES[curve])
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, path)


def _curve_table(records) -> list[list[str]]:
    measure = "mIoU [%]" if "miou" in records[0] else "top-1 [%]"
    rows = [
        [
            "curve",
            "point",
            "seed",
            "bpp measured",
            "bpp without tables",
            measure,
            "top-5 [%]",
            "images",
        ]
    ]
    for r in sorted(records, key=lambda r: (r["arm"], r["kind"].split("-")[0], r.get("bpp", 99))):
        stream = r["kind"] == "stream"
        name = NAMES[r["arm"]] if stream else f"pixels: {r['kind'].split('-')[0]}"
        point = f"λ = {r['point']}" if stream else r["kind"].partition("-")[2]
        rates = [f"{r[key]:.4f}" if key in r else "–" for key in ("bpp", "bpp_without_tables")]
        top5 = f"{100 * r['top5']:.1f}" if "top5" in r else "–"
        rows.append(
            [
                name,
                point,
                str(r["seed"]),
                *rates,
                f"{100 * quality_of(r):.1f}",
                top5,
                str(r["images"]),
            ]
        )
    return rows


def _stream_table(records) -> list[list[str]]:
    """Each codec once: where its bits go, how near they are to the estimate, how long it takes."""
    segments = list(dict.fromkeys(key for r in records for key in r if key.startswith("bpp_")))
    segments = [key for key in segments if key not in ("bpp_estimated", "bpp_header")]
    rows = [
        [
            "codec",
            "λ",
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
    codecs_seen = {(r["arm"], r["point"], r["seed"]): r for r in reversed(records)}
    for (arm, point, seed), r in sorted(codecs_seen.items(), key=lambda item: item[1]["bpp"]):
        rates = ("bpp", "bpp_estimated", "bpp_header", *segments)
        others = ("worst_gap_bytes", "encode_ms", "decode_ms")
        rows.append(
            [
                NAMES[arm],
                point,
                str(seed),
                *(f"{r[key]:.4f}" if key in r else "–" for key in rates),
                *(f"{r[key]:.1f}" if key in r else "–" for key in others),
            ]
        )
    return rows


def _bd_table(records) -> list[list[str]]:
    curves = curves_of(records)
    rows = [["BD-rate of Omni-ICM against", "bits at equal quality"]]
    for name in curves:
        if "omni" in curves and name != "omni":
            value = bd_rate(curves[name][:, :2], curves["omni"][:, :2])
            text = f"{value:+.1f} %"
            if np.isnan(value):
                few = min(len(curves[name]), len(curves["omni"])) < 2
                text = "– (needs two points)" if few else "– (no quality that both curves reach)"
            rows.append([NAMES[name], text])
    return rows


def _samples(config, runs, workdir) -> list[tuple[str, object]]:
    """Images beside their decoded features (first three principal components as colours)."""
    drawn = [
        run
        for run in runs
        if "stream" in run.evaluate and (workdir / run.name / "codec.icmc").is_file()
    ]
    seen, columns = set(), []
    for run in drawn:
        label = (run.labels.arm, run.labels.point)
        if run.seed == drawn[0].seed and label not in seen:
            seen.add(label)
            columns.append((label, codecs.load(workdir / run.name / "codec.icmc", CODECS)))
    if not columns:
        return [("p", "No frozen codec yet.")]
    source = open_source(config.data, "validation")
    batch = next(
        pipeline.evaluation_batches(source, batch_size=4, canvas=(config.data.canvas,) * 2)
    )
    images = np.asarray(views.centre(batch["image"], config.model.size))
    figure = Figure(figsize=(1.7 * (len(columns) + 1), 1.8 * len(images)), dpi=110)
    axes = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
    for number, ((arm, point), frozen) in enumerate(columns, 1):
        streams = codecs.encode(frozen, images)
        colours = principal_colours(codecs.decode(frozen, streams, "feature"))
        axes[0, number].set_title(f"{arm}\nλ = {point}", fontsize=8)
        for row, data in enumerate(streams):
            axes[row, number].imshow(colours[row])
            rate = 8 * len(data) / images[row, ..., 0].size
            axes[row, number].set_xlabel(f"{len(data)} bytes, {rate:.3f} bpp", fontsize=6)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    return [("image", _save(figure, workdir / "features.png"))]


def principal_colours(features: np.ndarray) -> np.ndarray:
    """First three principal components of float [N, h, w, C] as float RGB in 0...1 [N, h, w, 3]."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, basis = np.linalg.svd(flat.T @ flat)
    scores = flat @ basis[:3].T
    low, high = np.percentile(scores, [2, 98], axis=0)
    return np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1).reshape(
        *features.shape[:-1], 3
    )


def _draw_training(runs, workdir):
    logs = {run.name: _read_lines(workdir / run.name / "metrics.jsonl") for run in runs}
    kinds = sorted({run.task.name for run in runs})
    figure = Figure(figsize=(4.2 * len(kinds), 3.4), dpi=110)
    axes = figure.subplots(1, len(kinds), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for run in runs:
            if run.task.name == kind and logs[run.name]:
                axis.plot(
                    [line["step"] for line in logs[run.name]],
                    [line["loss"] for line in logs[run.name]],
                    linewidth=1,
                    label=run.name,
                )
        if axis.lines:
            axis.legend(fontsize=5)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
    figure.tight_layout()
    return _save(figure, workdir / "training.png")


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


def _save(figure, path: pathlib.Path) -> str:
    figure.savefig(path, bbox_inches="tight")
    return path.name


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_json(path: pathlib.Path, absent):
    return json.loads(path.read_text()) if path.is_file() else absent


def _read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
