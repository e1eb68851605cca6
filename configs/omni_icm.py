"""Omni-ICM (Feng et al., ECCV 2022): all three stages, and what one would use otherwise.

    python -m icm_jax.main --config=configs/omni_icm.py            # embedded data, minutes on a laptop
    python -m icm_jax.main --config=configs/omni_icm.py:study      # 3 seeds, more rates, hours on a laptop
    python -m icm_jax.main --config=configs/omni_icm.py:imagenet   # the paper's scale

Runs, in this order and for every seed:

    omni, unfiltered     stage1: contrastive learning through the information filter; the two differ
                         in α alone (`unfiltered` is the α = 0 twin)
                         stage2-λ: the feature codec at each λ, backbone frozen
                         classify-λ, linear-λ, segment-λ: tail and head trained on decoded features
    rgb                  the unfiltered backbone trained on pixels, then fed with JPEG and WebP files
"""

import ml_collections

from icm_jax.data import DATASETS

ARMS = ("omni", "unfiltered")
BACKBONE = ("params/head", "params/tail", "batch_stats/head", "batch_stats/tail")
FILTER = ("params/filter", "batch_stats/filter")
CODEC = ("params/feature_codec", "batch_stats/feature_codec")


def get_config(arg: str = "demo") -> ml_collections.ConfigDict:
    """Settings of one scale; every field can be overridden on the command line."""
    scales = {"demo": demo, "study": study, "tiny": tiny, "imagenet": imagenet}
    if arg not in scales:
        raise ValueError(f"omni_icm.py has no scale {arg!r}; choose one of {', '.join(scales)}")
    return ml_collections.ConfigDict(scales[arg]())


def demo() -> dict:
    """One seed, few rates, a narrow ResNet-18 on 96 px scenes."""
    return dict(
        name="omni_icm",
        seeds=(0,),
        data=dict(name="scenes", path="", canvas=96),
        model=dict(
            variant="18",
            width=16,
            size=96,
            dtype="float32",
            filter_channels=32,
            filter_hidden=32,
            codec_channels=32,
            codec_hidden=32,
            hyper_channels=16,
            projector_hidden=128,
            embedding=64,
        ),
        train=dict(batch_size=64, log_every=20, save_every=200, clip_norm=1.0, fsdp=1),
        stage1=dict(
            steps=400,
            learning_rate=1e-3,
            optimiser="adamw",
            warmup_steps=40,
            alpha=1.0,
            negatives="both",
            queue=1024,
            momentum=0.99,
            temperature=0.2,
            pretrain_filter_steps=0,
        ),
        stage2=dict(
            steps=200,
            learning_rate=1e-3,
            lambdas=(0.3, 1.0, 3.0),
            feature_weights=(1.0, 1.0, 1.0),
        ),
        stage3=dict(
            steps=200,
            learning_rate=1e-3,
            tasks=("classify", "linear", "segment"),
        ),
        rgb=dict(jpeg=(2, 5, 10, 20, 40, 80), webp=(0, 10, 25, 50, 75)),
    )


def study() -> dict:
    """The demo over three seeds, five rates and longer training."""
    config = demo()
    config["seeds"] = (0, 1, 2)
    config["stage1"].update(steps=2000, warmup_steps=100)
    config["stage2"].update(steps=800, lambdas=(0.1, 0.3, 1.0, 3.0, 10.0))
    config["stage3"].update(steps=600)
    return config


def tiny() -> dict:
    """Every run of the demo in a few steps: for tests and for a first look in a notebook."""
    config = demo()
    config["data"].update(canvas=32, size=32, train=64, validation=24)
    config["model"].update(
        width=8,
        size=32,
        filter_channels=8,
        filter_hidden=8,
        codec_channels=8,
        codec_hidden=8,
        hyper_channels=8,
        projector_hidden=16,
        embedding=16,
    )
    config["train"].update(batch_size=8, log_every=2, save_every=4)
    config["stage1"].update(steps=6, warmup_steps=2, queue=64)
    config["stage2"].update(steps=4, lambdas=(1.0,))
    config["stage3"].update(steps=4)
    config["rgb"].update(jpeg=(20,), webp=(20,))
    return config


def imagenet() -> dict:
    """ResNet-50 at 224 px, queue 65,536 (MoCo v2); rate weights after papers.md 5.2."""
    config = demo()
    config["data"] = dict(name="imagenet2012", path="", canvas=256)
    config["model"].update(
        variant="50",
        width=64,
        size=224,
        dtype="bfloat16",
        filter_channels=192,
        filter_hidden=128,
        codec_channels=192,
        codec_hidden=128,
        hyper_channels=128,
        projector_hidden=2048,
        embedding=128,
    )
    config["train"].update(batch_size=256, log_every=100, save_every=5000)
    config["stage1"].update(
        steps=1_000_000,
        learning_rate=0.03,
        optimiser="sgd",
        warmup_steps=0,
        alpha=0.1,
        negatives="queue",
        queue=65_536,
        momentum=0.999,
        pretrain_filter_steps=100_000,
    )
    config["stage2"].update(steps=100_000, learning_rate=1e-4)
    config["stage3"].update(steps=100_000, learning_rate=1e-4)
    return config


def runs(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """The list of runs, each complete in itself, in the order in which they depend on each other."""
    keys = DATASETS[config.data.name].keys
    listed = []
    for seed in config.seeds:
        for arm in ARMS:
            listed += arm_runs(config, keys, seed, arm)
        listed += rgb_runs(config, keys, seed)
    return listed
