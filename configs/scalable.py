"""Scalable codecs for a detector and for humans, beside their rivals (Özyılkan et al. 2023).

    Command: python -m icm_jax.main --config=configs/scalable.py
    Takes:   2 hours
    On:      2 CPU cores
    Expect:  the disentangled base layer 78 % fewer bits than the split one at equal mAP@.5

    Command: python -m icm_jax.main --config=configs/scalable.py:photos --config.data.path=FOLDER \\
                 "--config.model.kinds=('disentangled','split')" "--config.single.lambdas=()"
    Takes:   1 h 30 min for 116 photographs of raccoons in COCO's layout
    On:      2 CPU cores
    Expect:  84.5 % mAP@.5 at 0.128 bpp of the base layer; 81.3 % on pixels

    Command: python -m icm_jax.main --config=configs/scalable.py:coco-tiny \\
                 --config.data.path=DETECT --config.codec_data.path=PHOTOS \\
                 --config.picture_data.path=KODAK \\
                 --config.detector.weights.path=yolov3-tiny.weights
    Takes:   not run here to its end; its first kind alone, as in docs/results/scalable.md, 13
             minutes, and 20 for each quality that is refined for the detector
    On:      2 CPU cores
    Expect:  of that kind 43.3 % mAP@.5 at 0.187 bpp of the base; 44.4 % on pixels

    Command: python -m icm_jax.main --config=configs/scalable.py:coco
    Takes:   not run here to its end: a step of a codec takes 15.1 s on 2 CPU cores
    On:      accelerators; `--mode=plan` says which
    Expect:  no number of ours: published schedule

A detector is trained first (`configs/yolov3.py`), then a codec per kind and λ with the detector
frozen, then the single-layer hyperprior. With `train.following_steps` the codec of the first λ of a
kind is trained in full, and each one after it starts from the one before. The report holds the
detector's precision over the bits of the base layer, and the picture's quality over those of both.

`layered` are codecs that begin as a picture codec, one of every rate per kind
(`icm_jax.codecs.layered`); the report's reference is the first of them. "conditional" keeps the
picture as that codec has it, and learns the base, and the priors of the enhancement, alone; with
`train_base=False` those priors alone, which needs no photographs with objects. With an `effort` the
bases that the detector reads are refined for it, file by file (docs/refining.md).

A kind is a name, with C_b, C_e and hyperpriors of `model.codec`, or has its own:
("split", 48, 96, 1) is Choi and Bajić's codec as published, whose base layer holds all of the
hyperprior that both latents share; with 2 each latent has one, and the base spares the other's.
`outside` are CSV files of curves that other software made, as HM and VTM; see
`icm_jax.report.outside`.
"""

import dataclasses

import ml_collections

from configs import common, yolov3
from icm_jax.codecs import layered
from icm_jax.engine.run import Labels, Point, Run, Start, make_run
from icm_jax.errors import IcmError
from icm_jax.measure.points import file_points
from icm_jax.nets.yolo import whole
from icm_jax.report import outside

