"""Of codecs with two layers: what the latent of one tells of the other's, and the channels that
cost most."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure

from icm_jax.codecs import CODECS, model_file
from icm_jax.codecs.codec import Codec, Segment, forward, pass_masks, seen
from icm_jax.data import pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import Labels, Run
from icm_jax.engine.train import complete
from icm_jax.measure.redundancy import CLUSTERS, fibres, uncertainty_coefficient
from icm_jax.report.detections import middle_quality
from icm_jax.report.looks import save
from icm_jax.tasks import build_task

REDUNDANCY_IMAGES = 256


def codec_of(run: Run) -> Codec:
    """The codec that a run trains or stands on."""
    codec = build_task(complete(run, open_source(run.data, "validation"))).codec
    assert codec
    return codec


def layer_latents(codec: Codec) -> list[str]:
    """Of each layer the first segment that others tell of: what its side information is for."""
    told = [s for s in codec.segments if s.reach is None or s.reach.factors]
    return list({segment.layer: segment.name for segment in reversed(told)}.values())[::-1]


def latents(runs: Sequence[Run], workdir: pathlib.Path) -> list[tuple[str, object]]:
    """The part on the codecs of two layers among those that the runs trained."""
    pairs = {run.name: layer_latents(codec_of(run)) for run in runs}
    runs = [run for run in runs if len(pairs[run.name]) == 2]
    if not runs:
        return []
    titles = told_titles(*pairs[runs[0].name])
    source = open_source(runs[0].data, "validation")
    count = min(REDUNDANCY_IMAGES, source.length)
    spec = pipeline.image_spec(runs[0].data, count)
    images = next(pipeline.in_order(source, spec, limit=count))["image"]
    table = [["codec", "λ", "seed", *titles]]
    rows = []  # of the figure
    for run in tqdm.tqdm(runs, "redundancy", unit="codec"):
        frozen = model_file.load(workdir / run.name / "codec.icmc", CODECS)
        (latents, costs), pair = _costs(frozen, _inputs(run, images)), pairs[run.name]
        told = _told(*(latents[name] for name in pair))
        known = ["–" if np.isnan(value) else f"{value:.2f}" for value in told]
        labels = run.labels or Labels("", run.name)
        table.append([labels.title or labels.arm, labels.point, str(run.seed), *known])
        if labels.arm not in [arm for arm, *_ in rows] and run.seed == runs[0].seed:
            rows += [(labels.arm, name, latents[name][0], costs[name]) for name in pair]
    text = (
        f"Uncertainty coefficients of {count} validation images, fibres of 1×1×C in {CLUSTERS} "
        "clusters: 0, nothing; 1, all of it."
    )
    parts = [("h2", "Redundancy"), ("table", table), ("p", text)]
    parts += _redundancy_in_training(runs, workdir, images, titles)
    parts.append(("h2", "The eight channels of each latent that cost most, of one image"))
    return [*parts, ("image", _draw_channels(rows, workdir / "latents.png"))]


def told_titles(base: str, enhancement: str) -> tuple[str, str]:
    """What the two coefficients are called."""
    return f"of {base}, {enhancement} tells", f"of {enhancement}, {base} tells"


def _draw_channels(rows, path) -> str:
    """A row a latent: (arm, name, latent [h, w, C], bits of each channel [C])."""
    figure = Figure(figsize=(12, 1.6 * len(rows)), dpi=110)
    axes = figure.subplots(len(rows), 8, squeeze=False)
    for cells, (arm, name, latent, bits) in zip(axes, rows, strict=True):
        order = np.argsort(-bits)[:8]
        for axis in cells[len(order) :]:
            axis.set_visible(False)
        for axis, channel in zip(cells, order, strict=False):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(latent[..., channel], cmap="gray")
            axis.set_xlabel(f"{100 * bits[channel] / bits.sum():.0f} % of bits", fontsize=7)
        cells[0].set_ylabel(f"{arm}\n{name}", fontsize=8)
    figure.tight_layout()
    return save(figure, path)


def _redundancy_in_training(runs, workdir, images, titles) -> list[tuple[str, object]]:
    """Redundancy at the checkpoints that were kept, for the first λ of each kind, first seed.

    The first λ, as the codecs of the others may start from it.
    """
    point = runs[0].labels.point
    chosen = [run for run in runs if run.labels.point == point and run.seed == runs[0].seed]
    figure = Figure(figsize=(10, 3.4), dpi=110)
    axes = figure.subplots(1, 2, sharey=True)
    for run in tqdm.tqdm(chosen, "redundancy in training", unit="codec"):
        folder = workdir / run.name
        codec, inputs = codec_of(run), _inputs(run, images)

        @jax.jit
        def latents_of(variables, codec=codec, inputs=inputs):
            found = codec.analyse(variables, inputs)
            return [jnp.round(found[name]) for name in layer_latents(codec)]

        steps = checkpoint.kept_steps(folder)
        told = [
            _told(*jax.device_get(latents_of(checkpoint.load_variables(folder, step))))
            for step in steps
        ]
        for axis, values in zip(axes, np.transpose(told), strict=True):
            axis.plot(steps, values, marker="o", label=run.labels.title or run.labels.arm)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xlabel("step")
        axis.set_title(f"{title}, λ = {point}", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.tight_layout()
    return [("image", save(figure, workdir / "redundancy.png"))]


def _told(base: np.ndarray, enhancement: np.ndarray) -> tuple[float, float]:
    """What the second latent [N, h, w, C] tells of the first, and the first of the second; NaN for
    too few fibres."""
    base, enhancement = fibres(base), fibres(enhancement)
    if len(base) < 4 * CLUSTERS:
        return float("nan"), float("nan")
    return uncertainty_coefficient(base, enhancement), uncertainty_coefficient(enhancement, base)


def _inputs(run: Run, images: np.ndarray) -> dict[str, np.ndarray]:
    """Of a codec: images, where it has qualities at the middle one."""
    quality = middle_quality(run)
    one = {} if quality is None else {"quality": np.full(len(images), quality / 100, np.float32)}
    return {"image": images} | one


def _costs(frozen, inputs: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """({segment: rounded latents [N, h, w, C]}, {segment: bits of each channel of image 0 [C]})."""

    @jax.jit
    def run(variables, inputs):
        latents = forward(frozen.codec, variables, inputs, inputs["image"].shape[1:3]).latents
        decoded = inputs | latents
        costs = {s.name: _bits(s, variables, decoded)[0] for s in frozen.codec.segments}
        return latents, {name: bits.sum(axis=(0, 1)) for name, bits in costs.items()}

    return jax.device_get(run(frozen.on_device, inputs))


def _bits(segment: Segment, variables, decoded):
    """Of each element of a latent, pass by pass: float32 [N, h, w, C]."""
    latent = decoded[segment.name]
    total, known = jnp.zeros(latent.shape, jnp.float32), np.zeros(latent.shape[1:], bool)
    for mask in pass_masks(segment, latent.shape):
        given = seen(segment, decoded, jnp.where(known[None], latent, 0.0), known)
        bits = segment.prior(variables, given, latent.shape).bits(latent)
        total, known = jnp.where(mask[None], bits, total), known | mask
    return total
