"""Image codecs for humans: rate against PSNR and MS-SSIM, with JPEG and WebP beside them.

    Command: python -m icm_jax.main --config=configs/hyperprior.py
    Takes:   not timed: 1,500 steps of 16 × 64 × 64 pixels
    On:      2 CPU cores
    Expect:  no number of ours: a first look at one variable-rate model

    Command: python -m icm_jax.main --config=configs/hyperprior.py:sweep
    Takes:   not run here: three kinds, a model per λ, 1,000,000 steps of each
    On:      accelerators; `--mode=plan` says which
    Expect:  no number of ours: published schedule

    Command: python -m icm_jax.main --config=configs/hyperprior.py:large
    Takes:   not run here to its end (N = 192, M = 320; 1,000,000 steps)
    On:      one H100 trains 2,677 images of 256 × 256 pixels a second at batch 32 (docs/gpu.md)
    Expect:  no number of ours: published schedule

    Command: python -m icm_jax.main --config=configs/hyperprior.py:boxed --config.data.path=PHOTOS
    Takes:   65 minutes
    On:      2 CPU cores
    Expect:  the first model in the package: on Kodak 1 to 12, 33 % fewer bits than JPEG at equal
             PSNR, 51 % fewer at equal MS-SSIM (icm_jax/models/photo-dd3a2b88.md)

    Command: python -m icm_jax.main --config=configs/hyperprior.py:photo --config.data.path=PHOTOS
    Takes:   not run here by this command; by launch/train_resident.py 8 minutes, after 9 minutes of
             a larger one whose weights it starts from
    On:      one H200
    Expect:  the model in the package: on Kodak 1 to 12, 54 % fewer bits than JPEG at equal PSNR,
             66 % fewer at equal MS-SSIM (icm_jax/models/photo.md)

On your own images: `--config.data.name=photos --config.data.path=FOLDER`.
"""

import dataclasses

import ml_collections

from configs import common
from icm_jax.engine.run import Labels, Point, Run, Start, make_run
from icm_jax.measure.points import file_points

LAMBDAS = (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800)
"""The field's λ for the mean squared error on 0...255 (docs/papers.md 6.2)."""
LAMBDAS_MS_SSIM = (2.40, 4.58, 8.73, 16.64, 31.73, 60.50, 115.37, 220.00)
SHARED = ("levels", "dtype")
OF_IMAGE = ("width", "channels", "last")
OF_SLICES = ("widths", "slices", "checkered", "blocks", "back_blocks", "inner")
"""Fields of codecs: of all, of `image_codec`, of `space_channel_codec`."""


def demo() -> dict:
    """One small variable-rate mean-scale hyperprior on the embedded data."""
    return dict(
        name="hyperprior",
        seeds=(0,),
        model=dict(
            kinds=("mean_scale_hyperprior",),
            width=32,  # or four, see `icm_jax.codecs.hyperprior.image_codec`
            channels=48,
            last=5,
            levels=5,  # of quality; 1: a model for every λ
            dtype="float32",
            metric="mse",
            ms_ssim_weight=0.0,  # with metric="both"
            lambdas=(0.0018, 0.18),  # the ends, or with levels=1 the models
            size=64,  # of training views
            straight_through=False,
        ),
        data=common.scenes(train=2000, validation=24),
        train=common.loop(
            save_every=500, **common.stage(steps=1500, learning_rate=1e-3, warmup_steps=100)
        ),
        before=dict(model=dict(), train=dict()),  # a first run with these changes, if there are any
        codec_file=dict(weights="float32", licence="", description=""),
        qualities=(0, 25, 50, 75, 100),
        files=common.files(jpeg=(5, 10, 20, 40, 60, 80), webp=(0, 10, 25, 50, 75, 90)),
    )


def sweep() -> dict:
    """The published setting: every kind, N = 128, M = 192, one model per λ."""
    config = demo()
    config["model"].update(
        kinds=("factorised", "scale_hyperprior", "mean_scale_hyperprior"),
        width=128,
        channels=192,
        levels=1,
        lambdas=LAMBDAS,
        size=256,
    )
    config["data"] = common.scenes(train=20_000, validation=24, canvas=256)
    config["train"].update(steps=1_000_000, batch_size=8, learning_rate=1e-4, save_every=5000)
    return config


def large() -> dict:
    """N = 192, M = 320, as published for the highest rates; one variable-rate model."""
    config = sweep()
    config["model"].update(
        kinds=("mean_scale_hyperprior",),
        width=192,
        channels=320,
        levels=8,
        lambdas=(LAMBDAS[0], LAMBDAS[-1]),
    )
    return config


