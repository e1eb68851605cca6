"""Classes and segments from a learned code, without decoding it (Torfason et al., ICLR 2018).

    Command: python -m icm_jax.main --config=configs/cresnet.py
    Takes:   14 min 45 s
    On:      2 CPU cores, tests beside it
    Expect:  curves of r50 and c51 at two rates beside p50; no number of them is kept

    Command: python -m icm_jax.main --config=configs/cresnet.py:photos --config.data.path=FOLDER
    Takes:   1 h 45 min
    On:      2 CPU cores
    Expect:  25 classes of Caltech-101, top-1 on the code 53.3, 56.2 and 59.5 % at 0.161, 0.369 and
             0.665 bpp; on decoded images 55.4, 56.9 and 62.7 % (docs/without_decoding.md)

    Command: python -m icm_jax.main --config=configs/cresnet.py:streets --config.data.path=FOLDER \\
                 --config.seeds='(0,)' --config.points='((0.33,16),)'
    Takes:   44 minutes
    On:      2 CPU cores that two other jobs shared
    Expect:  CamVid: 44.0 % mIoU on the code, 42.4 % on decoded images, at 0.290 bpp, in the squares
             in the middle; whole images, which are scored now, were not run

    Command: python -m icm_jax.main --config=configs/cresnet.py:imagenet
    Takes:   not run here: five networks, 560,000 steps of 64 images each
    On:      accelerators; `--mode=plan` says which
    Expect:  no number of ours: published schedule

    Command: python -m icm_jax.main --config=configs/cresnet.py:voc --config.data.path=FOLDER
    Takes:   not run here; FOLDER is VOCdevkit/VOC2012
    On:      accelerators; `--mode=plan` says which
    Expect:  no number of ours: published schedule

Runs, for every seed, at each operating point (bits per pixel):

    autoencoder-bpp      the compressive autoencoder
    p50                  ResNet-50 on the original pixels
    r50-, r71-bpp        ResNets on what it decodes
    c39-, c51-, c72-bpp  cResNets on its code
    ...-d-bpp            DeepLab on the same inputs, where the data have masks
    joint-bpp            the autoencoder and a cResNet (`joint.arm`) trained on, together
    joint-d-bpp          DeepLab on the code of that autoencoder, from that cResNet
    alone-bpp            that cResNet trained on, its autoencoder frozen: what more steps alone give
    anew-bpp, again-bpp  the fair comparison: a cResNet from scratch on the joint autoencoder,
                         frozen, then trained on for as many steps as "joint"

Embedded data see the autoencoder, p50, r50 and c51 alone; `arms` adds networks, `joint.steps` and
`segment.steps` above 0 the rest, and `noise=(10.0,20.0)` scores on images with Gaussian noise, too.
`weights.path` is what p50 and r50 start from (docs/extend/weights.md). With `codecs`, a work
directory of this experiment, DeepLab alone is trained, on its codecs and from its classifiers:

    python -m icm_jax.main --config=configs/cresnet.py:voc --config.codecs=runs/imagenet ...
"""

import functools

import ml_collections

from configs import common
from icm_jax.engine.run import Labels, Point, Run, Start, make_run
from icm_jax.errors import IcmError
from icm_jax.measure.points import file_points

CODEC = ("params/autoencoder", "batch_stats/autoencoder")
NETWORK = ("params/tail", "batch_stats/tail", "params/classifier")
TRUNK = ("params/head", "batch_stats/head", "params/tail", "batch_stats/tail")
LOOKS = {
    "p50": dict(title="ResNet-50 on original RGB", marker="s"),
    "r50": dict(title="ResNet-50 on decoded RGB", marker="s"),
    "r71": dict(title="ResNet-71 on decoded RGB", marker="s"),
    "c39": dict(title="cResNet-39 on the code"),
    "c51": dict(title="cResNet-51 on the code", reference=True),
    "c72": dict(title="cResNet-72 on the code"),
    "r50-d": dict(title="ResNet-50-d on decoded RGB"),
    "c39-d": dict(title="cResNet-39-d on the code"),
    "c51-d": dict(title="cResNet-51-d on the code", reference=True),
    "p50-d": dict(title="ResNet-50-d on original RGB"),
    "joint": dict(title="trained jointly", marker="^"),
    "joint-d": dict(title="cResNet-d after joint training", marker="^"),
    "alone": dict(title="trained on, codec frozen", marker="^"),
    "anew": dict(title="joint codec frozen, network anew", marker="^"),
    "again": dict(title="joint codec frozen, network anew and trained on", marker="^"),
}
"""What the report says of an arm."""
FRONTENDS = {"p": "pixels", "r": "decoded", "c": "code"}
"""By the first letter of an arm."""
VARIANTS = {"p50": "50", "r50": "50", "r71": "71", "c39": "c39", "c51": "c51", "c72": "c72"}


