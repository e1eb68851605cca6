"""From the records of finished runs to a page: report.md and report.html.

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
import subprocess
from collections.abc import Sequence

import jax
import ml_collections

from icm_jax.data import place_of
from icm_jax.engine.run import Run, read_records, what_is_done
from icm_jax.files import read_json, write_whole
from icm_jax.measure import draws
from icm_jax.report import (
    curves,
    detections,
    latents,
    looks,
    masks,
    noise,
    objects,
    outside,
    pictures,
    speed,
    tables,
    training,
)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "numba", "tensorflow-datasets")
ARMS_NOTE = (
    "Means and population standard deviations over the seeds; images per second are those of "
    "inference, medians over the seeds; network: of arrays on the device; from files: read by all "
    "cores, then the network. Multiply-accumulates of an image are counted on the program, with "
    "those of a codec's decoder. MB of a batch: what the network's program takes at once or, where "
    "it takes more, the decoder's of as many images."
)
DRAWS_NOTE = (
    f"{tables.WITHIN}: {draws.DRAWS} times as many images are drawn anew, with replacement, the "
    "same for all curves; what is between holds of so many of them. It tells what other images of "
    "the kind would change, and nothing of other trainings."
)

TASKS_NOTE = "Bits at equal score by BD-rates, of the figures below."

NOISE_NOTE = (
    "White Gaussian noise of the deviation σ, in levels of 255, is added before an image is coded, "
    "the same for all arms; none was trained with it."
)


def write_report(
    config: ml_collections.ConfigDict,
    runs: Sequence[Run],
    workdir: str | os.PathLike,
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Writes report.html, report.md and their PNG files into `workdir`; returns the HTML's path.

    `notes` are sentences that stand first: what was asked for and is not there.
    """
    workdir = pathlib.Path(workdir)
    records = [record for run in runs for record in read_records(workdir / run.name)]
    pictures_on = next((p.data for run in runs for p in run.evaluate if p.kind == "picture"), None)
    foreign = outside.read(config.get("outside", ()), pictures_on, runs[0].seed if runs else 0)
    records += foreign
    missing = [run.name for run in runs if what_is_done(workdir / run.name) is None]
    parts: list[tuple[str, object]] = [("h1", f"{config.name} on {config.data.name}")]
    parts += [("p", note) for note in notes]
    if missing:
        parts.append(("p", "Not finished yet: " + ", ".join(missing)))
    scored = _scored(records)
    table = tables.task_table(_tasks(scored))
    parts += [("h2", "Tasks"), ("table", table), ("p", TASKS_NOTE)] * bool(table)
    for measure, of_set, place in scored:
        parts += _of_curves(of_set, measure, workdir, place)
    if foreign:
        parts.append(("table", outside.commands(foreign)))
    parts += _of_arms(records, workdir)
    disturbed = noise.noise_table(records)
    parts += [("h2", "Images with noise"), ("table", disturbed), ("p", NOISE_NOTE)] * bool(
        disturbed
    )
    streams = [record for record in records if record["kind"] == "stream"]
    if streams:
        parts += [("h2", "Bitstreams"), ("table", tables.stream_table(streams))]
    frozen = [run for run in runs if (workdir / run.name / "codec.icmc").is_file()]
    detectors = [run for run in runs if "objects" in run.needs and run.name not in missing]
    heads = [run for run in detectors if run.task.name == "object_detection"]
    for masked in (False, True):
        for place, of_set in _by_set([run for run in heads if run.task.masks == masked]):
            parts += objects.objects(of_set, workdir, place)
    if detectors and not heads:
        parts += detections.detections(detectors[0], frozen, workdir)
    segmenters = [run for run in runs if "mask" in run.needs and run.name not in missing]
    for place, of_set in _by_set(segmenters):
        parts += masks.segmentations(of_set, workdir, place)
    if any(point.kind in ("stream", "picture") for run in runs for point in run.evaluate):
        parts += pictures.decoded(runs, workdir)
    parts += latents.latents(frozen, workdir)
    parts += [("h2", "Training"), ("image", training.draw_training(runs, workdir))]
    parts += [("h2", "How this was made"), ("code", _provenance(config, workdir))]
    write_whole(workdir / "report.md", _markdown(parts).encode())
    write_whole(workdir / "report.html", _html(parts, workdir).encode())
    return workdir / "report.html"


def _scored(records: list[dict]) -> list[tuple[curves.Measure, list[dict], str]]:
    """Each measure with the records of one data set that have it, and which set that is; of other
    sets than the run's own the measure says it, too."""
    found = []
    for measure in curves.MEASURES:
        having = [r for r in records if r.get("curve") == measure.curve and measure.key in r]
        for place in dict.fromkeys(map(looks.set_of, having)):
            of_set = [record for record in having if looks.set_of(record) == place]
            titled = f"{measure.title}, on {place}" if place else measure.title
            found.append((measure._replace(title=titled), of_set, place))
    return found


def _tasks(scored) -> list[tuple[curves.Measure, list[dict]]]:
    """Of each task of machines the first measure."""
    first = {(m.curve, place): (m, of_set) for m, of_set, place in reversed(scored)}
    return [found for (curve, _), found in reversed(first.items()) if curve != "image"]


def _of_curves(scored, measure: curves.Measure, workdir, place: str) -> list[tuple[str, object]]:
    """Figure and tables of one measure over the rate on one data set."""
    several = [m.curve for m in curves.MEASURES].count(measure.curve) > 1
    name = f"rate_{measure.key if several else measure.curve}"
    name = looks.placed(name + "_instances" * (measure.curve == "instances"), place)
    seeds = len({record["seed"] for record in scored})
    spread = "mean and population standard deviation over the seeds"
    further = [tables.loss_table(scored, measure), tables.bd_table(scored, measure)]
    further += [tables.class_table(scored, measure)] if measure.classes else []
    drawn = any("draws" in record for record in scored)
    return [
        ("h2", measure.title),
        ("image", curves.draw_curves(scored, workdir / name, measure)),
        ("p", "One seed." if seeds == 1 else f"{seeds} seeds; {spread}."),
        ("table", tables.curve_table(scored, measure)),
        *[("table", table) for table in further if len(table) > 1],
        *([("p", DRAWS_NOTE)] if drawn else []),
    ]


def _by_set(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of each data set with its name, which is "" if there is one."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(place_of(run.data), []).append(run)
    return [(place if len(found) > 1 else "", several) for place, several in found.items()]


def _of_arms(records, workdir) -> list[tuple[str, object]]:
    """Figure and table of networks that are compared in speed, too."""
    speeds = [record for record in records if record.get("curve") == "speed"]
    timed = {tables.arm_of(record) for record in speeds}
    arms = [r for r in records if r.get("curve") in ("arms", "classify")]
    arms = [r for r in arms if r["curve"] == "arms" or tables.arm_of(r) in timed]
    if not arms:
        return []
    drawn = [("image", speed.draw_speed(arms, speeds, workdir / "speed.png"))] if speeds else []
    table = [("table", tables.arms_table(arms, speeds)), ("p", ARMS_NOTE)]
    return [("h2", "Arms: accuracy, speed and cost"), *drawn, *table]


def _provenance(config, workdir) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    kept = workdir / "command.json"
    remedy = "remove it, and the report is written without the command"
    command = read_json(kept, dict, remedy).get("command") if kept.is_file() else None
    return "\n".join(
        [
            command or "unknown",
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
