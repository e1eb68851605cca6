"""What bench_accelerator.py measures: sizes, and our side of each case."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Sizes(NamedTuple):
    """Of networks and images; the defaults are those of the configs."""

    width: int = 64  # of ResNet-50
    canvas: int = 256  # sides of the images that views are cut from
    view: int = 224
    filter_channels: int = 192
    filter_width: int = 128
    hidden: int = 2048  # of the projector
    embedding: int = 128
    queue: int = 65_536
    codec_width: int = 192  # N
    codec_channels: int = 320  # M
    crop: int = 256  # sides of the image codec's training images
    picture: tuple[int, int] = (512, 768)
    trunk: float = 1.0  # factor of the channels of networks on coefficients
    detector: tuple[float, float] = (1.0, 1.0)  # factors of YOLOv3's channels and depth
    scene: int = 416  # sides of its images


TINY = Sizes(8, 80, 64, 8, 8, 16, 16, 64, 8, 8, 64, (64, 96), 1 / 16, (1 / 16, 0.1), 64)
CLASSES, LEVELS, DEPTHS = 1000, 8, (3, 4, 6, 3)
OBJECTS = 8  # of an image, to detect
LAMBDAS = (0.0018, 0.18)
LEARNING_RATES = {"stage1": 1e-3, "hyperprior": 1e-4}
ALPHA, L1, TEMPERATURE, MOMENTUM = 0.1, 0.1, 0.2, 0.999


class Case(NamedTuple):
    """One measurement.

    Attributes:
      name: of it. parameters: how many are trained or used. images: of a call.
      call: () -> an array, for which it need not wait.
      flops: of an image, where they are counted.
      phases: where it has any, a counter to which each call adds its seconds by phase.
      about: what else the record says.
    """

    name: str
    parameters: int
    images: int
    call: Callable[[], Any]
    flops: float | None = None
    phases: dict[str, float] | None = None
    about: Mapping[str, Any] = {}


Build = Callable[[], list[Case]]
"""Makes and compiles cases that belong together."""


def ours(part: str, sizes: Sizes, options) -> list[Build]:
    """The cases of a part, in JAX."""
    if part == "stage1":
        run = our_run("omni_icm", "imagenet", "omni/stage1")
        builds = [functools.partial(our_stage1, run, sizes, options)]
    elif part == "hyperprior":
        builds = [
            functools.partial(
                our_hyperprior,
                our_run("hyperprior", "large", "mean_scale_hyperprior"),
                sizes,
                options,
                dtype,
            )
            for dtype in options.dtypes
        ]
    elif part == "detection":
        run = our_run("yolov3", "coco", "detector")
        builds = [functools.partial(our_detector, run, sizes, options)]
    elif part == "coefficients":
        from bench_without_decoding import PAPER

        arms = ("rgb", *PAPER)
        return [functools.partial(our_arm, arm, sizes, options) for arm in arms]
    elif part == "coding":
        from accelerator_coding import coding_cases

        batches = options.coding_batches
        return [functools.partial(coding_cases, n, sizes.picture, options.images) for n in batches]
    else:
        builds = [functools.partial(our_codec, sizes, options, dtype) for dtype in options.dtypes]
        builds.append(functools.partial(our_classifier, sizes, options))
    return [lambda build=build: [build()] for build in builds]


def our_run(experiment: str, scale: str, name: str):
    """The run of a config whose name ends so."""
    from icm_jax.main import load_experiment

    module = load_experiment(str(ROOT / "configs" / f"{experiment}.py"))
    runs = module.runs(module.get_config(scale))
    return next(run for run in runs if run.name.endswith(name))


def our_images(batch: int, height: int, width: int):
    """uint8 [batch, height, width, 3] of noise on the device."""
    import jax

    return jax.random.bits(jax.random.key(0), (batch, height, width, 3), "uint8")


def count(tree) -> int:
    """How many numbers a tree of arrays holds."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def our_stage1(run, sizes: Sizes, options) -> Case:
    from icm_jax.engine.cost import multiply_accumulates
    from icm_jax.tasks import build_task

    if options.tiny:
        run.data.canvas = sizes.canvas
        run.task.update(width=sizes.width, size=sizes.view, queue=sizes.queue)
        widths = (sizes.filter_width,) * 3
        run.task.codec.update(channels=sizes.filter_channels, widths=widths)
        run.task.update(projector_hidden=sizes.hidden, embedding=sizes.embedding)
    run = dataclasses.replace(run, batch_size=options.stage1_batch)
    task = build_task(run.task)
    batch = {"image": our_images(run.batch_size, run.data.canvas, run.data.canvas)}
    state, call = our_training(run, task, batch)
    forward = multiply_accumulates(task.predict, state.variables, batch) / run.batch_size
    parameters = count(state.variables["params"])
    return Case("stage1, bfloat16", parameters, run.batch_size, call, 4 * 2 * forward)


