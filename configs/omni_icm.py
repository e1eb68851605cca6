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

    Command: python -m icm_jax.main --config=configs/omni_icm.py:transfer \\
                 --config.data.path=PHOTOS --config.stage3.tasks.objects.data.path=FOLDER \\
                 --config.stage3.tasks.street.data.path=MASKS \\
                 --config.stage3.tasks.boxes.data.path=COCO
    Takes:   not run here to its end; 80 to 150 steps a stage 48 min (docs/omni_tasks.md)
    On:      2 CPU cores that other jobs shared
    Expect:  no number of ours at its full length; in the short run boxes as good as on pixels at
             0.045 bpp, classes and streets 8 and 9 points below

Runs, in this order and for every seed:

    filter               stage 0: the information filter alone, on features of the untrained head
    contrast             contrastive learning through the filter, α = 0: where both arms start
    omni, unfiltered     stage1: contrastive learning through the information filter; the two differ
                         in α alone (`unfiltered` is the α = 0 twin)
                         stage2-λ: the feature codec at each λ, backbone frozen
                         classify-λ, linear-λ, segment-λ, detect-λ, instances-λ: tail and head
                         trained on decoded features
    rgb                  the backbone trained on pixels, fed with JPEG and WebP files

`stage3.tasks` names the tasks; each may have data of its own (`data.name`, `data.path`), and then a
rival of its own on pixels. "detect" finds boxes and "instances" masks of objects (docs/extend/
objects.md); their data say how many objects an image has at most (`data.boxes`), and of masks at
every how many pixels they are learned (`data.outlines`).

`weights.path`, torchvision's or MoCo's, is what `filter`, `contrast` or else stage1 start from;
`pretrain.steps=0` leaves `contrast` out. `stage3.weights.path` is that of the tails of the tasks,
and of rgb (docs/extend/weights.md).
"""

from typing import NamedTuple

import ml_collections

from configs import common
from icm_jax.data import BATCH_FIELDS, data_fields, geometry
from icm_jax.engine.run import Labels, Point, Run, Start, make_run
from icm_jax.errors import IcmError
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
NEEDS = {"classify": ("label",), "linear": ("label",), "segment": ("mask",)}
NEEDS |= {"detect": ("objects",), "instances": ("objects", "outlines")}
"""Kind of task -> labels that its images need, the rarest last."""
PUBLISHED = 800
"""Pixels of the shorter side of images for which FCOS's ranges are published (Tian et al. 2019)."""


def task(kind: str, steps: int, **own) -> dict:
    """One of `stage3.tasks`.

    Its data are the experiment's, or a set of its own (data.name), but for the fields of batches
    that it gives, as data.boxes; learning_rate and batch_size are those of stage 3, size that of
    the model, or of whole images where objects are found, where they are 0. Of 0 steps it is left
    out.
    """
    fields = dict(kind=kind, steps=steps, learning_rate=0.0, batch_size=0, size=0)
    return fields | dict(data=dict(name="")) | own


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
            # By their names; all read the same files of a codec.
            tasks=dict(
                classify=task("classify", 900),
                linear=task("linear", 0),
                segment=task("segment", 0),
                detect=task("detect", 0, learning_rate=3e-3, data=dict(name="", boxes=8)),
            ),
            batch_size=0,
            aspp_rates=(1, 2, 3),
            output_stride=16,
            # Of detect and instances; see docs/extend/objects.md. crop is that of their views.
            objects=dict(
                channels=64,
                convolutions=2,
                mask_boxes=16,
                least=0.05,
                overlap=0.6,
                limit=50,
                protocol="coco",
                crop=(0.4, 1.0),
            ),
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
    config["stage3"]["tasks"]["classify"].update(steps=1200)
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
    config["stage3"].update(warmup_steps=2)
    for name, own in config["stage3"]["tasks"].items():
        own.update(steps=0 if name == "detect" else 4)
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
        tasks=dict(classify=task("classify", 100_000), linear=task("linear", 100_000)),
        learning_rate=1e-4,
        aspp_rates=(6, 12, 18, 24),
        output_stride=8,
    )
    config["rgb"].update(steps=100_000)
    return config