def demo() -> dict:
    """A quarter of the channels, 96 × 96 pixels, two operating points."""
    return dict(
        name="cresnet",
        seeds=(0,),
        points=((0.33, 16), (0.63, 32)),  # bits per pixel, C of the code
        codecs="",  # work directory of this experiment on other data, for DeepLab; "": trained here
        arms=("p50", "r50", "c51"),
        data=common.scenes(train=4500, validation=600),
        # "": at random. torchvision's have their stride in the 3×3.
        weights=dict(reader="resnet", path="", stride_in_1x1=False),
        model=dict(width=16, size=96, crop=(0.5, 1.0), dtype="float32"),
        code=dict(name="autoencoder", width=32, centres=6, learned=True, blocks=3),
        rate=dict(beta=300.0, size=64),  # of the codec's training; size of its views
        train=common.loop(),
        codec=common.stage(steps=400, learning_rate=3e-3, warmup_steps=50),
        classify=common.stage(steps=400, learning_rate=3e-3, warmup_steps=50),
        # Of 0 steps: left out.
        segment=common.stage(
            steps=0, learning_rate=3e-3, warmup_steps=50, aspp_rates=(1, 2, 3, 4), output_stride=8
        ),
        joint=common.stage(steps=0, learning_rate=3e-4, warmup_steps=20, gamma=0.001, arm="c51"),
        files=common.files(jpeg=(5, 10, 20, 40, 70), jpeg2000=(20, 24, 28, 32, 36)),
        noise=(),  # deviations, in levels, of noise that networks are also scored on
        speed=16,  # images of a batch when speed is measured; 0: it is not
    )


def photos() -> dict:
    """A folder with a folder per class; 64 pixels; three points, three seeds."""
    config = demo()
    config.update(seeds=(0, 1, 2), points=((0.1, 8), (0.33, 16), (0.63, 32)))
    config["data"] = dict(name="folder", path="", canvas=72)
    config["model"].update(size=64)
    config["train"].update(batch_size=32)
    config["codec"].update(steps=500)
    config["joint"].update(steps=100)
    config["noise"] = (10.0, 20.0, 40.0)
    return config


def streets() -> dict:
    """Photographs with masks, 128 pixels; DeepLab from scratch."""
    config = photos()
    config["model"].update(size=128)
    config["train"].update(batch_size=16)
    config["segment"].update(steps=500)
    config["data"] = dict(name="mask_folder", path="", canvas=128)
    return config


def imagenet() -> dict:
    """Published widths at 224 pixels; schedules after docs/papers.md 1.5."""
    config = photos()
    config.update(seeds=(0,), arms=tuple(VARIANTS))
    config["data"] = dict(name="imagenet2012", path="", canvas=256)
    config["noise"] = (20.0,)
    config["model"].update(width=64, size=224, dtype="bfloat16")
    config["code"].update(width=128)
    config["rate"].update(size=160)
    config["train"].update(batch_size=64, log_every=100, save_every=5000)
    sgd = dict(optimiser="sgd", learning_rate=0.025, warmup_steps=1000)
    config["codec"].update(steps=200_000, learning_rate=1e-4, warmup_steps=1000)
    config["classify"].update(sgd, steps=560_000)  # 28 epochs
    config["joint"].update(sgd, steps=180_000, learning_rate=2.5e-3)
    config["segment"].update(sgd, aspp_rates=(6, 12, 18, 24))
    return config


