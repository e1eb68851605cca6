"""Pictures of what codecs decode, what a detector finds there, and what latents hold.

Each function draws one part of a report from finished runs: a list of (kind, content), as
`icm_jax.report.page` writes them, with the PNG file in the experiment's folder.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.codecs.codec import forward
from icm_jax.coding import container
from icm_jax.data import open_source, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.train import complete
from icm_jax.measure.redundancy import CLUSTERS, fibres, uncertainty_coefficient
from icm_jax.tasks import build_task, views

DRAWN = 0.4
"""Least score of a box that is drawn."""
REDUNDANCY_IMAGES = 256
NAMES = {"omni": "Omni-ICM (α > 0)", "unfiltered": "α = 0 twin", "jpeg": "JPEG", "webp": "WebP"}
NAMES |= {
    "heif": "HEIF (HEVC intra)",
    "vvc": "VVC intra",
    "disentangled": "disentangled latents",
    "split": "split latents (Choi and Bajić)",
    "split-cheng2020": "split latents (the original's transforms)",
    "residual": "feature, then residual (SSSIC)",
    "single": "one layer (hyperprior)",
    "r50": "ResNet-50 on decoded RGB",
    "r71": "ResNet-71 on decoded RGB",
    "c39": "cResNet-39 on the code",
    "c51": "cResNet-51 on the code",
    "c72": "cResNet-72 on the code",
    "r50-d": "ResNet-50-d on decoded RGB",
    "c39-d": "cResNet-39-d on the code",
    "c51-d": "cResNet-51-d on the code",
    "joint": "trained jointly",
    "alone": "trained on, codec frozen",
    "anew": "joint codec frozen, network anew",
    "again": "joint codec frozen, network anew and trained on",
    "jpeg2000": "JPEG 2000",
}
"""Titles of the curves."""


def title_of(point: str) -> str:
    """A point's label: numbers alone are λ."""
    return f"λ = {point}" if point.replace(".", "").replace("e-", "").isdigit() else point


def decoded(config, runs, workdir) -> list[tuple[str, object]]:
    """Images beside what is decoded: images, or features (principal components as colours)."""
    columns: dict[str, tuple] = {}
    bare = [run for run in runs if "stream" in run.evaluate and not run.needs]
    for run in bare or runs:  # codecs themselves, or those that tasks stand on
        path = workdir / run.name / "codec.icmc"
        for point in run.evaluate:
            method, _, quality = point.partition("-")
            if method == "stream" and run.seed == runs[0].seed and path.is_file():
                title = f"{run.labels.arm}\n" + (
                    f"quality {quality}" if quality else title_of(run.labels.point)
                )
                columns.setdefault(title, (path, float(quality) if quality else None))
    if not columns:
        return [("p", "No frozen codec yet.")]
    source = open_source(config.data, "validation")
    batch = next(pipeline.evaluation_batches(source, pipeline.image_spec(config.data, 4)))
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
    return [("h2", title), ("image", save(figure, workdir / f"{name}.png"))]


