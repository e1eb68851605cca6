"""Of scalable codecs: what one latent tells of the other, and the channels that cost most."""

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure

from icm_jax.codecs import CODECS, model_file
from icm_jax.codecs.codec import forward
from icm_jax.data import open_source, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.train import complete
from icm_jax.measure.redundancy import CLUSTERS, fibres, uncertainty_coefficient
from icm_jax.report.looks import save, title_of_arm
from icm_jax.tasks import build_task

REDUNDANCY_IMAGES = 256


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
        table.append([title_of_arm(labels), labels.point, str(run.seed), *known])
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
            axis.plot(steps, values, marker="o", label=title_of_arm(run.labels))
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
