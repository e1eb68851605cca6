"""Omni-ICM (Feng et al., ECCV 2022): all three stages, and what one would use otherwise.

    Command: python -m icm_jax.main --config=configs/omni_icm.py
    Takes:   15 to 20 minutes
    On:      2 CPU cores of a shared machine
    Expect:  69 to 76 % top-1 at 0.17 to 0.18 bpp, its α = 0 twin 68 to 80 % (a last bit decides
             which), WebP 86 % at 0.255

    Command: python -m icm_jax.main --config=configs/omni_icm.py:study
    Takes:   1 h 5 min
    On:      2 CPU cores
    Expect:  at equal accuracy 37 ± 9 % fewer bits than WebP, 60 ± 5 % fewer than JPEG

    Command: python -m icm_jax.main --config=configs/omni_icm.py:imagenet
    Takes:   not run here
    On:      a TPU slice; `--mode=plan` says which
    Expect:  no number of ours: published schedule

Runs, in this order and for every seed:

    filter               stage 0: the information filter alone, on features of the untrained head
    contrast             contrastive learning through the filter, α = 0: where both arms start
    omni, unfiltered     stage1: contrastive learning through the information filter; the two differ
                         in α alone (`unfiltered` is the α = 0 twin)
                         stage2-λ: the feature codec at each λ, backbone frozen
                         classify-λ, linear-λ, segment-λ: tail and head trained on decoded features
    rgb                  the backbone trained on pixels, fed with JPEG and WebP files

`weights.path`, torchvision's or MoCo's, is what `filter`, `contrast` or else stage1 start from;
`pretrain.steps=0` leaves `contrast` out. `stage3.weights.path` is that of the tails of the tasks,
and of rgb (docs/extend/weights.md).
"""

import ml_collections

from configs import common
from icm_jax.engine.run import Labels, Point, Run, Start, make_run
from icm_jax.measure.points import file_points

ARMS = {
    "omni": dict(title="Omni-ICM (α > 0)", colour="#0072B2", reference=True),
    "unfiltered": dict(title="α = 0 twin", colour="#D55E00"),
}
"""What the report says of each."""
HEAD = ("params/head", "batch_stats/head")
TAIL = ("params/tail", "batch_stats/tail")
BACKBONE = HEAD + TAIL
PROJECTOR = ("params/projector",)
FILTER = ("params/filter", "batch_stats/filter")
NEEDS = {"classify": "label", "linear": "label", "segment": "mask"}


def demo() -> dict:
    """One seed, few rates, a narrow ResNet-18 on 96 px scenes."""
    return dict(
        name="omni_icm",
        seeds=(0,),
        codecs="",  # work directory whose codecs the tasks use, on these data; "": trained here
        weights=dict(reader="resnet", path=""),  # which the backbone starts from; "": at random
        data=common.scenes(train=4500, validation=600),
        model=dict(
            variant="18",
            width=16,
            size=96,
            crop=(0.9, 1.0),  # share of the area that a view shows, but in stage 1
            dtype="float32",
            bn_groups=0,  # statistics of the global batch; of so many parts of it each by itself
            projector_hidden=128,
            embedding=64,
        ),
        filter=dict(name="omni_filter", channels=192, widths=(16, 32, 64)),
        codec=dict(name="omni_feature", channels=48, widths=(16, 64), hyper_channels=8),
        train=common.loop(
            rate_scaling="none",  # or linear, sqrt: learning rates are then for rate_batch images
            rate_batch=256,
        ),
        # Contrast wants many images at once. Of 0 steps: the arms share the filter alone.
        pretrain=common.stage(steps=300, learning_rate=3e-3, warmup_steps=20, batch_size=64),
        # Of 0 steps: no pre-training of the information filter. batch_size 0: that of `train`.
        stage0=common.stage(steps=450, learning_rate=3e-3, warmup_steps=20, batch_size=0),
        stage1=common.stage(
            steps=60,
            learning_rate=1e-3,
            warmup_steps=20,
            batch_size=64,
            alpha=1.0,
            l1=30.0,
            negatives="batch",
            queue=1024,
            momentum=0.9,
            temperature=0.2,
        ),
        stage2=common.stage(
            steps=250,
            learning_rate=3e-3,
            warmup_steps=20,
            batch_size=0,
            lambdas=(0.2, 1.0),
            feature_weights=(1.0, 1.0, 1.0),
        ),
        stage3=common.stage(
            learning_rate=1e-2,
            warmup_steps=20,
            decode_once=True,  # train on features decoded beforehand; they are kept in memory
            tasks=dict(classify=900, linear=0, segment=0),  # steps of each; 0 leaves it out
            batch_size=0,
            aspp_rates=(1, 2, 3),
            output_stride=16,
            weights=dict(reader="resnet", path=""),  # of the tail; "": stage 2's
        ),
        rgb=dict(steps=900, files=common.files(jpeg=(2, 5, 10, 20, 40), webp=(0, 10, 25, 50))),
    )