LAMBDAS = (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483)
"""The field's λ for the mean squared error on 0...255 (docs/papers.md 3.4)."""
SMALL_LAMBDAS = (0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
TITLES = {
    "disentangled": "disentangled latents",
    "split": "split latents (Choi and Bajić)",
    "split-cheng2020": "split latents (the original's transforms)",
    "residual": "feature, then residual (SSSIC)",
    "single": "one layer (hyperprior)",
    "conditional": "layers over photo.icmc, conditional",
    "layered-split": "layers over photo.icmc, split (Choi and Bajić)",
}
COLOURS = {
    "disentangled": ("#0072B2", "#56B4E9", "#003B5C"),
    "split": ("#D55E00", "#CC3377", "#7A3300"),
    "split-cheng2020": ("#8B3A00", "#661144"),
    "residual": ("#E69F00", "#B8A000"),
    "single": ("#000000",),
    "conditional": ("#0072B2",),
    "layered-split": ("#CC3377", "#7A3300"),
}
"""Of the first arm of a kind, the second, ..."""
SIZES = ("base", "enhancement", "hypers")  # C_b, C_e, hyperpriors
HYPERS = {1: "one hyperprior for both", 2: "a hyperprior each"}
WEIGHTS = ("feature_weight", "output_weight")
DETECTOR = ("params/detector", "batch_stats/detector")
PICTURE = tuple(f"layered/picture/{part}" for part in ("analysis", "gain", "synthesis"))
BASE = "layered/machine"
"""What of "conditional" stays as in the picture codec that it begins as, and what may."""


def detector(scale: str) -> dict:
    """{"data", "detector"}: a scale of configs/yolov3.py, its data apart."""
    config = getattr(yolov3, scale)()
    for name in ("name", "seeds"):
        del config[name]
    if scale != "tiny":
        config["files"].update(heif=(10, 20, 35, 50), vvc=(47, 42, 37), avif=(10, 30, 50, 70))
    return dict(data=config.pop("data"), detector=config)


def demo() -> dict:
    """Small widths, six rates; 96 × 96 pixels."""
    return dict(
        name="scalable",
        seeds=(0,),
        **detector("demo"),
        # Where codecs learn, where pictures are judged, and where detection is scored once more.
        codec_data=dict(name=""),  # "": `data`, whose classes the detector knows
        picture_data=dict(name=""),  # "": as codec_data
        second_data=dict(name=""),  # "": nowhere
        outside=(),  # CSV files
        model=dict(
            # "split-cheng2020" is Choi and Bajić's original: the transforms of Cheng et al. 2020.
            kinds=("disentangled", "split", "residual"),
            codec=dict(
                name="scalable",
                width=(16, 32, 64, 32),  # or one number, see its builder
                base=24,  # C_b
                enhancement=128,  # C_e
                hypers=2,
            ),
            feature_weight=1000.0,
            output_weight=0.0,  # of what the detector's tail makes of the decoded feature
            lambdas=SMALL_LAMBDAS,
            size=96,  # of training views
            straight_through=True,
        ),
        single=dict(width=(16, 32, 64, 32), channels=152, lambdas=SMALL_LAMBDAS),
        layered=dict(
            kinds=(),  # (name, slices of the base, of the enhancement, hyperpriors)
            codec=dict(name="layered", widths=(96, 160), levels=6),
            weights=dict(reader="icmc", path=""),  # "": the model in the package
            lambdas=(0.001, 0.04),  # of qualities 0 and 100
            train_base=True,  # False: "conditional" learns the prior of the enhancement alone
            feature_weight=100.0,
            output_weight=10_000.0,
            size=96,
            straight_through=True,
            qualities=(0, 25, 50, 75, 100),
            effort=0,  # 1 to 3: files that the detector reads are refined for it, minutes each
            train=dict(steps=6000, batch_size=4)
            | common.stage(learning_rate=5e-4, warmup_steps=100),
        ),
        train=common.loop(
            save_every=500,
            keep_every=500,  # for the redundancy during training; a multiple of save_every
            following_steps=700,  # of every λ but the first; 0: each λ by itself, `steps` long
            schedule="cosine",
            # With schedule="plateau"; examples of the validation split, 0: all.
            plateau=dict(interval=5000, patience=10, examples=0),
            **common.stage(steps=2000, learning_rate=1e-3, warmup_steps=100),
        ),
    )


def photos() -> dict:
    """The same on a folder of photographs at 256 × 256 pixels."""
    config = demo() | detector("photos")
    config["model"].update(size=128)
    config["layered"].update(size=128)
    config["train"].update(batch_size=8)
    return config


def coco_tiny() -> dict:
    """YOLOv3-tiny with its published weights; small codecs that learn from photographs."""
    config = demo() | detector("tiny_coco")
    config["detector"]["train"].update(steps=0)
    config["detector"]["files"].update(icm=(0, 10, 20, 30, 45, 65, 85))
    config.update(codec_data=dict(name="photos", path="", canvas=256, crop=(0.36, 1.0)))
    config.update(picture_data=dict(name="photos", path="", whole=True))
    sizes = 48, 96  # C_b, C_e
    kinds = ("disentangled", *sizes, 2), ("split", *sizes, 1), ("split", *sizes, 2)
    config["model"].update(kinds=(*kinds, ("residual", *sizes, 2)), lambdas=SMALL_LAMBDAS[:5])
    config["model"].update(size=192)
    slices = 48, 64, 144  # of photo.icmc
    first = ("conditional", slices, slices, 2), ("split", slices[:2], slices[2:], 1)
    config["layered"].update(size=256, kinds=(*first, ("split", slices[:2], slices[2:], 2)))
    config["layered"]["codec"].update(through="image", share=0.25)
    config["layered"].update(train_base=False, effort=1, qualities=(20, 40, 60, 80, 100))
    config["single"].update(channels=sum(sizes), lambdas=SMALL_LAMBDAS[:5])
    config["train"].update(steps=3000, following_steps=1000, batch_size=8, save_every=1000)
    config["train"].update(keep_every=1000)
    return config


def coco() -> dict:
    """Full widths: YOLOv3 at 416 pixels, N = C_b = 128, C_e = 64, as docs/papers.md 3 and 4.

    Adam's rate of 1e-4 is halved whenever the loss on 5,000 validation images has not fallen for
    20 epochs; when it has not after five halvings, training stops, and the codec is that of the
    lowest loss. That the rate is divided so, a fixed number of times, is the paper's (3.4). Its
    numbers were not found: these are of CompressAI's models, which took four to five million steps
    with batches of 16; how often, five times, is ours.
    """
    config = demo() | detector("coco")
    config["model"]["codec"].update(width=128, base=128, enhancement=64)
    config["model"].update(lambdas=LAMBDAS, size=256)
    config["single"].update(width=128, channels=192, lambdas=LAMBDAS)
    config["train"].update(steps=5_000_000, batch_size=16, learning_rate=1e-4, save_every=5000)
    config["train"].update(schedule="plateau", keep_every=500_000, following_steps=0)
    config["train"]["plateau"].update(patience=20, examples=5000)  # 5174 steps are an epoch
    return config


def tiny() -> dict:
    """A few steps of the demo, for tests."""
    config = demo() | detector("tiny")
    config["model"].update(kinds=("disentangled",), lambdas=(0.01,), size=64)
    config["model"]["codec"].update(width=6, base=4, enhancement=5)
    config["single"].update(width=6, channels=8, lambdas=())
    config["train"].update(common.few(save_every=2), steps=4, warmup_steps=2, keep_every=2)
    return config


get_config = common.scales(demo, photos, coco_tiny, coco, tiny)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """Per seed a detector, then a codec per kind and λ, then the single-layer codecs."""
    outside.read(config.outside)  # what is wrong with them is said first
    with_data = config.detector.copy_and_resolve_references()
    with with_data.unlocked():
        with_data.data, with_data.seeds = config.data, config.seeds
    listed = []
    for first in yolov3.runs(with_data):
        listed.append(first)
        second = common.own_data(config, "second_data", like="data")
        if second:
            again = (*first.evaluate, Point("pixels", data=second))
            listed[-1] = dataclasses.replace(first, evaluate=again)
        codecs = layered_runs(config, first)
        named = [kind_of(given) for given in config.model.kinds]
        paper = "disentangled" in named and not config.layered.kinds
        reference = named.index("disentangled") if paper else None
        for number, kind in enumerate(config.model.kinds):
            codec = codec_of(config, kind)
            tasks = [scalable_task(config, codec, lmbda) for lmbda in config.model.lambdas]
            look = dict(
                arm=kind if isinstance(kind, str) else "-".join(map(str, kind)),
                title=title_of(kind, codec),
                colour=colour_of(named, number),
                reference=number == reference,
            )
            codecs += sweep(config, first, look, config.model.lambdas, tasks)
        tasks = [single_task(config, lmbda) for lmbda in config.single.lambdas]
        look = dict(arm="single", title=TITLES["single"], colour=COLOURS["single"][0])
        codecs += sweep(config, first, look, config.single.lambdas, tasks)
        if codecs:  # pictures in classical formats, once a seed
            pictures = common.own_data(config, "picture_data")
            points = codecs[0].evaluate + file_points(config.detector.files, pictures)
            codecs[0] = dataclasses.replace(codecs[0], evaluate=points)
        listed += codecs
    return listed


def layered_runs(config, found: Run) -> list[Run]:
    """A codec of every rate per kind of `config.layered`, which begins as a picture codec."""
    listed, own = [], config.layered
    for given in own.kinds:
        if not isinstance(given, tuple) or len(given) != 4 or given[0] not in layered.KINDS:
            raise IcmError(
                f"a kind of config.layered.kinds is {given!r}; it must be (name, slices of the base"
                f", of the enhancement, hyperpriors), the name one of {', '.join(layered.KINDS)}"
            )
    named = [f"layered-{given[0]}" if given[0] == "split" else given[0] for given in own.kinds]
    for number, (kind, base, enhancement, hypers) in enumerate(own.kinds):
        codec = dict(own.codec, kind=kind, base=base, enhancement=enhancement, hypers=hypers)
        task = {key: own[key] for key in (*WEIGHTS, "lambdas", "size", "straight_through")}
        task |= dict(name="scalable_compression", codec=codec)
        task |= dict(detector=whole(config.detector.model.detector))
        if kind == "conditional":
            codec["ahead"] = base == enhancement
            # The picture is that of the codec it begins as.
            task |= dict(fixed=PICTURE, picture_weight=0.0)
            if not own.train_base:
                task |= dict(fixed=(*PICTURE, BASE), feature_weight=0.0, output_weight=0.0)
        title = f"{TITLES[named[number]]}, {HYPERS[hypers]}"
        arm = "-".join(map(str, ("layered", kind, hypers)))
        title += f", effort {own.effort}" if own.effort else ""
        look = dict(arm=arm, title=title, colour=colour_of(named, number), reference=number == 0)
        levels: dict = dict(qualities=own.qualities, effort=own.effort)
        run = codec_run(config, found, look, task, own.train, point="quality", **levels)
        reader = own.weights.reader, own.weights.path
        listed.append(dataclasses.replace(run, weights=reader))
    return listed


def kind_of(given) -> str:
    """Of an entry of `model.kinds`, a name or (name, C_b, C_e, hyperpriors), the name.

    Raises: IcmError for something else.
    """
    if isinstance(given, str):
        return given
    if not isinstance(given, tuple) or len(given) != 4 or not isinstance(given[0], str):
        raise IcmError(
            f"a kind of config.model.kinds is {given!r}; it must be a name, or (name, C_b, C_e, "
            "hyperpriors)"
        )
    return given[0]


def codec_of(config, given) -> dict:
    """Fields of the codec of an entry of `model.kinds`."""
    kind, _, backbone = kind_of(given).partition("-")
    own = {} if isinstance(given, str) else dict(zip(SIZES, given[1:], strict=True))
    return dict(config.model.codec, kind=kind, backbone=backbone or "balle2018") | own


def title_of(given, codec: dict) -> str:
    """What the report calls an arm: its sizes where the entry of `model.kinds` gives them, and
    always its hyperpriors."""
    sizes = [] if isinstance(given, str) else [f"{codec['base']} + {codec['enhancement']} channels"]
    hypers = HYPERS.get(codec["hypers"], f"{codec['hypers']} hyperpriors")
    return ", ".join([TITLES.get(kind_of(given), kind_of(given)), *sizes, hypers])


def colour_of(named: list[str], number: int) -> str:
    """Of the n-th arm of a kind the n-th of its colours; "" after the last: the report chooses."""
    colours, before = COLOURS.get(named[number], ()), named[:number].count(named[number])
    return colours[before] if before < len(colours) else ""


def scalable_task(config, codec: dict, lmbda: float) -> dict:
    """The task of a scalable codec."""
    task = {key: config.model[key] for key in (*WEIGHTS, "size", "straight_through")}
    task |= dict(name="scalable_compression", codec=codec, lambdas=(lmbda,))
    return task | dict(detector=whole(config.detector.model.detector))


def single_task(config, lmbda: float) -> dict:
    """The task of a single-layer codec."""
    return dict(
        name="image_compression",
        codec=dict(
            name="image",
            kind="scale_hyperprior",
            width=config.single.width,
            channels=config.single.channels,
        ),
        metric="mse",
        ms_ssim_weight=0.0,
        lambdas=(lmbda,),
        size=config.model.size,
        straight_through=config.model.straight_through,
    )


def sweep(config, found: Run, look: dict, lambdas, tasks: list[dict]) -> list[Run]:
    """The codecs of one arm; `found` is the detector's run, `look` are fields of `Labels`."""
    listed, train = [], config.train
    for lmbda, task in zip(lambdas, tasks, strict=True):
        start, steps = (), train.steps
        if listed and train.following_steps:
            steps = train.following_steps
            part = "scalable" if task["name"] == "scalable_compression" else "image_codec"
            start = (Start(listed[-1].name, (f"params/{part}",)),)
        stage = dict(train, steps=steps)
        listed.append(codec_run(config, found, look, task, stage, point=f"{lmbda:g}", start=start))
    return listed


def codec_run(
    config, found: Run, look: dict, task, stage, qualities=(None,), point="", start=(), effort=0
) -> Run:
    """One codec's run; `stage` are its fields of `train`, `effort` is of what is detected in."""
    given, pictures = (common.own_data(config, name) for name in ("codec_data", "picture_data"))
    second = common.own_data(config, "second_data", like="data")
    points = []
    for quality in qualities:
        detect = Point("detect", quality, effort=effort)
        points += [detect, Point("picture", quality, pictures)]
        points += [dataclasses.replace(detect, data=second)] if second else []
    if task["name"] == "scalable_compression":
        start = (Start(found.name, DETECTOR), *start)
    return make_run(
        config,
        ml_collections.ConfigDict(stage),
        name=f"seed{found.seed}/{look['arm']}" + (f"-{point}" if qualities == (None,) else ""),
        seed=found.seed,
        task=task,
        data=given or dict(config.data, boxes=0),
        classes_of=found.data if given else None,
        weight_decay=0.0,
        keep_every=config.train.keep_every,
        start=start,
        detector=found.name,
        codec_file={},
        evaluate=tuple(points),
        labels=Labels("image", point=point, **look),
    )
