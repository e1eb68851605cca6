"""A task on another data set than its codec's: trained elsewhere, it writes that codec's files."""

import pathlib

import ml_collections
import numpy as np
from PIL import Image

from icm_jax.engine.run import Labels, Point, Run, Start, make_run

AUTOENCODER = dict(name="autoencoder", width=4, channels=4, centres=6, learned=True, blocks=1)


def experiment(**data) -> ml_collections.ConfigDict:
    """What all runs on one data set share."""
    train = dict(steps=3, batch_size=4, learning_rate=1e-3, optimiser="adamw", warmup_steps=1)
    train |= dict(clip_norm=1.0, accumulate=1, log_every=1, save_every=3, fsdp=1, remat="none")
    return ml_collections.ConfigDict(dict(data=dict(data, canvas=32), train=dict(train, ema=0.0)))


def codec_run() -> Run:
    """A small autoencoder, trained on the embedded scenes."""
    config = experiment(name="scenes", size=32, train=16, validation=4)
    task = dict(
        name="autoencoder_compression", codec=AUTOENCODER, size=32, target_bpp=0.5, beta=300.0
    )
    fields = dict(name="codec", seed=0, task=task, weight_decay=0.0, codec_file={})
    labels = Labels("image", "autoencoder")
    return make_run(
        config, config.train, labels=labels, evaluate=(Point("picture"),), side=32, **fields
    )


def squares(folder: pathlib.Path) -> pathlib.Path:
    """A folder of two classes, dark and light squares on noise, of 16 images each."""
    rng = np.random.default_rng(0)
    for number in range(32):
        pixels = rng.integers(64, 192, (32, 32, 3)).astype(np.uint8)
        pixels[8:24, 8:24] = 255 * (number % 2)
        path = folder / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def task_run(path: pathlib.Path, codec_workdir: pathlib.Path) -> Run:
    """A cResNet on the codes of those images, by the codec of the other work directory."""
    config = experiment(name="folder", path=str(path))
    task = dict(name="classification", frontend="code", codec=AUTOENCODER, size=32)
    task |= dict(mode="finetune", variant="c39", width=2, crop=(0.5, 1.0), dtype="float32")
    start = Start("codec", workdir=str(codec_workdir), codec=True)
    fields = dict(name="squares", seed=1, task=task, weight_decay=0.0, start=(start,))
    labels = Labels("classify", "squares")
    return make_run(
        config, config.train, labels=labels, needs=("label",), evaluate=(Point("stream"),), **fields
    )
