"""Training steps and inference on one accelerator, ours beside PyTorch with the same networks.

    PYTHONPATH=. python benchmarks/bench_accelerator.py [--parts stage1 hyperprior evaluation]
    PYTHONPATH=. python benchmarks/bench_accelerator.py --tiny     # that all of it runs, on a CPU

    stage1       the step of the run omni/stage1 of configs/omni_icm.py:imagenet: ResNet-50 at
                 224 px, information filter, momentum encoder, queue of 65,536 keys, SGD
    hyperprior   the step of configs/hyperprior.py:large (N = 192, M = 320, mean and scale, 8 levels
                 of quality) on crops of 256×256 px, AdamW; in float32 and in bfloat16
    evaluation   that codec's analysis, rounding and synthesis of 512×768 px images, in both; and
                 ResNet-50 with 1,000 classes at 224 px, bfloat16

Each library runs in a process of its own, in turn; images are random bytes on the device, weights
are random. PyTorch computes through torch.compile (where a C compiler is found), channels-last,
cuDNN's autotuner, fused optimisers, and autocast around just those networks that compute in
bfloat16 in ours: ResNet and projector, analysis and synthesis. All else is float32, of which
matrix units see TF32 in both: XLA's default, and PyTorch's once it is allowed for matrix products.

Both give the same losses of the same views, but for details that cost nothing: in PyTorch bounds of
GDN and of scale indexes are plain clamps, running variances are unbiased, learning rates are
constant; initial values differ. Products that make PyTorch's views may be TF32, ours are float32.

FLOPs are counted once, for both, on our forward pass: two per multiply-accumulate of a convolution
or matrix product, by `icm_jax.cost`, three times that for a training step, and once more for the
momentum encoder. Views, the queue and updates are left out. The synthesis transform is counted as
its mirror, the analysis transform: the form in which we compute it would add taps that are zero.
"""

import argparse
import copy
import gzip
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# PyTorch's processes alone import it: its CUDA libraries need not be those of JAX.
if sys.argv[-3:-1] == ["--child", "pytorch"]:
    import torch
    from torch import nn
    from torch.nn import functional

    Module = nn.Module
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # On the device once and for all: compiled functions would copy them at every call.
    MEAN = torch.tensor([0.485, 0.456, 0.406], device=DEVICE).reshape(3, 1, 1)
    DEVIATION = torch.tensor([0.229, 0.224, 0.225], device=DEVICE).reshape(3, 1, 1)
    TO_YIQ = torch.tensor(
        [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], device=DEVICE
    )
    FROM_YIQ = torch.linalg.inv(TO_YIQ)
else:
    Module = object

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("stage1", "hyperprior", "evaluation")
BATCHES = {"stage1": 256, "hyperprior": 32, "codec": 16, "resnet": 256}
TRACED = 3  # steps under the profiler
LEAST = 0.03  # share of the time from which on an operation is listed
NAMES = {"icm_jax": "ours", "pytorch": "PyTorch"}


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


# ---- ours


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
    from icm_jax.cost import multiply_accumulates
    from icm_jax.tasks import build_task

    run = our_run("omni_icm", "imagenet", "omni/stage1")
    if options.tiny:
        run.data.canvas = sizes.canvas
        run.task.update(width=sizes.width, size=sizes.view, queue=sizes.queue)
        run.task.update(filter_channels=sizes.filter_channels)
        run.task.update(filter_widths=(sizes.filter_width,) * 3)
        run.task.update(projector_hidden=sizes.hidden, embedding=sizes.embedding)
    run.batch_size = options.stage1_batch
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
        run.task.update(width=sizes.codec_width, channels=sizes.codec_channels, size=sizes.crop)
    run.task.dtype = dtype
    run.batch_size = options.hyperprior_batch
    task = build_task(run.task)
    batch = {"image": our_images(run.batch_size, run.task.size, run.task.size)}
    state, call = our_training(run, task, batch)
    forward = codec_multiply_accumulates(task.codec, state.variables, batch["image"])[1]
    parameters = count(state.variables["params"])
    return Case(f"hyperprior, {dtype}", parameters, run.batch_size, call, 3 * 2 * forward)