def study() -> dict:
    """Three seeds, more rates, more contrast, the rival trained for as many steps as the tasks.

    The data have a seed of their own: lengths and α were chosen on the images of seed 0.
    """
    config = demo()
    config["seeds"] = (0, 1, 2)
    config["data"].update(seed=1, validation=1200)
    config["pretrain"].update(steps=450)
    config["stage1"].update(steps=150)
    config["stage2"].update(lambdas=(0.1, 0.3, 1.0))
    config["stage3"].update(tasks=dict(classify=1200, linear=0, segment=0))
    config["rgb"].update(steps=1200)
    return config


def tiny() -> dict:
    """Every run of the demo in a few steps: for tests and for a first look in a notebook."""
    config = demo()
    config["data"].update(common.scenes(train=64, validation=24, canvas=32))
    config["model"].update(variant="10", width=8, size=32, projector_hidden=16, embedding=16)
    config["filter"].update(channels=8, widths=(8, 8, 8))
    config["codec"].update(channels=8, widths=(8, 8), hyper_channels=8)
    config["train"].update(common.few(batch_size=8))
    config["pretrain"].update(steps=6, batch_size=0, warmup_steps=2)
    config["stage0"].update(steps=4, warmup_steps=2)
    config["stage1"].update(steps=6, batch_size=0, warmup_steps=2, queue=64)
    config["stage2"].update(steps=4, warmup_steps=2, lambdas=(1.0,))
    config["stage3"].update(tasks=dict(classify=4, linear=4, segment=4), warmup_steps=2)
    config["rgb"].update(steps=4, files=common.files(jpeg=(20,), webp=(20,)))
    return config


def imagenet() -> dict:
    """ResNet-50 at 224 px, queue 65,536 (MoCo v2); rate weights after docs/papers.md 5.2."""
    config = demo()
    config["data"] = dict(name="imagenet2012", path="", canvas=256)
    config["model"].update(variant="50", width=64, size=224, crop=(0.25, 1.0), dtype="bfloat16")
    config["filter"].update(channels=192, widths=(128, 128, 128))
    config["codec"].update(channels=192, widths=(128, 128), hyper_channels=128)
    config["model"].update(projector_hidden=2048, embedding=128)
    config["train"].update(batch_size=256, log_every=100, save_every=5000)
    moco = dict(batch_size=0, optimiser="sgd", warmup_steps=0)
    config["pretrain"].update(moco, steps=4_000_000, learning_rate=0.03)  # 800 epochs
    config["stage0"].update(steps=100_000, learning_rate=1e-4)
    config["stage1"].update(
        moco,
        steps=1_000_000,
        learning_rate=1e-3,
        alpha=0.1,
        l1=0.1,
        negatives="queue",
        queue=65_536,
        momentum=0.999,
    )
    config["stage2"].update(steps=100_000, learning_rate=1e-4)
    config["stage3"].update(
        decode_once=False,  # 3 MB an image
        tasks=dict(classify=100_000, linear=100_000, segment=0),  # ImageNet has no masks
        learning_rate=1e-4,
        aspp_rates=(6, 12, 18, 24),
        output_stride=8,
    )
    config["rgb"].update(steps=100_000)
    return config


get_config = common.scales(demo, study, tiny, imagenet)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """All runs, each complete in itself, in the order in which they depend on each other."""
    keys, listed = common.label_keys(config), []
    for seed in config.seeds:
        for arm in ARMS:
            listed += arm_runs(config, keys, seed, arm)
        listed.append(rgb_run(config, keys, seed))
    return [run for run in listed if run is not None]


def notes(config: ml_collections.ConfigDict) -> list[str]:
    """Tasks that are asked for and left out."""
    asked = [kind for kind, steps in config.stage3.tasks.items() if steps]
    said = common.left_out(config, {kind: NEEDS[kind] for kind in asked})
    if config.weights.path and config.codecs:
        said.append(f"weights.path starts nothing: the codecs are those of {config.codecs}.")
    return said