def our_hyperprior(run, sizes: Sizes, options, dtype: str) -> Case:
    from icm_jax.tasks import build_task

    if options.tiny:
        run.data.canvas = sizes.canvas
        run.task.size = sizes.crop
        run.task.codec.update(width=sizes.codec_width, channels=sizes.codec_channels)
    run.task.codec.dtype = dtype
    run = dataclasses.replace(run, batch_size=options.hyperprior_batch)
    task = build_task(run.task)
    batch = {"image": our_images(run.batch_size, run.task.size, run.task.size)}
    state, call = our_training(run, task, batch)
    forward = codec_multiply_accumulates(task.codec, state.variables, batch["image"])[1]
    parameters = count(state.variables["params"])
    return Case(f"hyperprior, {dtype}", parameters, run.batch_size, call, 3 * 2 * forward)


def our_training(run, task, batch: dict):
    """(fresh state, (() -> the loss of one more step)) by `icm_jax.engine.train`."""
    import jax

    from icm_jax.compiled import give_back
    from icm_jax.engine import sharding, train

    training = train.prepare(run, task, jax.devices()[:1])
    init, abstract = train.initial(training)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fresh = jax.jit(init, out_shardings=places)
    state = fresh(jax.random.key(run.seed), dict(task.constants))
    batch = jax.device_put(batch, sharding.batch_sharding(training.mesh))
    key = jax.device_put(jax.random.key(run.seed), sharding.replicated(training.mesh))
    step = train.compiled_step(training, state).lower(state, batch, key).compile()
    give_back()
    held = [state]  # donated to the first step; each step leaves its successor

    def call():
        held[0], metrics = step(held[0], batch, key)
        return metrics["loss"]

    return abstract, call


def our_detector(run, sizes: Sizes, options) -> Case:
    import jax

    from icm_jax.engine.cost import multiply_accumulates
    from icm_jax.engine.plan.step import counted
    from icm_jax.tasks import build_task

    run = dataclasses.replace(run, batch_size=options.detection_batch)
    run.data.canvas = run.task.size = sizes.scene
    run.task.detector.width, run.task.detector.depth = sizes.detector
    run.task.dtype = "bfloat16"
    config = counted(run)
    task, rows = build_task(config), (run.batch_size, run.data.boxes)
    corners = jax.random.uniform(jax.random.key(1), (*rows, 2), maxval=0.7)
    extents = jax.random.uniform(jax.random.key(2), (*rows, 2), minval=0.05, maxval=0.3)
    batch = {
        "image": our_images(run.batch_size, sizes.scene, sizes.scene),
        "boxes": jax.numpy.concatenate([corners, corners + extents], axis=-1),
        "box_labels": jax.random.randint(jax.random.key(3), rows, 0, config.classes),
        "box_valid": jax.numpy.broadcast_to(jax.numpy.arange(rows[1])[None] < OBJECTS, rows),
    }
    state, call = our_training(run, task, batch)
    forward = multiply_accumulates(task.predict, state.variables, batch) / run.batch_size
    parameters = count(state.variables["params"])
    return Case("yolov3, bfloat16", parameters, run.batch_size, call, 3 * 2 * forward)