def our_training(run, task, batch: dict):
    """(fresh state, (() -> the loss of one more step)) by the functions of `icm_jax.train`."""
    import jax

    from icm_jax import optim, sharding, train

    mesh = sharding.make_mesh(1, jax.devices()[:1])
    optimiser = optim.make_optimiser(run.optim, run.steps, len(batch["image"]))
    init, abstract = train.initial(task, optimiser, run, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fresh = jax.jit(init, out_shardings=places)
    state = fresh(jax.random.key(run.seed), dict(task.constants))
    step = train.compiled_step(task, optimiser, run, mesh, state)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    key = jax.device_put(jax.random.key(run.seed), sharding.replicated(mesh))
    held = [state]  # donated to the first step; each step leaves its successor

    def call():
        held[0], metrics = step(held[0], batch, key)
        return metrics["loss"]

    return abstract, call


def codec_multiply_accumulates(codec, variables, images) -> tuple[float, float]:
    """Of an image: those of the analysis transform, and those of a whole forward pass."""
    import jax

    from icm_jax.codecs.codec import forward
    from icm_jax.cost import multiply_accumulates

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

    from icm_jax import ops, views
    from icm_jax.cost import multiply_accumulates
    from icm_jax.nets import resnet

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


def device_of_jax() -> dict:
    """Name and peak of the device, FLOP/s in bfloat16 or None."""
    import jax

    from icm_jax import plan

    chip = plan.open_target("local").chip
    return {"device": jax.devices()[0].device_kind, "peak": chip.flops if chip else None}


def profile(call, wait) -> list[dict]:
    """What the GPU's time goes to in some calls: families of operations, the longest first.

    Returns: of each name (numbers at its end left out) its share of the time of all kernels, its
      seconds and calls per step, and where in the program the longest of its kind comes from;
      nothing where no device was traced.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                result = call()
            wait(result)
        traces = sorted(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(traces[-1].read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("ph") == "M"]
    devices = {
        event["pid"]
        for event in named
        if event["name"] == "process_name" and event["args"]["name"].startswith("/device:GPU")
    }
    streams = {
        (event["pid"], event["tid"])
        for event in named
        if event["name"] == "thread_name" and event["args"]["name"].startswith("Stream")
    }
    families: dict[str, list[dict]] = {}
    for event in events:
        on_stream = (event.get("pid"), event.get("tid")) in streams
        if event.get("ph") == "X" and on_stream and event["pid"] in devices:
            families.setdefault(re.sub(r"(_\d+)+$", "", event["name"]), []).append(event)
    total = sum(event["dur"] for own in families.values() for event in own)
    found = []
    for name, own in families.items():
        microseconds = sum(event["dur"] for event in own)
        arguments = max(own, key=lambda event: event["dur"]).get("args", {})
        origin = arguments.get("tf_op") or arguments.get("name") or arguments.get("hlo_op", "")
        found.append(
            {
                "name": name,
                "share": microseconds / total,
                "seconds": microseconds / 1e6 / TRACED,
                "calls": len(own) / TRACED,
                "longest": origin,
            }
        )
    return sorted(found, key=lambda own: -own["share"])


# ---- PyTorch


def pytorch(part: str, sizes: Sizes, options) -> Iterator[Case]:
    """The cases of a part, in PyTorch."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if part == "stage1":
        yield torch_stage1(sizes, options)
    elif part == "hyperprior":
        for dtype in options.dtypes:
            yield torch_hyperprior(sizes, options, dtype)
    else:
        for dtype in options.dtypes:
            yield torch_codec(sizes, options, dtype)
        yield torch_classifier(sizes, options)


def half(dtype: str = "bfloat16"):
    """The context in which networks compute in `dtype`."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")


def on_device(module):
    return module.to(DEVICE, memory_format=torch.channels_last)


def compiled(function, options):
    return torch.compile(function) if compiles(options) else function


def compiles(options) -> bool:
    """Whether torch.compile is wanted and finds the C compiler that it needs."""
    found = map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))
    return options.compile and any(found)


def torch_images(batch: int, height: int, width: int):
    """uint8 [batch, 3, height, width] of noise on the device, channels last."""
    shape = (batch, height, width, 3)
    return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE).movedim(3, 1)


def parameters_of(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


class Bottleneck(Module):
    """x + branch(x), ReLU: 1×1, 3×3 with the stride, 1×1 to four times the features."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        outputs = 4 * features
        self.branch = nn.Sequential(
            *convolution(inputs, features, 1),
            nn.ReLU(),
            *convolution(features, features, 3, stride),
            nn.ReLU(),
            *convolution(features, outputs, 1),
        )
        nn.init.zeros_(self.branch[-1].weight)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else convolution(inputs, outputs, 1, stride)))

    def forward(self, x):
        return functional.relu(self.shortcut(x) + self.branch(x))