def boxed() -> dict:
    """The first model in the package: small, every rate, on photographs at their own size.

    Narrow where the image is large, wide where it is small: M bounds what the highest rates can say
    (of the 768 numbers in 16×16 pixels the first 160 principal components give 34 dB, 256 give 42).
    The last layer is the largest; with kernels of 3×3 there, in half precision, the file stays
    below 2 MiB. Views of 256 pixels give hyper-latents of 4×4; with 2×2, all of them at an edge,
    photographs took 28 % more bits whole than in pieces of 128 pixels.

    First for the squared error alone, then for both measures of likeness: on Kodak the second run
    moves BD-rates against JPEG from -35 % (PSNR) and -29 % (MS-SSIM) to -33 % and -51 %. 65 minutes
    on two CPU cores.
    """
    config = demo()
    config["data"] = dict(name="photos", path="", canvas=321)
    config["model"].update(width=(24, 48, 96, 32), channels=256, last=3, levels=6)
    config["model"].update(size=256, straight_through=True)
    config["model"].update(metric="both", ms_ssim_weight=6000.0, lambdas=(1.9e-4, 0.017))
    config["train"].update(steps=8000, batch_size=2, learning_rate=5e-4, warmup_steps=500)
    config["train"].update(log_every=50, save_every=500)
    config["before"]["model"].update(metric="mse", lambdas=(0.001, 0.04))
    config["before"]["train"].update(steps=11_000, learning_rate=1e-3)
    config["codec_file"].update(
        weights="float16",
        licence="Apache-2.0",
        description="photographs, every rate; trained by configs/hyperprior.py:boxed",
    )
    config.update(qualities=(0, 20, 40, 60, 80, 100))
    config["files"].update(jpeg=(5, 10, 20, 40, 60, 75, 85, 92))
    return config


def photo() -> dict:
    """The model in the package: contexts over space and channels, small.

    All widths are what CPUs are quick at; nothing runs at 1/2 of the sides, and most bottlenecks
    stand at 1/8 and 1/16, where each costs less than a third of one at 1/4. Both measures of
    likeness from the start: of the loss at 0.5 bits per pixel MS-SSIM is a little more than half.
    """
    config = boxed()
    config["model"].update(kinds=("space_channel",), widths=(96, 160), slices=(48, 64, 144))
    config["model"].update(checkered=1, blocks=(2, 4, 4), back_blocks=(2, 4, 4), inner=64)
    config["model"].update(ms_ssim_weight=3000.0, lambdas=(2.5e-4, 0.045))
    config["train"].update(steps=80_000, batch_size=16, learning_rate=1e-3, warmup_steps=1000)
    config["train"].update(ema=0.999)
    config["before"] = dict(model=dict(), train=dict())
    description = "photographs, every rate; trained by configs/hyperprior.py:photo"
    config["codec_file"].update(description=description)
    return config


def tiny() -> dict:
    """A few steps of the demo, for tests."""
    config = demo()
    config["data"] = common.scenes(train=24, validation=3, canvas=64)
    config["model"].update(width=8, channels=8, levels=3)
    config["train"].update(common.few(), steps=6, warmup_steps=2)
    config.update(qualities=(0, 100), files=common.files(jpeg=(10, 40), webp=(10, 40)))
    return config


get_config = common.scales(demo, sweep, large, boxed, photo, tiny)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """A run per seed and kind, and per λ where a model has one rate; each after its `before`."""
    listed = []
    earlier = config.copy_and_resolve_references()
    for part, changes in config.before.items():
        earlier[part].update(changes)
    for seed in config.seeds:
        for kind in config.model.kinds:
            several = config.model.levels > 1
            ends = [config.model.lambdas] if several else [(v,) for v in config.model.lambdas]
            for lambdas in ends:
                rivals = not listed  # they are the same for all
                run = codec_run(config, seed, kind, lambdas, several, rivals)
                if any(config.before.values()):
                    lambdas = earlier.model.lambdas
                    first = codec_run(earlier, seed, kind, lambdas, several, False)
                    first = dataclasses.replace(first, name=run.name + "-before", evaluate=())
                    start = (Start(first.name, ("params/image_codec",)),)
                    run = dataclasses.replace(run, start=start)
                    listed.append(first)
                listed.append(run)
    return listed


def codec_run(config, seed, kind, lambdas, several, rivals) -> Run:
    """One codec."""
    point = "" if several else f"{lambdas[0]:g}"
    qualities = config.qualities if several else (None,)
    points = tuple(Point("picture", quality) for quality in qualities)
    model = {name: value for name, value in config.model.items() if name != "kinds"}
    fields = {field: model.pop(field, None) for field in (*SHARED, *OF_IMAGE, *OF_SLICES)}
    codec = {field: fields[field] for field in SHARED}
    if kind == "space_channel":
        codec |= dict(name=kind) | {field: fields[field] for field in OF_SLICES}
    else:
        codec |= dict(name="image", kind=kind) | {field: fields[field] for field in OF_IMAGE}
    return make_run(
        config,
        config.train,
        name=f"seed{seed}/{kind}" + (f"-{point}" if point else ""),
        seed=seed,
        task=dict(model, name="image_compression", codec=codec, lambdas=lambdas),
        weight_decay=0.0,
        codec_file=config.codec_file.to_dict(),
        evaluate=points + (file_points(config.files) if rivals else ()),
        labels=Labels("image", kind, point),
    )
