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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from icm_jax import checkpoint, views
from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.codecs.codec import forward
from icm_jax.data import open_source, pipeline
from icm_jax.evaluators.metrics import bd_rate
from icm_jax.evaluators.redundancy import CLUSTERS, fibres, uncertainty_coefficient
from icm_jax.files import write_whole
from icm_jax.tasks import build_task
from icm_jax.train import complete


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
    Measure("image", "ms_ssim_db", "Image quality, MS-SSIM", "MS-SSIM [dB]"),
)
DRAWN = 0.4
"""Least score of a box that is drawn."""
REDUNDANCY_IMAGES = 256
COLOURS = {"omni": "#0072B2", "unfiltered": "#D55E00", "jpeg": "#009E73", "webp": "#CC79A7"}
COLOURS |= {"disentangled": "#0072B2", "split": "#D55E00", "residual": "#E69F00"}
NAMES = {"omni": "Omni-ICM (α > 0)", "unfiltered": "α = 0 twin", "jpeg": "JPEG", "webp": "WebP"}
NAMES |= {
    "heif": "HEIF (HEVC intra)",
    "disentangled": "disentangled latents",
    "split": "split latents (Choi and Bajić)",
    "residual": "feature, then residual (SSSIC)",
    "single": "one layer (hyperprior)",
}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "numba", "tensorflow-datasets")


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
            parts += [("table", _curve_table(own, measure)), ("table", _bd_table(own, measure))]
    streams = [record for record in records if record["kind"].startswith("stream")]
    if streams:
        parts += [("h2", "Bitstreams"), ("table", _stream_table(streams))]
    detectors = [run for run in runs if run.task.name == "detection" and run.name not in missing]
    if detectors:
        parts += _boxes(detectors[0], workdir)
    if any(run.task.name != "detection" for run in runs):
        parts += _samples(config, runs, workdir)
    scalable = [run for run in runs if run.task.name == "scalable_compression"]
    scalable = [run for run in scalable if (workdir / run.name / "codec.icmc").is_file()]
    if scalable:
        parts += _latents(scalable, workdir)
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
    jpeg = [record for record in records if record["kind"].startswith("jpeg")]
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
    axes.set_xlabel("bits per pixel, measured on whole files")
    axes.set_ylabel(measure.axis)
    axes.set_title(measure.title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, path)


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
            point = f"λ = {point}"
        rows.append([title, point, str(r["seed"]), *rates, value, *last, str(r["images"])])
    return rows


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
    ours = next((arm for arm in ("omni", "disentangled") if arm in arms), next(iter(arms), None))
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


def _samples(config, runs, workdir) -> list[tuple[str, object]]:
    """Images beside what is decoded: images, or features (principal components as colours)."""
    columns: dict[str, tuple] = {}
    for run in runs:
        path = workdir / run.name / "codec.icmc"
        for point in run.evaluate:
            method, _, quality = point.partition("-")
            if method == "stream" and run.seed == runs[0].seed and path.is_file():
                title = f"{run.labels.arm}\n" + (
                    f"quality {quality}" if quality else f"λ = {run.labels.point}"
                )
                columns.setdefault(title, (path, float(quality) if quality else None))
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
    features = False
    for number, (title, (path, quality)) in enumerate(columns.items(), 1):
        frozen = model_file.load(path, CODECS)
        streams = bitstream.encode(frozen, images, quality=quality)
        output = "image" if "image" in frozen.codec.outputs else "feature"
        decoded = bitstream.decode(frozen, streams, output)
        features = output == "feature"
        pictures = principal_colours(decoded) if features else (decoded / 255).clip(0, 1)
        axes[0, number].set_title(title, fontsize=8)
        for row, data in enumerate(streams):
            axes[row, number].imshow(pictures[row])
            rate = 8 * len(data) / images[row, ..., 0].size
            axes[row, number].set_xlabel(f"{len(data)} bytes, {rate:.3f} bpp", fontsize=6)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    name = "features" if features else "images"
    title = "Decoded features" if features else "Decoded images"
    return [("h2", title), ("image", _save(figure, workdir / f"{name}.png"))]


def _boxes(run, workdir) -> list[tuple[str, object]]:
    """Validation images with the boxes that are there (dashed) and those that are found."""
    source = open_source(run.data, "validation")
    size = (run.data.canvas,) * 2
    options = dict(batch_size=8, canvas=size, boxes=run.data.boxes, limit=8)
    batch = next(pipeline.evaluation_batches(source, **options))
    task = build_task(complete(run.task, source))
    variables = checkpoint.load_variables(workdir / run.name)
    found = jax.device_get(jax.jit(task.predict)(variables, {"image": batch["image"]}))
    figure = Figure(figsize=(12, 6.5), dpi=110)
    for row, axis in enumerate(figure.subplots(2, 4).ravel()):
        axis.set_axis_off()
        if not batch["valid"][row]:
            continue
        height, width = batch["extent"][row]
        axis.imshow(batch["image"][row, :height, :width])
        for box in batch["boxes"][row][batch["box_valid"][row]]:
            draw_box(axis, box, size, "white", "--")
        for i in np.flatnonzero(found["valid"][row] & (found["scores"][row] >= DRAWN)):
            label = int(found["labels"][row, i])
            text = f"{source.classes[label]} {found['scores'][row, i]:.2f}"
            draw_box(axis, found["boxes"][row, i], size, f"C{label % 10}", "-", text)
    figure.tight_layout()
    text = f"Dashed: the truth. Lines: boxes with a score of at least {DRAWN}."
    name = _save(figure, workdir / "boxes.png")
    return [("h2", "Detections"), ("image", name), ("p", text)]