def voc() -> dict:
    """DeepLab with published widths on VOC 2012 in its own folder.

    As published with `data.list=trainaug` and `data.masks=SegmentationClassAug`. Networks start
    from scratch, p50 and r50 from `weights.path`, or all from the classifiers of `codecs`; the
    paper's were trained on ImageNet.
    """
    config = imagenet()
    config.update(arms=("p50", "r50", "c39", "c51"))
    config["data"] = dict(name="voc_masks", path="", canvas=256, list="train")
    config["data"].update(masks="SegmentationClass")
    config["segment"].update(steps=20_000, learning_rate=2.5e-3)
    return config


def tiny() -> dict:
    """A few steps of everything, for tests."""
    config = demo()
    config.update(points=((0.5, 4),), arms=("r50", "c39"), files=common.files(jpeg=(20,)))
    config.update(speed=2)
    config["data"] = common.scenes(train=16, validation=8, canvas=32)
    config["model"].update(width=2, size=32)
    config["code"].update(width=4, blocks=1)
    config["rate"].update(size=32)
    config["train"].update(common.few())
    for stage in ("codec", "classify", "segment", "joint"):
        config[stage].update(steps=4, warmup_steps=1)
    config["joint"].update(arm="c39")
    return config


get_config = common.scales(demo, photos, streets, imagenet, voc, tiny)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """All runs, in the order in which they depend on each other."""
    keys, listed = common.label_keys(config), []
    for arm in config.arms:
        if arm not in VARIANTS:
            raise IcmError(f"--config.arms has {arm!r}; it may have {', '.join(VARIANTS)}")
    for point in config.points:
        if not isinstance(point, tuple | list) or len(point) != 2:
            raise IcmError(f"--config.points has {point!r}; a point is (bits per pixel, channels)")
    for seed in config.seeds:
        listed += pixel_runs(config, keys, seed)
        for point, channels in config.points:
            listed += point_runs(config, keys, seed, point, channels)
    if not listed:
        raise IcmError("--config.codecs is for DeepLab: give data with masks, and segment.steps")
    return listed


def notes(config: ml_collections.ConfigDict) -> list[str]:
    """Tasks that are asked for and left out."""
    segments = {"segment": "mask"} if config.segment.steps else {}
    said = common.left_out(config, {"classify": "label"} | segments)
    if config.joint.steps and config.joint.arm not in config.arms:
        said.append(f"No joint training: the arms have no {config.joint.arm}.")
    return said


def named(seed: int, arm: str, point: float | None) -> str:
    """The name of a run; that of original pixels has no operating point."""
    return f"seed{seed}/{arm}" if point is None else f"seed{seed}/{arm}-{point:g}"


def arm_run(
    config, seed: int, point: float | None, arm, curve, stage, task, start, evaluate, **fields
) -> Run:
    """One run of an arm; `fields` are further ones of `Run`."""
    rate = "" if point is None else f"{point:g} bpp"
    return make_run(
        config,
        config[stage],
        name=named(seed, arm, point),
        seed=seed,
        task=task,
        weight_decay=1e-4,
        start=tuple(start),
        side=config.model.size,  # of the squares that codecs are scored on
        evaluate=evaluate,
        labels=Labels(curve, arm, rate, **LOOKS.get(arm, {})),
        **fields,
    )


def pixel_runs(config, keys, seed: int) -> list:
    """The networks on original pixels, which serve all operating points."""
    arms = [arm for arm in config.arms if FRONTENDS[arm[0]] == "pixels"]
    return network_runs(config, keys, seed, None, arms, {}, [])


