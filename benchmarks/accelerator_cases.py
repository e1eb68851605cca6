"""What bench_accelerator.py measures: sizes, and our side of each case."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

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


TINY = Sizes(8, 80, 64, 8, 8, 16, 16, 64, 8, 8, 64, (64, 96))
CLASSES, LEVELS, DEPTHS = 1000, 8, (3, 4, 6, 3)
LAMBDAS = (0.0018, 0.18)
LEARNING_RATES = {"stage1": 1e-3, "hyperprior": 1e-4}
ALPHA, L1, TEMPERATURE, MOMENTUM = 0.1, 0.1, 0.2, 0.999


class Case(NamedTuple):
    """One measurement: a name, the number of trained or used parameters, images of a call, a call
    that need not wait for its result (an array), and FLOPs of an image where they are counted."""

    name: str
    parameters: int
    images: int
    call: Callable
    flops: float | None = None


def ours(part: str, sizes: Sizes, options) -> Iterator[Case]:
    """The cases of a part, in JAX."""
    if part == "stage1":
        yield our_stage1(sizes, options)
    elif part == "hyperprior":
        for dtype in options.dtypes:
            yield our_hyperprior(sizes, options, dtype)
    else:
        for dtype in options.dtypes:
            yield our_codec(sizes, options, dtype)
        yield our_classifier(sizes, options)


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


def our_stage1(sizes: Sizes, options) -> Case:
    from icm_jax.engine.cost import multiply_accumulates
    from icm_jax.tasks import build_task

    run = our_run("omni_icm", "imagenet", "omni/stage1")
    if options.tiny:
        run.data.canvas = sizes.canvas
        run.task.update(width=sizes.width, size=sizes.view, queue=sizes.queue)
        run.task.update(filter_channels=sizes.filter_channels)
        run.task.update(filter_widths=(sizes.filter_width,) * 3)
        run.task.update(projector_hidden=sizes.hidden, embedding=sizes.embedding)
    run = dataclasses.replace(run, batch_size=options.stage1_batch)
    task = build_task(run.task)
    batch = {"image": our_images(run.batch_size, run.data.canvas, run.data.canvas)}
    state, call = our_training(run, task, batch)
    forward = multiply_accumulates(task.predict, state.variables, batch) / run.batch_size
    parameters = count(state.variables["params"])
    return Case("stage1, bfloat16", parameters, run.batch_size, call, 4 * 2 * forward)


def our_hyperprior(sizes: Sizes, options, dtype: str) -> Case:
    from icm_jax.tasks import build_task

    run = our_run("hyperprior", "large", "mean_scale_hyperprior")
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

    from icm_jax.engine import sharding, train

    training = train.prepare(run, task, jax.devices()[:1])
    init, abstract = train.initial(training)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fresh = jax.jit(init, out_shardings=places)
    state = fresh(jax.random.key(run.seed), dict(task.constants))
    step = train.compiled_step(training, state)
    batch = jax.device_put(batch, sharding.batch_sharding(training.mesh))
    key = jax.device_put(jax.random.key(run.seed), sharding.replicated(training.mesh))
    held = [state]  # donated to the first step; each step leaves its successor

    def call():
        held[0], metrics = step(held[0], batch, key)
        return metrics["loss"]

    return abstract, call


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

    @jax.jit
    def reconstruct(variables, images):
        y = codec.tiling.front(variables, {"image": images, "quality": quality})
        decoded = {"y": ops.quantise(y), "quality": quality}
        return codec.outputs["image"](variables, decoded, sizes.picture)

    return Case(
        f"codec, {dtype}",
        count([own[name] for name in ("analysis", "synthesis", "gain")]),
        batch,
        lambda: reconstruct(variables, images),
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
    predict = jax.jit(model.apply)
    return Case(
        "resnet-50, bfloat16",
        count(variables["params"]),
        batch,
        lambda: predict(variables, images),
        2 * multiply_accumulates(model.apply, variables, images) / batch,
    )