def draw_box(axis, box, size: tuple[int, int], colour: str, style: str, text: str = "") -> None:
    """A rectangle (ymin, xmin, ymax, xmax), fractions of `size` in pixels, and words above it."""
    top, left, bottom, right = np.clip(box, 0, 1) * np.tile(size, 2)
    corner = (left - 0.5, top - 0.5)
    axis.add_patch(
        Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style)
    )
    if text:
        axis.text(*corner, text, color="white", backgroundcolor=colour, fontsize=6)


def _latents(runs, workdir) -> list[tuple[str, object]]:
    """Of scalable codecs: what one latent tells of the other, and the channels that cost most."""
    source = open_source(runs[0].data, "validation")
    size = (runs[0].data.canvas,) * 2
    count = min(REDUNDANCY_IMAGES, source.length)
    batches = pipeline.in_order(source, batch_size=count, canvas=size, limit=count)
    images = next(batches)["image"]
    table = [["codec", "λ", "seed", "of y_b, y_e tells", "of y_e, y_b tells"]]
    rows = []  # of the figure
    for run in tqdm.tqdm(runs, "redundancy", unit="codec"):
        frozen = model_file.load(workdir / run.name / "codec.icmc", CODECS)
        latents, costs = _costs(frozen, images)
        known = ["–" if np.isnan(value) else f"{value:.2f}" for value in _told(latents)]
        labels = run.labels
        table.append([NAMES.get(labels.arm, labels.arm), labels.point, str(run.seed), *known])
        if labels.arm not in [arm for arm, *_ in rows] and run.seed == runs[0].seed:
            rows += [(labels.arm, name, latents[name][0], costs[name]) for name in ("y_b", "y_e")]
    figure = Figure(figsize=(12, 1.6 * len(rows)), dpi=110)
    axes = figure.subplots(len(rows), 8, squeeze=False)
    for own, (arm, name, latent, bits) in zip(axes, rows, strict=True):
        order = np.argsort(-bits)[:8]
        for axis in own[len(order) :]:
            axis.set_visible(False)
        for axis, channel in zip(own, order, strict=False):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(latent[..., channel], cmap="gray")
            axis.set_xlabel(f"{100 * bits[channel] / bits.sum():.0f} % of bits", fontsize=7)
        own[0].set_ylabel(f"{arm}\n{name}", fontsize=8)
    figure.tight_layout()
    text = (
        f"Uncertainty coefficients of {count} validation images, fibres of 1×1×C in {CLUSTERS} "
        "clusters: 0, nothing; 1, all of it."
    )
    picture = ("image", _save(figure, workdir / "latents.png"))
    title = "The eight channels of each latent that cost most, of one image"
    parts = [("h2", "Redundancy"), ("table", table), ("p", text)]
    return [*parts, *_redundancy_in_training(runs, workdir, images), ("h2", title), picture]


def _redundancy_in_training(runs, workdir, images) -> list[tuple[str, object]]:
    """Redundancy at the checkpoints that were kept, for the middle λ of each kind, first seed."""
    points = [run.labels.point for run in runs if run.labels.arm == runs[0].labels.arm]
    middle = points[len(points) // 2]
    chosen = [run for run in runs if run.labels.point == middle and run.seed == runs[0].seed]
    figure = Figure(figsize=(10, 3.4), dpi=110)
    axes = figure.subplots(1, 2)
    for run in tqdm.tqdm(chosen, "redundancy in training", unit="codec"):
        folder = workdir / run.name
        codec = build_task(complete(run.task, open_source(run.data, "validation"))).codec
        latents_of = jax.jit(
            lambda variables, codec=codec: jax.tree.map(
                jnp.round, codec.analyse(variables, {"image": images})
            )
        )
        steps = checkpoint.kept_steps(folder)
        told = [
            _told(jax.device_get(latents_of(checkpoint.load_variables(folder, step))))
            for step in steps
        ]
        for axis, values in zip(axes, np.transpose(told), strict=True):
            axis.plot(steps, values, marker="o", label=NAMES.get(run.labels.arm, run.labels.arm))
    for axis, title in zip(axes, ("of y_b, y_e tells", "of y_e, y_b tells"), strict=True):
        axis.set_xlabel("step")
        axis.set_title(f"{title}, λ = {middle}", fontsize=9)
        axis.set_ylim(-0.02, 1.02)
        axis.legend(fontsize=7)
    figure.tight_layout()
    return [("image", _save(figure, workdir / "redundancy.png"))]


def _told(latents) -> tuple[float, float]:
    """What y_e tells of y_b, and y_b of y_e; NaN for too few fibres."""
    base, enhancement = (fibres(latents[name]) for name in ("y_b", "y_e"))
    if len(base) < 4 * CLUSTERS:
        return float("nan"), float("nan")
    return uncertainty_coefficient(base, enhancement), uncertainty_coefficient(enhancement, base)


def _costs(frozen, images: np.ndarray) -> tuple[dict, dict]:
    """({segment: rounded latents [N, h, w, C]}, {segment: bits of each channel of image 0 [C]})."""

    @jax.jit
    def run(variables, images):
        inputs, shape = {"image": images}, images.shape[1:3]
        latents = forward(frozen.codec, variables, inputs, shape).latents
        costs = {}
        for segment in frozen.codec.segments:
            own = latents[segment.name]
            prior = segment.prior(variables, latents, own.shape)
            costs[segment.name] = prior.bits(own)[0].sum(axis=(0, 1))
        return latents, costs

    return jax.device_get(run(frozen.on_device, images))


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


def _read_json(path: pathlib.Path, absent):
    return json.loads(path.read_text()) if path.is_file() else absent


def _read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