def point_runs(config, keys, seed: int, point: float, channels: int) -> list:
    """One seed at one operating point."""
    code = dict(codec=dict(config.code, channels=channels))
    rate = dict(target_bpp=point, beta=config.rate.beta)
    task = dict(code, **rate, name="autoencoder_compression", size=config.rate.size)
    first = point == config.points[0][0] and seed == config.seeds[0]
    scored = Point("picture"), *(file_points(config.files) if first else ())
    run = functools.partial(arm_run, config, seed, point)
    listed = [run("autoencoder", "image", "codec", task, [], scored, codec_file={})]
    listed = [] if config.codecs else listed
    coded = [Start(named(seed, "autoencoder", point), workdir=config.codecs, codec=True)]
    arms = [arm for arm in config.arms if FRONTENDS[arm[0]] != "pixels"]
    listed += network_runs(config, keys, seed, point, arms, code, coded)
    if config.joint.steps and config.joint.arm in arms:
        if "label" in keys and not config.codecs:
            listed += joint_runs(config, seed, point, code, rate)
        if "mask" in keys and config.segment.steps and (config.codecs or "label" in keys):
            task = network_task(config, code, config.joint.arm, "segmentation")
            joint = Start(named(seed, "joint", point), TRUNK, config.codecs, codec=True)
            own = (Point("stream"),)
            listed.append(run("joint-d", "segment", "segment", task, [joint], own, needs=("mask",)))
    return listed


def network_runs(config, keys, seed: int, point: float | None, arms, code, coded) -> list:
    """Arms as classifiers and, where the data have masks, as DeepLab; on `coded`, if not pixels."""
    scored = Point("stream" if coded else "pixels"), *(Point("noise", s) for s in config.noise)
    listed = []
    run = functools.partial(arm_run, config, seed, point)
    speed = (Point("speed", config.speed),) if config.speed else ()
    for arm in arms if "label" in keys and not config.codecs else ():
        task = network_task(config, code, arm, "classification")
        own = dict(needs=("label",), weights=foreign(config, arm))
        listed.append(run(arm, "classify", "classify", task, coded, (*scored, *speed), **own))
    for arm in arms if "mask" in keys and config.segment.steps else ():
        task = network_task(config, code, arm, "segmentation")
        classified = config.codecs or "label" in keys  # it starts from a classifier, as published
        trunk = Start(named(seed, arm, point), TRUNK, config.codecs)
        start = [*coded, *([trunk] if classified else [])]
        own = dict(needs=("mask",), weights=None if classified else foreign(config, arm))
        listed.append(run(f"{arm}-d", "segment", "segment", task, start, scored, **own))
    return listed


def joint_runs(config, seed: int, point: float, code, rate) -> list:
    """Torfason et al. 2018, section 5: joint training and what it is compared with."""
    arm, name = config.joint.arm, functools.partial(named, seed, point=point)
    run = functools.partial(arm_run, config, seed, point)
    task = dict(config.model, **code, **rate, name="joint_classification")
    task |= dict(variant=VARIANTS[arm], gamma=config.joint.gamma)
    start = [Start(name("autoencoder"), CODEC), Start(name(arm), NETWORK)]
    own = (Point("stream"), Point("picture"))
    given = dict(needs=("label",))
    listed = [run("joint", "classify", "joint", task, start, own, codec_file={}, **given)]
    start[0] = Start(name("autoencoder"), codec=True)  # which stays as it is, from here on
    task = network_task(config, code, arm, "classification")
    own = (Point("stream"),)
    listed.append(run("alone", "classify", "joint", task, start, own, **given))
    joint = Start(name("joint"), codec=True)
    listed.append(run("anew", "classify", "classify", task, [joint], own, **given))
    start = [joint, Start(name("anew"), NETWORK)]
    listed.append(run("again", "classify", "joint", task, start, own, **given))
    return listed


def foreign(config, arm: str) -> tuple[str, str] | None:
    """The weights that an arm starts from; None for a network that nobody else has."""
    return common.foreign(config.weights) if arm in ("p50", "r50") else None


def network_task(config, code, arm: str, name: str) -> dict:
    """A network on original pixels, on what is decoded or on the code."""
    task = dict(config.model, **code, name=name, variant=VARIANTS[arm])
    given = foreign(config, arm)
    in_1x1 = config.weights.stride_in_1x1 if given else True  # as Torfason et al. count it
    task |= dict(frontend=FRONTENDS[arm[0]], stride_in_1x1=in_1x1)
    if name == "segmentation":
        return task | {k: config.segment[k] for k in ("aspp_rates", "output_stride")}
    return task | dict(mode="finetune")
