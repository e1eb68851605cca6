"""ResNet-50 straight on the DCT coefficients of JPEG files (Gueguen et al., NeurIPS 2018).

    Command: python -m icm_jax.main --config=configs/jpeg_dct.py
    Takes:   9 min 37 s
    On:      2 CPU cores, tests beside it
    Expect:  a table of accuracy, speed and cost of four arms; no number of it is kept

    Command: python -m icm_jax.main --config=configs/jpeg_dct.py:photos --config.data.path=FOLDER
    Takes:   not timed as a whole
    On:      an H100 that other runs shared; speed on 2 CPU cores
    Expect:  25 classes of Caltech-101: 67.2 % top-1 on RGB, 66.2 % with Deconvolution-RFA, 56.3 %
             with Downsampling (docs/without_decoding.md)

    Command: python -m icm_jax.main --config=configs/jpeg_dct.py:imagenet
    Takes:   not run here: 450,000 steps of 256 images for each arm
    On:      accelerators; `--mode=plan` says which
    Expect:  no number of ours: published schedule

Arms are "input-network":

    rgb, ycbcr    pixels; network 50, or thinned: 44 and 26 (fewer blocks), 50@0.75 (channels)
    jpeg          coefficients; networks are the seven wirings of `icm_jax.nets.dct`
    dct, random   8×8 transforms learned on pixels in YCbCr 4:2:0, from this start; dct_kept and
                  random_kept stay there

All see the same crops and flips. `data.coefficients` is the quality at which canvases are written
as JPEG files and read again, or "file" for the coefficients of the data's own files. Views are
exact crops and flips of coefficients; `data.crop=(0.35,1.0)` with `model.size` equal to
`data.canvas` augments pixels instead, by random windows, before they are written.
"""

from typing import Any

import ml_collections

from configs import common
from icm_jax.engine.run import Labels, Point, Run, make_run
from icm_jax.errors import IcmError

WIRINGS = (
    "upsampling",
    "upsampling_rfa",
    "deconvolution_rfa",
    "downsampling",
    "late_concat",
    "late_concat_rfa",
    "late_concat_rfa_thinner",
)
PIXELS = ("rgb-50", "ycbcr-50")
THINNED = ("rgb-44", "rgb-26", "rgb-50@0.75")
COEFFICIENTS = tuple(f"jpeg-{wiring}" for wiring in WIRINGS)
LEARNED = tuple(f"{start}-upsampling" for start in ("dct", "dct_kept", "random", "random_kept"))
MARKERS = dict(rgb="s", ycbcr="s", jpeg="o")
"""How points of the report tell what a network reads; learned transforms: a triangle."""
READING: dict[str, Any] = dict(coefficients="95", crop=(1.0, 1.0))
"""Fields of the data: how canvases become coefficients."""


def demo() -> dict:
    """A quarter of the channels, 96 × 96 pixels; RGB and three wirings, which differ the most."""
    return dict(
        name="jpeg_dct",
        seeds=(0,),
        arms=(
            "rgb-50",
            "jpeg-deconvolution_rfa",
            "jpeg-late_concat_rfa_thinner",
            "jpeg-downsampling",
        ),
        data=common.scenes(train=4500, validation=600, **READING),
        model=dict(width=0.25, size=96, dtype="float32"),
        train=common.loop(
            **common.stage(steps=600, learning_rate=3e-3, warmup_steps=50, weight_decay=1e-4)
        ),
        speed=16,  # images of a batch when speed is measured; 0: it is not
    )


def photos() -> dict:
    """A folder with a folder per class; 96 pixels of 128; all arms, three seeds."""
    config = demo()
    config["seeds"] = (0, 1, 2)
    config["arms"] = PIXELS + THINNED + COEFFICIENTS + LEARNED
    config["data"] = dict(name="folder", path="", canvas=128, **READING)
    config["model"].update(size=96)
    config["train"].update(steps=1200, batch_size=32)
    return config


def imagenet() -> dict:
    """As the paper: 224 pixels; 90 epochs, the rest as docs/papers.md 2.2."""
    config = demo()
    config["arms"] = PIXELS + THINNED + COEFFICIENTS + LEARNED
    config["data"] = dict(name="imagenet2012", path="", canvas=256, **READING)
    config["model"].update(width=1.0, size=224, dtype="bfloat16")
    config["train"].update(steps=450_000, batch_size=256, learning_rate=0.1, optimiser="sgd")
    config["train"].update(weight_decay=5e-5, warmup_steps=25_000, save_every=5000)
    return config


def tiny() -> dict:
    """A few steps of three arms, for tests."""
    config = demo()
    config["arms"] = ("rgb-26", "jpeg-late_concat_rfa_thinner", "dct_kept-upsampling")
    config["data"] = common.scenes(train=16, validation=8, canvas=32, **READING)
    config["model"].update(width=1 / 32, size=32)
    config["train"].update(common.few(), steps=4, warmup_steps=1)
    config["speed"] = 2
    return config


get_config = common.scales(demo, photos, imagenet, tiny)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """A network per seed and arm."""
    return [network_run(config, seed, arm) for seed in config.seeds for arm in config.arms]


def network_run(config, seed: int, arm: str) -> Run:
    """One network."""
    given, _, network = arm.partition("-")
    if not network or given.partition("_")[0] not in ("rgb", "ycbcr", "jpeg", "dct", "random"):
        raise IcmError(f"--config.arms has {arm!r}; an arm is input-network, as 'rgb-50'")
    network, _, factor = network.partition("@")
    task = dict(config.model, name="coefficient_classification", input=given, network=network)
    task |= dict(width=config.model.width * float(factor or 1))
    speed = (Point("speed", config.speed),) if config.speed else ()
    return make_run(
        config,
        config.train,
        name=f"seed{seed}/{arm}",
        seed=seed,
        task=task,
        data=dict(config.data, coefficients=config.data.coefficients if given == "jpeg" else ""),
        weight_decay=config.train.weight_decay,
        needs=("label",),
        evaluate=(Point("pixels"), *speed),
        labels=Labels("arms", arm, marker=MARKERS.get(given, "^")),
    )
