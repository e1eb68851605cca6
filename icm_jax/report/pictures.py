"""Images beside what codecs decode of them: images, or features as colours.

A function that draws a part of a report returns a list of (kind, content), as
`icm_jax.report.page` writes them, with the PNG file in the experiment's folder.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.data import pipeline
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import Labels, Run, codec_path
from icm_jax.report.looks import save, title_of
from icm_jax.tasks import views


def decoded(runs: Sequence[Run], workdir: pathlib.Path) -> list[tuple[str, object]]:
    """Images beside what is decoded: images, or features (principal components as colours)."""
    columns: dict[str, tuple] = {}
    bare = [run for run in runs if not run.needs and any(p.kind == "picture" for p in run.evaluate)]
    for run in bare or runs:  # codecs themselves, or those that tasks stand on
        path = codec_path(run, workdir)
        for point in run.evaluate:
            streamed = point.kind in ("stream", "picture")
            if streamed and run.seed == runs[0].seed and path and path.is_file():
                labels, one = run.labels or Labels("", run.name), point.quality is None
                text = title_of(labels.point) if one else f"quality {point.quality:g}"
                columns.setdefault(f"{labels.arm}\n{text}", (path, point.quality))
    if not columns:
        return [("p", "No frozen codec yet.")]
    source = open_source(runs[0].data, "validation")
    batch = next(pipeline.evaluation_batches(source, pipeline.image_spec(runs[0].data, 4)))
    images = np.asarray(views.centre(batch["image"], (bare or runs)[0].task.size))
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