def our_arm(arm: str, sizes: Sizes, options) -> list[Case]:
    """ResNet-50 on RGB, or a wiring on coefficients: inputs on the device, or on the host."""
    import jax
    import numpy as np
    from bench_without_decoding import drawn
    from ml_collections import ConfigDict

    from icm_jax.engine.cost import multiply_accumulates
    from icm_jax.tasks import build_task

    network, given = ("50", "rgb") if arm == "rgb" else (arm, "jpeg")
    fields = dict(name="coefficient_classification", network=network, input=given, classes=CLASSES)
    fields |= dict(width=sizes.trunk, size=sizes.view, dtype="bfloat16")
    task = build_task(ConfigDict(fields))
    batch, rng = options.coefficients_batch, np.random.default_rng(0)
    if arm == "rgb":
        inputs = {"image": rng.integers(0, 256, (batch, sizes.view, sizes.view, 3), np.uint8)}
    else:
        sides = [(sizes.view // s, sizes.view // s) for s in (8, 16)]
        luma, chroma = (
            rng.integers(-8, 8, (batch, *own, channels), np.int16)
            for own, channels in zip(sides, (64, 128), strict=True)
        )
        inputs = dict(luma=luma, chroma=chroma, steps=np.full((batch, 192), 4, np.int32))
    variables = jax.device_put(drawn(task))
    program = jax.jit(lambda v, x: task.predict(v, x)["logits"]).lower(variables, inputs).compile()
    placed = jax.device_put(inputs)
    flops = 2 * multiply_accumulates(task.predict, variables, inputs) / batch
    cases = []
    for place, own in (("device", placed), ("host", inputs)):
        name = f"coefficients, {arm}, from the {place}"
        call = functools.partial(program, variables, own)
        cases.append(Case(name, count(variables["params"]), batch, call, flops))
    return cases


def codec_multiply_accumulates(codec, variables, images) -> tuple[float, float]:
    """Of an image: those of the analysis transform, and those of a whole forward pass."""
    import jax

    from icm_jax.codecs.codec import forward
    from icm_jax.engine.cost import multiply_accumulates

    shape = images.shape[1:3]
    quality = jax.ShapeDtypeStruct(images.shape[:1], "float32")
    inputs = {"image": images, "quality": quality}
    y = jax.eval_shape(codec.tiling.front, variables, inputs)
    analysis = multiply_accumulates(codec.tiling.front, variables, inputs)
    synthesis = multiply_accumulates(
        lambda v, decoded: codec.outputs["image"](v, decoded, shape),
        variables,
        {"y": y, "quality": quality},
    )
    whole = multiply_accumulates(
        lambda v, inputs: forward(codec, v, inputs, shape).outputs, variables, inputs
    )
    return analysis / len(images), (whole - synthesis + analysis) / len(images)


def our_codec(sizes: Sizes, options, dtype: str) -> Case:
    import jax

    from icm_jax import ops
    from icm_jax.codecs import image_codec

    kind, batch = "mean_scale_hyperprior", options.codec_batch
    codec = image_codec(kind, sizes.codec_width, sizes.codec_channels, LEVELS, dtype)
    images = our_images(batch, *sizes.picture)
    variables = jax.jit(codec.init)(jax.random.key(0), images)
    own = variables["params"]["image_codec"]
    quality = jax.numpy.linspace(0.0, 1.0, batch)

    def reconstruct(variables, images):
        y = codec.tiling.front(variables, {"image": images, "quality": quality})
        decoded = {"y": ops.quantise(y), "quality": quality}
        return codec.outputs["image"](variables, decoded, sizes.picture)

    program = jax.jit(reconstruct).lower(variables, images).compile()
    return Case(
        f"codec, {dtype}",
        count([own[name] for name in ("analysis", "synthesis", "gain")]),
        batch,
        lambda: program(variables, images),
        2 * 2 * codec_multiply_accumulates(codec, variables, images)[0],
    )


def our_classifier(sizes: Sizes, options) -> Case:
    import flax.linen
    import jax

    from icm_jax import ops
    from icm_jax.engine.cost import multiply_accumulates
    from icm_jax.nets import resnet
    from icm_jax.tasks import views

    class Classifier(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, images):
            x = ops.normalise(views.centre(images, sizes.view))
            f = resnet.Head("50", sizes.width, jax.numpy.bfloat16)(x, False)
            *_, c4 = resnet.Tail("50", sizes.width, dtype=jax.numpy.bfloat16)(f, False)
            return flax.linen.Dense(CLASSES)(resnet.global_pool(c4))

    model, batch = Classifier(), options.resnet_batch
    images = our_images(batch, sizes.canvas, sizes.canvas)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    predict = jax.jit(model.apply).lower(variables, images).compile()
    return Case(
        "resnet-50, bfloat16",
        count(variables["params"]),
        batch,
        lambda: predict(variables, images),
        2 * multiply_accumulates(model.apply, variables, images) / batch,
    )
