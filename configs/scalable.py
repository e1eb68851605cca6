"""Scalable codecs for a detector and for humans, beside their rivals (Özyılkan et al. 2023).

    python -m icm_jax.main --config=configs/scalable.py              # small, on the embedded data
    python -m icm_jax.main --config=configs/scalable.py:photos --config.data.path=FOLDER
                                                                     # small, on COCO JSON
    python -m icm_jax.main --config=configs/scalable.py:coco         # full widths, COCO 2014

A detector is trained first (`configs/yolov3.py`), then a codec per kind and λ with the detector
frozen, then the single-layer hyperprior. The report holds the detector's precision over the bits of
the base layer, and the picture's quality over those of both.
"""

import importlib.util
import pathlib

import ml_collections

LAMBDAS = (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483)
"""The field's λ for the mean squared error on 0...255 (papers.md 3.4)."""
DETECTOR = ("params/detector", "batch_stats/detector")


def yolov3():
    """The module configs/yolov3.py."""
    path = pathlib.Path(__file__).parent / "yolov3.py"
    spec = importlib.util.spec_from_file_location("yolov3", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(arg: str = "demo") -> ml_collections.ConfigDict:
    """Settings of one scale; every field can be overridden on the command line."""
    scales = {"demo": demo, "photos": photos, "coco": coco, "tiny": tiny}
    if arg not in scales:
        raise ValueError(f"scalable.py has no scale {arg!r}; choose one of {', '.join(scales)}")
    return ml_collections.ConfigDict(scales[arg]())


def detector(scale: str) -> dict:
    """{"data", "detector"}: a scale of configs/yolov3.py, its data apart."""
    config = getattr(yolov3(), scale)()
    for name in ("name", "seeds"):
        del config[name]
    return dict(data=config.pop("data"), detector=config)


def demo() -> dict:
    """Small widths, four rates; 96 × 96 pixels."""
    return dict(
        name="scalable",
        seeds=(0,),
        **detector("demo"),
        model=dict(
            kinds=("disentangled", "split", "residual"),
            width=32,
            base=24,  # C_b
            enhancement=32,  # C_e
            hypers=2,
            feature_weight=1000.0,
            lambdas=(0.003, 0.01, 0.03, 0.1),
            size=96,  # of training views
            straight_through=True,
        ),
        single=dict(width=32, channels=56, lambdas=(0.003, 0.01, 0.03, 0.1)),
        train=dict(
            steps=3000,
            batch_size=16,
            learning_rate=1e-3,
            optimiser="adamw",
            schedule="cosine",
            plateau=dict(interval=5000, patience=10),  # with schedule="plateau"
            warmup_steps=100,
            clip_norm=1.0,
            log_every=20,
            save_every=500,
            keep_every=500,  # for the redundancy during training; a multiple of save_every
            fsdp=1,
            ema=0.0,
        ),
    )


def photos() -> dict:
    """The same on a folder of photographs at 256 × 256 pixels."""
    config = demo() | detector("photos")
    config["model"].update(size=128)
    config["train"].update(batch_size=8)
    return config


def coco() -> dict:
    """Full widths: YOLOv3 at 416 pixels, N = 128, C_b = 128, C_e = 64, as papers.md 3 and 4."""
    config = demo() | detector("coco")
    config["model"].update(width=128, base=128, enhancement=64, lambdas=LAMBDAS, size=256)
    config["single"].update(width=128, channels=192, lambdas=LAMBDAS)
    config["train"].update(steps=1_000_000, batch_size=16, learning_rate=1e-4, save_every=5000)
    config["train"].update(schedule="plateau", keep_every=100_000)
    return config


def tiny() -> dict:
    """A few steps of the demo, for tests."""
    config = demo() | detector("tiny")
    config["model"].update(kinds=("disentangled",), width=6, base=4, enhancement=5, size=64)
    config["model"].update(lambdas=(0.01,))
    config["single"].update(width=6, channels=8, lambdas=())
    config["train"].update(steps=4, batch_size=4, warmup_steps=2, log_every=2, save_every=2)
    config["train"].update(keep_every=2)
    return config


def runs(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """Per seed a detector, then a codec per kind and λ, then the single-layer codecs."""
    with_data = config.detector.copy_and_resolve_references()
    with with_data.unlocked():
        with_data.data, with_data.seeds = config.data, config.seeds
    listed = []
    for first in yolov3().runs(with_data):
        listed.append(first)
        for kind in config.model.kinds:
            for lmbda in config.model.lambdas:
                listed.append(make_run(config, first, kind, lmbda, scalable_task(config, kind)))
        for lmbda in config.single.lambdas:
            task = dict(
                name="image_compression",
                kind="scale_hyperprior",
                width=config.single.width,
                channels=config.single.channels,
                last=5,
                levels=1,
                dtype="float32",
                metric="mse",
                ms_ssim_weight=0.0,
                lambdas=(lmbda,),
                size=config.model.size,
                straight_through=config.model.straight_through,
            )
            listed.append(make_run(config, first, "single", lmbda, task))
    return listed


def scalable_task(config, kind: str) -> dict:
    """The task of one kind, but for λ."""
    own = ("width", "base", "enhancement", "hypers", "feature_weight", "size", "straight_through")
    task = {field: config.model[field] for field in own}
    task |= {f"detector_{field}": config.detector.model[field] for field in ("width", "depth")}
    return task | dict(name="scalable_compression", kind=kind)


def make_run(config, found, kind, lmbda, task) -> ml_collections.ConfigDict:
    """One codec; see `icm_jax.train.train` and `icm_jax.evaluate.evaluate`."""
    train, seed = config.train, found.seed
    scalable = task["name"] == "scalable_compression"
    if scalable:
        task["lmbda"] = lmbda
    return ml_collections.ConfigDict(
        dict(
            name=f"seed{seed}/{kind}-{lmbda:g}",
            seed=seed,
            task=task,
            data=dict(config.data, boxes=0),
            optim=dict(
                name=train.optimiser,
                learning_rate=train.learning_rate,
                schedule=train.schedule,
                plateau=train.plateau.to_dict(),
                warmup_steps=train.warmup_steps,
                weight_decay=0.0,
                clip_norm=train.clip_norm,
            ),
            batch_size=train.batch_size,
            steps=train.steps,
            log_every=train.log_every,
            save_every=train.save_every,
            keep_every=train.keep_every,
            fsdp=train.fsdp,
            ema=train.ema,
            start=((found.name, DETECTOR),) if scalable else (),
            decode_once=False,
            needs=(),
            detector=found.name,
            evaluate=("detect", "stream"),
            labels=dict(curve="image", arm=kind, point=f"{lmbda:g}"),
        )
    )