def transfer() -> dict:
    """The feature is learned on photographs without labels, and tasks on data of their own."""
    config = demo()
    config["data"] = dict(name="photos", path="", canvas=128)
    config["model"].update(size=128)
    street = dict(name="mask_folder", path="", canvas=(192, 256))
    boxes = dict(name="coco_json", path="", canvas=(192, 256), boxes=20)
    config["stage3"].update(
        decode_once=False,  # these sets are small: every view of an image counts
        tasks=dict(
            objects=task("classify", 1200, data=dict(name="folder", path="", canvas=128)),
            street=task("segment", 1200, size=(192, 256), data=street),
            boxes=task("detect", 1200, learning_rate=3e-3, batch_size=8, data=boxes),
            things=task("detect", 0, learning_rate=3e-3, batch_size=8, data=boxes | dict(boxes=50)),
        ),
    )
    config["stage2"].update(lambdas=(0.1, 0.3, 1.0))
    config["rgb"].update(steps=1200)
    return config


get_config = common.scales(demo, study, tiny, imagenet, transfer)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """All runs, each complete in itself, in the order in which they depend on each other."""
    tasks, listed = tasks_of(config), []
    for seed in config.seeds:
        for arm in ARMS:
            listed += arm_runs(config, tasks, seed, arm)
        listed += rgb_runs(config, tasks, seed)
    return listed


def notes(config: ml_collections.ConfigDict) -> list[str]:
    """Tasks that are asked for and left out."""
    shared = [own for own in config.stage3.tasks.values() if own.steps and not own.data.name]
    said = common.left_out(config, {own.kind: NEEDS[own.kind][-1] for own in shared})
    if config.weights.path and config.codecs:
        said.append(f"weights.path starts nothing: the codecs are those of {config.codecs}.")
    return said


class OwnTask(NamedTuple):
    """A task of stage 3 that its data have labels for.

    Attributes:
      name, kind, steps: of `stage3.tasks`. stage: what is of its runs alone, as `make_run` takes
        it. size: of its views. data: fields of its own data set, or None.
    """

    name: str
    kind: str
    steps: int
    stage: ml_collections.ConfigDict
    size: int | tuple[int, int]
    data: dict | None


def tasks_of(config: ml_collections.ConfigDict) -> list[OwnTask]:
    """Tasks that are asked for, but for those whose labels the experiment's data lack; if they have
    masks alone, these are segmented.

    Raises: IcmError for an unknown kind.
    """
    keys, found, asked = common.label_keys(config), [], config.stage3.tasks
    for name, own in asked.items():
        if own.kind not in NEEDS:
            raise IcmError(
                f"config.stage3.tasks.{name}.kind is {own.kind!r}; choose one of {', '.join(NEEDS)}"
            )
        data = own_data(config, own)
        if own.steps and (own.data.name or {*NEEDS[own.kind]} <= {*keys}):
            found.append(own_task(config, name, own.kind, own.steps, data))
    if not found and "mask" in keys and asked:
        steps = max(own.steps for own in asked.values())
        name = next((name for name, own in asked.items() if own.kind == "segment"), "segment")
        found += [own_task(config, name, "segment", steps, None)] if steps else []
    return found


def own_data(config, own) -> dict | None:
    """Fields of the data that a task of `stage3.tasks` has of its own; None: the experiment's."""
    batches = {field: own.data.get(field) for field in BATCH_FIELDS}
    given = {field: value for field, value in batches.items() if value is not None}
    if own.data.name or not given:
        return common.fields_of(own.data, config.data)
    return data_fields(config.data) | given