def _middles(runs) -> list:
    """Of each arm, first seed, the run of the middle λ."""
    arms: dict[str, list] = {}
    for run in runs:
        if run.seed == runs[0].seed:
            arms.setdefault(run.labels.arm, []).append(run)
    return [own[len(own) // 2] for own in arms.values()]


def detections(run, codecs, workdir) -> list[tuple[str, object]]:
    """Validation images with the boxes that are there (dashed) and those that are found.

    Under them, for the middle λ of each arm of `codecs`, what it decodes to and what the detector
    finds there: behind a scalable codec from the base layer alone.
    """
    source, count = open_source(run.data, "validation"), 6
    spec = pipeline.batch_spec(run.data, count)
    batch = next(pipeline.evaluation_batches(source, spec, limit=count))
    task = build_task(complete(run.task, source))
    variables = checkpoint.load_variables(workdir / run.name)
    predict = jax.jit(task.predict)
    captions = [""] * count
    rows = [("pixels", batch["image"], predict(variables, {"image": batch["image"]}), captions)]
    for codec_run in _middles(codecs):
        frozen = model_file.load(workdir / codec_run.name / "codec.icmc", CODECS)
        streams = bitstream.encode(frozen, batch["image"])
        pictures = bitstream.decode(frozen, streams, "image").clip(0, 255)
        captions, inputs = [f"{len(data)} bytes" for data in streams], {"image": pictures}
        if "feature" in frozen.codec.outputs:
            first = [container.prefix(data, 1) for data in streams]
            inputs = {"feature": bitstream.decode(frozen, first, "feature", layers=1)}
            captions = [
                f"boxes {len(base)} of {text}" for base, text in zip(first, captions, strict=True)
            ]
        arm, found = codec_run.labels.arm, predict(variables, inputs)
        title = f"{arm}\nλ = {codec_run.labels.point}"
        rows.append((title, pictures.astype(np.uint8), found, captions))
    figure = Figure(figsize=(2.1 * count, 2.2 * len(rows)), dpi=110)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for own, (title, pictures, found, captions) in zip(axes, rows, strict=True):
        found = jax.device_get(found)
        own[0].set_ylabel(title, fontsize=8)
        for row, axis in enumerate(own):
            axis.set_xticks([])
            axis.set_yticks([])
            if not batch["valid"][row]:
                continue
            height, width = batch["extent"][row]
            axis.imshow(pictures[row, :height, :width])
            axis.set_xlabel(captions[row], fontsize=7)
            for box in batch["boxes"][row][batch["box_valid"][row]]:
                _draw_box(axis, box, spec.canvas, "white", "--")
            for i in np.flatnonzero(found["valid"][row] & (found["scores"][row] >= DRAWN)):
                label = int(found["labels"][row, i])
                text = f"{source.classes[label]} {found['scores'][row, i]:.2f}"
                box = found["boxes"][row, i]
                _draw_box(axis, box, spec.canvas, f"C{label % 10}", "-", text)
    figure.tight_layout()
    text = f"Dashed: the truth. Lines: boxes with a score of at least {DRAWN}."
    if codecs:
        text += " Under the first row: decoded pictures, and the boxes that the detector finds "
        text += "in the base layer, or in the decoded picture of codecs with one layer."
    name = save(figure, workdir / "boxes.png")
    return [("h2", "Detections"), ("image", name), ("p", text)]


def _draw_box(axis, box, size: tuple[int, int], colour: str, style: str, text: str = "") -> None:
    """A rectangle (ymin, xmin, ymax, xmax), fractions of `size` in pixels, and words above it."""
    top, left, bottom, right = np.clip(box, 0, 1) * np.tile(size, 2)
    corner = (left - 0.5, top - 0.5)
    axis.add_patch(
        Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style)
    )
    if text:
        axis.text(*corner, text, color="white", backgroundcolor=colour, fontsize=6)


def latents(runs, workdir) -> list[tuple[str, object]]:
    """Of scalable codecs: what one latent tells of the other, and the channels that cost most."""
    source = open_source(runs[0].data, "validation")
    count = min(REDUNDANCY_IMAGES, source.length)
    spec = pipeline.image_spec(runs[0].data, count)
    images = next(pipeline.in_order(source, spec, limit=count))["image"]
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
    picture = ("image", save(figure, workdir / "latents.png"))
    title = "The eight channels of each latent that cost most, of one image"
    parts = [("h2", "Redundancy"), ("table", table), ("p", text)]
    return [*parts, *_redundancy_in_training(runs, workdir, images), ("h2", title), picture]


def _redundancy_in_training(runs, workdir, images) -> list[tuple[str, object]]:
    """Redundancy at the checkpoints that were kept, for the first λ of each kind, first seed.

    The first λ, as the codecs of the others may start from it.
    """
    point = runs[0].labels.point
    chosen = [run for run in runs if run.labels.point == point and run.seed == runs[0].seed]
    figure = Figure(figsize=(10, 3.4), dpi=110)
    axes = figure.subplots(1, 2, sharey=True)
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
        axis.set_title(f"{title}, λ = {point}", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.tight_layout()
    return [("image", save(figure, workdir / "redundancy.png"))]


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


def save(figure, path: pathlib.Path) -> str:
    figure.savefig(path, bbox_inches="tight")
    return path.name