def convolution(inputs: int, features: int, kernel: int, stride: int = 1) -> list:
    """Convolution and BatchNorm."""
    layer = nn.Conv2d(inputs, features, kernel, stride, kernel // 2, bias=False)
    return [layer, nn.BatchNorm2d(features)]


def stage(inputs: int, features: int, number: int) -> list:
    """Layer 1 to 4 of ResNet-50; all but the first halve the sides."""
    first = Bottleneck(inputs, features, 1 if number == 1 else 2)
    rest = [Bottleneck(4 * features, features, 1) for _ in range(DEPTHS[number - 1] - 1)]
    return [first, *rest]


def head(width: int):
    """ResNet-50 up to layer 1: [N, 3, H, W] -> [N, 4 width, H/4, W/4]."""
    stem = [*convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *stage(width, width, 1))


def tail(width: int):
    """Layers 2 to 4: [N, 4 width, h, w] -> [N, 32 width, h/8, w/8]."""
    layers = (stage(width * 2**n, width * 2 ** (n - 1), n) for n in (2, 3, 4))
    return nn.Sequential(*itertools.chain(*layers))


def normalise(images):
    """RGB on 0...255 to zero mean and unit variance per channel."""
    x = (images.float() / 255 - MEAN) / DEVIATION
    return x.contiguous(memory_format=torch.channels_last)


class Residual(Module):
    """x + conv3×3(ReLU(conv3×3(ReLU(x))))."""

    def __init__(self, features: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.layers[1].weight)

    def forward(self, x):
        first, second = self.layers
        return x + second(functional.relu(first(functional.relu(x))))


def up(inputs: int, features: int) -> list:
    """Sub-pixel convolution, which doubles the sides."""
    return [nn.Conv2d(inputs, 4 * features, 3, padding=1), nn.PixelShuffle(2)]


class FactorisedPrior(Module):
    """Deep factorised prior (Ballé et al. 2018): latents [N, C, h, w] -> bits [N]."""

    def __init__(self, channels: int):
        super().__init__()
        widths, scale = (1, 3, 3, 1), 10 ** (1 / 3)
        self.matrices, self.biases, self.factors = (nn.ParameterList() for _ in range(3))
        for inputs, outputs in itertools.pairwise(widths):
            value = math.log(math.expm1(1 / scale / outputs))
            self.matrices.append(torch.full((channels, outputs, inputs), value))
            self.biases.append(torch.rand(channels, outputs, 1) - 0.5)
            if outputs > 1:
                self.factors.append(torch.zeros(channels, outputs, 1))

    def forward(self, y):
        n, channels = y.shape[:2]
        flat = y.transpose(0, 1).reshape(channels, 1, -1)
        lower, upper = (self.logits(flat + shift) for shift in (-0.5, 0.5))
        right = lower + upper > 0
        small = functional.logsigmoid(torch.where(right, -upper, lower))
        large = functional.logsigmoid(torch.where(right, -lower, upper))
        bits = -(large + log1mexp(large - small)) / math.log(2)
        return bits.reshape(channels, n, -1).sum((0, 2))

    def logits(self, x):
        """Of the cumulative distribution at x [C, 1, M]."""
        for layer, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            x = functional.softplus(matrix) @ x + bias
            if layer < len(self.factors):
                x = x + torch.tanh(self.factors[layer]) * torch.tanh(x)
        return x


def log1mexp(x):
    """log(1 - exp(-x)) for x > 0 (Mächler 2012)."""
    x, limit = x.clamp_min(1e-30), math.log(2)
    near = torch.log(-torch.expm1(-x.clamp_max(limit)))
    return torch.where(x < limit, near, torch.log1p(-torch.exp(-x.clamp_min(limit))))


def gaussian_bits(y, index, mean):
    """Bits [N] of latents [N, C, h, w], as `icm_jax.entropy.gaussian_bits` counts them."""
    low, high = math.log(0.11), math.log(256.0)
    scale = torch.exp(low + index.clamp(0, 63) * ((high - low) / 63))
    distance, edge = (y - mean).abs(), 0.5 + 5 * scale
    centre = -torch.minimum(distance, edge)
    upper, lower = (torch.special.log_ndtr((centre + s) / scale) for s in (0.5, -0.5))
    nats = 6 * torch.log((distance / edge).clamp_min(1)) - upper - log1mexp(upper - lower)
    return nats.sum((1, 2, 3)) / math.log(2)


def rounded(y):
    """Rounds; the gradient is the identity's."""
    return y + (y.round() - y).detach()


def noisy(y):
    return y + torch.rand_like(y) - 0.5


class FilteredResNet(Module):
    """ResNet-50 with the information filter between layers 1 and 2, and the projector."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        features, inner, channels = 4 * sizes.width, sizes.filter_width, sizes.filter_channels
        self.head, self.tail = head(sizes.width), tail(sizes.width)
        encoder, decoder = [nn.Conv2d(features, inner, 1)], []
        for following in (inner, inner, channels):
            encoder += [Residual(inner), nn.Conv2d(inner, following, 3, 2, 1)]
        for previous in (channels, inner, inner):
            decoder += [*up(previous, inner), Residual(inner)]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(inner, features, 1))
        self.prior = FactorisedPrior(channels)
        self.projector = nn.Sequential(
            nn.Linear(32 * sizes.width, sizes.hidden),
            nn.ReLU(),
            nn.Linear(sizes.hidden, sizes.embedding),
        )

    def forward(self, images):
        """[N, 3, H, W] on 0...255 -> (unit embedding [N, D], bits [N] in training, f, f')."""
        with half():
            f = self.head(normalise(images))
        y = self.encoder(f.float())
        bits = self.prior(noisy(y)) if self.training else None
        passed = self.decoder(rounded(y))
        with half():
            embedding = self.projector(self.tail(passed).float().mean((2, 3)))
        return functional.normalize(embedding.float()), bits, f, passed


def torch_stage1(sizes: Sizes, options) -> Case:
    batch = options.stage1_batch
    images = torch_images(batch, sizes.canvas, sizes.canvas)
    model = on_device(FilteredResNet(sizes))
    key_model = copy.deepcopy(model).eval().requires_grad_(False)
    queue = torch.randn(sizes.queue, sizes.embedding, device=DEVICE)
    queue = functional.normalize(queue)
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-4},
            {"params": [p for p in parameters if p.ndim <= 1]},
        ],
        LEARNING_RATES["stage1"],
        momentum=0.9,
        fused=True,
    )
    followed, following = (
        [*own.parameters(), *(b for b in own.buffers() if b.is_floating_point())]
        for own in (model, key_model)
    )
    steps = itertools.count()

    def losses(images, queue):
        query, bits, f, passed = model(torch_views(images, sizes.view))
        with torch.no_grad():
            keys = key_model(torch_views(images, sizes.view))[0]
        own = (query * keys).sum(1, keepdim=True)
        logits = torch.cat([own, query @ queue.T], 1) / TEMPERATURE
        loss = functional.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))
        distance = (f.detach().float() - passed).abs().mean()
        return loss + ALPHA * bits.mean() / sizes.view**2 + L1 * distance, keys

    forward = compiled(losses, options)

    def call():
        step = next(steps)
        with torch.no_grad():
            torch._foreach_lerp_(following, followed, 1 - min(MOMENTUM, step / (step + 10)))
        loss, keys = forward(images, queue)
        update(loss, parameters, optimiser)
        place = step * batch % sizes.queue
        queue[place : place + batch] = keys
        return loss.detach()

    return Case("stage1, bfloat16", parameters_of(model), batch, call)