def own_task(config, name: str, kind: str, steps: int, data: dict | None) -> OwnTask:
    """A task with what it has of its own."""
    own, stage = config.stage3.tasks.get(name, {}), dict(config.stage3)
    for field in ("learning_rate", "batch_size"):
        stage[field] = own.get(field) or stage[field]
    whole = "objects" in NEEDS[kind]
    size = own.get("size") or ((data or config.data)["canvas"] if whole else config.model.size)
    return OwnTask(name, kind, steps, ml_collections.ConfigDict(stage), size, data)


def arm_runs(config, tasks: list[OwnTask], seed: int, arm: str) -> list:
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
        for own in tasks:
            name = f"{base}/{own.name}-{lmbda:g}"
            labels = Labels(own.kind, arm, f"{lmbda:g}", **ARMS[arm])
            listed.append(task_run(config, seed, name, own, start, labels))
    return listed


def filter_fields(config, **more) -> dict:
    """The information filter, as `icm_jax.tasks.task.build_codec` takes it."""
    return dict(config.filter, variant=config.model.variant, width=config.model.width, **more)


def codec_fields(config) -> dict:
    """The feature codec likewise; it contains the filter, whose fields are its filter_..."""
    inner = {f"filter_{key}": value for key, value in config.filter.items() if key != "name"}
    return dict(config.codec, variant=config.model.variant, width=config.model.width, **inner)


def task_run(config, seed, name: str, own: OwnTask, start, labels: Labels) -> Run:
    """Stage 3: a head (and the tail) on decoded features."""
    task = dict(config.model, frontend="feature", codec=codec_fields(config))
    task |= head_fields(config, own)
    fields = dict(decode_once=config.stage3.decode_once, labels=labels)
    fields |= dict(evaluate=(Point("stream", data=own.data),))
    return own_run(config, own, seed, name, task, start, own.steps, **fields)


def rgb_runs(config, tasks: list[OwnTask], seed: int) -> list[Run]:
    """The rivals: the backbone trained on pixels, fed with files of other formats. One per data set
    of a task's own, and one for the first task of the experiment's."""
    listed, shared = [], False
    origin = "contrast" if config.pretrain.steps else "unfiltered/stage1"
    start = [Start(f"seed{seed}/{origin}", BACKBONE, config.codecs)]
    for own in tasks:
        if own.kind == "linear" or (own.data is None and shared):
            continue
        shared |= own.data is None
        task = dict(config.model, frontend="pixels") | head_fields(config, own)
        points = (Point("pixels", data=own.data), *file_points(config.rgb.files, own.data))
        fields = dict(labels=Labels(own.kind, "rgb"), evaluate=points)
        name = f"seed{seed}/rgb/{own.name}"
        listed.append(own_run(config, own, seed, name, task, start, config.rgb.steps, **fields))
    return listed


def head_fields(config, own: OwnTask) -> dict:
    """Of the task: its name, its size, and what belongs to its kind."""
    if "objects" in NEEDS[own.kind]:
        scale = min(geometry.sides(own.size)) / PUBLISHED
        of_kind = dict(range_scale=scale, masks="outlines" in NEEDS[own.kind])
        return dict(config.stage3.objects, name="object_detection", size=own.size, **of_kind)
    if own.kind == "segment":
        of_kind = {k: config.stage3[k] for k in ("aspp_rates", "output_stride")}
        return dict(name="segmentation", size=own.size, **of_kind)
    mode = "linear" if own.kind == "linear" else "finetune"
    return dict(name="classification", size=own.size, mode=mode)


def own_run(config, own: OwnTask, seed, name: str, task: dict, start, steps: int, **fields) -> Run:
    """A run of a task of stage 3, on its data."""
    fields |= dict(needs=NEEDS[own.kind], weights=common.foreign(config.stage3.weights))
    return stage_run(
        config, own.stage, seed, name, task, start, steps=steps, data=own.data, **fields
    )


def stage_run(config, stage, seed: int, name: str, task: dict, start, **fields) -> Run:
    """A run of one stage."""
    given = dict(name=name, seed=seed, task=task, start=tuple(start), weight_decay=1e-4)
    return make_run(config, stage, **given, **fields)