def arm_runs(config, keys, seed: int, arm: str) -> list:
    """What both arms share, with the first; stage 1; per λ stage 2 and the tasks of stage 3."""
    base = f"seed{seed}/{arm}"
    listed, start = [], []
    s1, trained_filter = config.stage1, filter_fields(config, dtype=config.model.dtype)
    foreign = dict(weights=common.foreign(config.weights))
    if config.stage0.steps:
        name = f"seed{seed}/filter"
        if arm == "omni":
            task = dict(config.model, name="filter_pretraining", codec=trained_filter)
            listed.append(stage_run(config, config.stage0, seed, name, task, start, **foreign))
        start = [Start(name, HEAD + FILTER)]
    task = dict(config.model, **{k: s1[k] for k in ("negatives", "queue", "momentum", "l1")})
    task |= dict(name="contrastive", temperature=s1.temperature, codec=trained_filter)
    if config.pretrain.steps:
        name = f"seed{seed}/contrast"
        if arm == "omni":
            unweighed = dict(task, alpha=0.0)
            listed.append(
                stage_run(config, config.pretrain, seed, name, unweighed, start, **foreign)
            )
        start, foreign = [Start(name, BACKBONE + FILTER + PROJECTOR)], {}
    task |= dict(alpha=s1.alpha if arm == "omni" else 0.0)
    listed.append(stage_run(config, s1, seed, f"{base}/stage1", task, start, **foreign))
    if config.codecs:
        listed = []
    for lmbda in config.stage2.lambdas:
        codec = f"{base}/stage2-{lmbda:g}"
        task = dict(
            config.model,
            name="compression",
            filter=filter_fields(config),
            codec=codec_fields(config),
            lmbda=lmbda,
            feature_weights=config.stage2.feature_weights,
            relative=True,
        )
        start = [Start(f"{base}/stage1", BACKBONE + FILTER)]
        if not config.codecs:
            fields = dict(codec_file={})
            listed.append(stage_run(config, config.stage2, seed, codec, task, start, **fields))
        start = [Start(codec, TAIL, config.codecs, codec=True)]
        for kind, steps in task_steps(config, keys).items():
            name = f"{base}/{kind}-{lmbda:g}"
            labels = Labels(kind, arm, f"{lmbda:g}", **ARMS[arm])
            listed.append(task_run(config, seed, name, kind, steps, start, labels))
    return listed


def filter_fields(config, **more) -> dict:
    """The information filter, as `icm_jax.tasks.task.build_codec` takes it."""
    return dict(config.filter, variant=config.model.variant, width=config.model.width, **more)


def codec_fields(config) -> dict:
    """The feature codec likewise; it contains the filter, whose fields are its filter_..."""
    inner = {f"filter_{key}": value for key, value in config.filter.items() if key != "name"}
    return dict(config.codec, variant=config.model.variant, width=config.model.width, **inner)


def task_steps(config, keys) -> dict[str, int]:
    """Steps of each task of stage 3 that the data has labels for; masks alone are segmented."""
    asked = config.stage3.tasks
    known = {kind: asked[kind] for kind in asked if asked[kind] and NEEDS[kind] in keys}
    return known or ({"segment": max(asked.values())} if "mask" in keys else {})


def task_run(config, seed, name, kind, steps, start, labels):
    """Stage 3: a head (and the tail) on decoded features."""
    task = dict(config.model, frontend="feature", codec=codec_fields(config))
    if kind == "segment":
        own = {k: config.stage3[k] for k in ("aspp_rates", "output_stride")}
        task |= dict(name="segmentation", **own)
    else:
        mode = "linear" if kind == "linear" else "finetune"
        task |= dict(name="classification", mode=mode)
    own = dict(steps=steps, decode_once=config.stage3.decode_once, labels=labels)
    own |= dict(needs=(NEEDS[kind],), evaluate=(Point("stream"),))
    own |= dict(weights=common.foreign(config.stage3.weights))
    return stage_run(config, config.stage3, seed, name, task, start, **own)


def rgb_run(config, keys, seed: int):
    """The rival: the backbone trained on pixels, fed with JPEG and WebP files."""
    task = dict(config.model, frontend="pixels")
    kinds = [kind for kind in ("classify", "segment") if kind in task_steps(config, keys)]
    if not kinds:
        return None
    kind = kinds[0]
    if kind == "classify":
        task |= dict(name="classification", mode="finetune")
    else:
        own = {k: config.stage3[k] for k in ("aspp_rates", "output_stride")}
        task |= dict(name="segmentation", **own)
    name = f"seed{seed}/rgb/{kind}"
    origin = "contrast" if config.pretrain.steps else "unfiltered/stage1"
    start = [Start(f"seed{seed}/{origin}", BACKBONE, config.codecs)]
    own = dict(steps=config.rgb.steps, labels=Labels(kind, "rgb"), needs=(NEEDS[kind],))
    own |= dict(weights=common.foreign(config.stage3.weights))
    own |= dict(evaluate=(Point("pixels"), *file_points(config.rgb.files)))
    return stage_run(config, config.stage3, seed, name, task, start, **own)


def stage_run(config, stage, seed: int, name: str, task: dict, start, **fields) -> Run:
    """A run of one stage."""
    given = dict(name=name, seed=seed, task=task, start=tuple(start), weight_decay=1e-4)
    return make_run(config, stage, **given, **fields)