def update(loss, parameters, optimiser) -> None:
    """One step of the optimiser on gradients whose norm is at most 1."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimiser.step()


def torch_views(images, size: int):
    """What `icm_jax.views.contrastive` does: uint8 [N, 3, S, S] -> float32 [N, 3, size, size]."""
    n, side, device = len(images), images.shape[2], images.device

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * torch.rand(n, 1, 1, 1, device=device)

    def weights(start, extent):
        step = extent / size
        samples = torch.arange(size, device=device)[:, None] + 0.5
        pixels = torch.arange(side, device=device) + 0.5
        distance = (pixels - start - samples * step).abs()
        near = (1 - distance / step.clamp_min(1)).clamp_min(0)
        return near / near.sum(-1, keepdim=True)

    def luma(view):
        red, green, blue = view.split(1, 1)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    area = side**2 * uniform(0.2, 1.0)
    aspect = torch.exp(uniform(-math.log(4 / 3), math.log(4 / 3)))
    aspect = torch.minimum(torch.maximum(aspect, area / side**2), side**2 / area)
    height, width = torch.sqrt(area / aspect), torch.sqrt(area * aspect)
    rows = weights(uniform() * (side - height), height)
    columns = weights(uniform() * (side - width), width)
    columns = torch.where(uniform() < 0.5, columns.flip(2), columns)
    view = rows @ (images.float() / 255) @ columns.mT

    jittered = (view * uniform(0.6, 1.4)).clamp(0, 1)
    contrast, saturation = uniform(0.6, 1.4), uniform(0.6, 1.4)
    mean = luma(jittered).mean((2, 3), keepdim=True)
    jittered = (contrast * jittered + (1 - contrast) * mean).clamp(0, 1)
    jittered = (saturation * jittered + (1 - saturation) * luma(jittered)).clamp(0, 1)
    angle = 2 * math.pi * uniform(-0.1, 0.1)[:, :, 0]
    zero, cos, sin = torch.zeros_like(angle), torch.cos(angle), torch.sin(angle)
    turn = torch.cat([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], 1).reshape(n, 3, 3)
    jittered = ((FROM_YIQ @ turn @ TO_YIQ) @ jittered.flatten(2)).reshape(view.shape).clamp(0, 1)
    view = torch.where(uniform() < 0.8, jittered, view)
    view = torch.where(uniform() < 0.2, luma(view), view)

    places = torch.arange(size, device=device)
    sigma = uniform(0.1, 2.0) * size / 224
    kernel = torch.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
    kernel = kernel / kernel.sum(-1, keepdim=True)
    kernel = torch.where(uniform() < 0.5, kernel, torch.eye(size, device=device))
    return 255 * (kernel @ view @ kernel.mT)


class GDN(Module):
    """Generalised divisive normalisation (Ballé et al. 2016), or its inverse."""

    def __init__(self, channels: int, inverse: bool = False):
        super().__init__()
        self.inverse, self.pedestal = inverse, 2.0**-36
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.sqrt(0.1 * torch.eye(channels) + self.pedestal))

    def forward(self, x):
        beta = self.beta.clamp_min((1e-6 + self.pedestal) ** 0.5).square() - self.pedestal
        gamma = self.gamma.clamp_min(self.pedestal**0.5).square() - self.pedestal
        # Not rsqrt, which autocast computes in float32.
        norm = functional.conv2d(x * x, gamma[:, :, None, None], beta).sqrt()
        return x * norm if self.inverse else x / norm


class ImageCodec(Module):
    """Mean-and-scale hyperprior (Minnen et al. 2018, without context) with gains per quality."""

    def __init__(self, sizes: Sizes, dtype: str):
        super().__init__()
        n, m, self.dtype = sizes.codec_width, sizes.codec_channels, dtype
        analysis, synthesis = [], []
        for inputs in (3, n, n):
            analysis += [nn.Conv2d(inputs, n, 5, 2, 2), GDN(n)]
        for inputs in (m, n, n):
            synthesis += [nn.ConvTranspose2d(inputs, n, 5, 2, 2, 1), GDN(n, inverse=True)]
        self.analysis = nn.Sequential(*analysis, nn.Conv2d(n, m, 5, 2, 2))
        self.synthesis = nn.Sequential(*synthesis, nn.ConvTranspose2d(n, 3, 5, 2, 2, 1))
        initial = math.log(6) + math.log(10) * torch.linspace(-0.5, 0.5, LEVELS)[:, None]
        self.gains = nn.ParameterList([initial.repeat(1, m), initial.repeat(1, m)])
        self.hyper_analysis = nn.Sequential(
            nn.Conv2d(m, n, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(n, n, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(n, n, 5, 2, 2),
        )
        self.hyper_synthesis = nn.Sequential(
            *up(n, n), nn.ReLU(), *up(n, n), nn.ReLU(), nn.Conv2d(n, 2 * m, 3, padding=1)
        )
        self.prior = FactorisedPrior(n)

    def encode(self, x, quality):
        """[N, 3, H, W] on 0...255, quality [N] on 0...1 -> latents y [N, M, H/16, W/16]."""
        with half(self.dtype):
            y = self.analysis(x.float() / 255 - 0.5)
        return y.float() * self.gain(0, quality)

    def decode(self, y, quality):
        with half(self.dtype):
            x = self.synthesis(y / self.gain(1, quality))
        return 255 * (x.float() + 0.5)

    def gain(self, side: int, quality):
        """[N, M, 1, 1]: the gain (side 0) or what takes it back (1), between two levels."""
        levels = torch.arange(LEVELS, device=quality.device)
        weights = (1 - (quality[:, None] * (LEVELS - 1) - levels).abs()).clamp_min(0)
        return torch.exp(weights @ self.gains[side])[:, :, None, None]

    def forward(self, x, quality):
        """-> (image [N, 3, H, W], bits [N]) of noisy latents."""
        y = self.encode(x, quality)
        z = noisy(self.hyper_analysis(y.abs()))
        index, mean = self.hyper_synthesis(z).chunk(2, 1)
        y = noisy(y)
        bits = self.prior(z) + gaussian_bits(y, 64 * index + 18, mean)
        return self.decode(y, quality), bits


def torch_hyperprior(sizes: Sizes, options, dtype: str) -> Case:
    batch = options.hyperprior_batch
    images = torch_images(batch, sizes.crop, sizes.crop)
    model = on_device(ImageCodec(sizes, dtype))
    parameters = list(model.parameters())
    rate = LEARNING_RATES["hyperprior"]
    optimiser = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True)
    low, high = (math.log(value) for value in LAMBDAS)

    def loss_of(images):
        mirrored = torch.rand(batch, 1, 1, 1, device=images.device) < 0.5
        x = torch.where(mirrored, images.flip(3), images).float()
        places = torch.arange(batch, device=images.device) / batch
        quality = (torch.rand(1, device=images.device) + places) % 1
        x_hat, bits = model(x, quality)
        lmbda = torch.exp(low + quality * (high - low))
        losses = bits / sizes.crop**2 + lmbda * (x - x_hat).square().mean((1, 2, 3))
        return (losses * torch.sqrt(math.exp(high) / lmbda)).mean()

    forward = compiled(loss_of, options)

    def call():
        loss = forward(images)
        update(loss, parameters, optimiser)
        return loss.detach()

    return Case(f"hyperprior, {dtype}", parameters_of(model), batch, call)


def torch_codec(sizes: Sizes, options, dtype: str) -> Case:
    batch = options.codec_batch
    images = torch_images(batch, *sizes.picture)
    quality = torch.linspace(0, 1, batch, device=DEVICE)
    model = on_device(ImageCodec(sizes, dtype)).eval().requires_grad_(False)

    def reconstruct(images):
        return model.decode(model.encode(images, quality).round(), quality)

    forward = compiled(reconstruct, options)
    parameters = parameters_of(model.analysis, model.synthesis, model.gains)
    return Case(f"codec, {dtype}", parameters, batch, lambda: forward(images))


def torch_classifier(sizes: Sizes, options) -> Case:
    images = torch_images(options.resnet_batch, sizes.canvas, sizes.canvas)
    trunk = nn.Sequential(head(sizes.width), tail(sizes.width))
    model = on_device(nn.Sequential(trunk, nn.Linear(32 * sizes.width, CLASSES)))
    model.eval().requires_grad_(False)
    first = (sizes.canvas - sizes.view) // 2
    seen = slice(first, first + sizes.view)

    def logits(images):
        with half():
            features = model[0](normalise(images[:, :, seen, seen]))
        return model[1](features.float().mean((2, 3)))

    forward = compiled(logits, options)
    parameters = parameters_of(model)
    return Case("resnet-50, bfloat16", parameters, options.resnet_batch, lambda: forward(images))


def wait_for_torch(_) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- both


def child(library: str, part: str, sizes: Sizes, options) -> None:
    """Measures the cases of a part and prints each, as soon as it is done, as a line of JSON."""
    if library == "icm_jax":
        import jax

        cases, wait, about = ours, jax.block_until_ready, device_of_jax()
    else:
        cases, wait, about = pytorch, wait_for_torch, {"compiled": compiles(options)}
    for case in cases(part, sizes, options):
        began = time.perf_counter()
        wait(case.call())
        first = time.perf_counter() - began
        for _ in range(options.warmup):
            result = case.call()
        wait(result)
        times = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            for _ in range(options.steps):
                result = case.call()
            wait(result)
            times.append((time.perf_counter() - began) / options.steps)
        record = about | {
            "case": case.name,
            "parameters": case.parameters,
            "value": float(result.mean()),  # the loss, or the mean of what was predicted
            "first_call_seconds": first,
            "step_seconds": float(np.median(times)),
            "images_per_second": case.images / float(np.median(times)),
            "batch": case.images,
            "flops": case.flops,
        }
        if options.profile and library == "icm_jax" and part != "evaluation":
            record["profile"] = profile(case.call, wait)
        print(json.dumps(record), flush=True)


def records_of(library: str, part: str, options) -> list[dict]:
    """Runs a child; what it measured, though it may have failed later, which is then printed."""
    python = options.torch_python if library == "pytorch" else sys.executable
    command = [python, __file__, *sys.argv[1:], "--child", library, part]
    try:
        done = subprocess.run(command, capture_output=True, timeout=options.timeout)
        output, errors, problem = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, errors, problem = late.stdout, late.stderr, f"stopped after {late.timeout:.0f} s"
    if problem:
        last = "\n".join((errors or b"").decode(errors="replace").splitlines()[-8:])
        print(f"{NAMES[library]}, {part}: failed ({problem})\n{last}", flush=True)
    lines = (output or b"").decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"') and line.endswith("}")]


def describe(found: dict[str, dict]) -> str:
    """Lines on one case, from {library: record}."""
    flops, peak = (found.get("icm_jax", {}).get(name) for name in ("flops", "peak"))
    lines = []
    for library, own in found.items():
        name = NAMES[library] + ("" if own.get("compiled", True) else ", eager")
        line = f"  {name:15} {own['images_per_second']:10,.1f} images/s"
        line += f" {1e3 * own['step_seconds']:9,.1f} ms"
        if flops:
            achieved = flops * own["images_per_second"]
            line += f" {achieved / 1e12:7.2f} TFLOP/s"
            line += f" {achieved / peak:6.1%} of the peak" if peak else ""
        line += f"; batch {own['batch']}, {own['parameters']:,} parameters,"
        line += f" value {own['value']:.5g}, first call {own['first_call_seconds']:.1f} s"
        lines.append(line)
    if len(found) == 2:
        mine, theirs = (found[library]["images_per_second"] for library in NAMES)
        counts = {own["parameters"] for own in found.values()}
        same = "the same number" if len(counts) == 1 else "DIFFERENT NUMBERS"
        lines.append(f"  ours / PyTorch  {mine / theirs:10.3f}; {same} of parameters")
    return "\n".join(lines)


def describe_profile(record: dict) -> str:
    """A table of the operations that take most, and how busy the device is."""
    rows = record["profile"]
    if not rows:
        return "  profile: no events of a GPU in the trace"
    busy = sum(row["seconds"] for row in rows) / record["step_seconds"]
    lines = [f"  kernels take {busy:.0%} of the measured step; of their time:"]
    lines += [f"  {'share':>6} {'calls':>6}  name; where its longest call comes from"]
    for row in rows:
        if row["share"] >= LEAST:
            share = f"{row['share']:6.1%} {row['calls']:6.0f}"
            lines.append(f"  {share}  {row['name'][:90]}; {row['longest'][-120:]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of the codec")
    parser.add_argument("--libraries", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    for name, size in BATCHES.items():
        parser.add_argument(f"--{name}-batch", type=int, default=size, metavar="IMAGES")
    parser.add_argument("--warmup", type=int, default=3, help="steps after the first")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each process")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="what our training steps consist of")
    parser.add_argument("--tiny", action="store_true", help="small networks, batches of 4")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--json", type=pathlib.Path, help="file for all numbers")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        vars(options).update({f"{name}_batch": 4 for name in BATCHES})
    if options.child:
        child(*options.child, TINY if options.tiny else Sizes(), options)
        return
    kept: dict[str, dict[str, dict]] = {}
    for part in options.parts:
        found: dict[str, dict[str, dict]] = {}
        for library in options.libraries:
            for record in records_of(library, part, options):
                found.setdefault(record["case"], {})[library] = record
        for case, own in found.items():
            device = own.get("icm_jax", {}).get("device")
            print(f"{case}" + (f" on {device}" if device else ""))
            print(describe(own), flush=True)
            if "profile" in own.get("icm_jax", {}):
                print(describe_profile(own["icm_jax"]), flush=True)
        kept |= found
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1))
    if any("flops" in own.get("icm_jax", {}) for own in kept.values()):
        print("FLOPs: counted on our forward pass, for both libraries; the peak is bfloat16's")


if __name__ == "__main__":
    main()
