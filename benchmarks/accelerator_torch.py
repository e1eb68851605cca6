"""The networks, losses and optimisers of accelerator_cases.py in PyTorch, for bench_accelerator.py.

Both give the same losses of the same views, but for details that cost nothing: here bounds of GDN
and of scale indexes are plain clamps, running variances are unbiased, learning rates are constant;
initial values differ. Products that make these views may be TF32, ours are float32.
"""

import copy
import functools
import itertools
import math
import os
import shutil

import torch
from accelerator_cases import (
    ALPHA,
    CLASSES,
    DEPTHS,
    L1,
    LAMBDAS,
    LEARNING_RATES,
    LEVELS,
    MOMENTUM,
    TEMPERATURE,
    Build,
    Case,
    Sizes,
)
from torch import nn
from torch.nn import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On the device once and for all: compiled functions would copy them at every call.
MEAN = torch.tensor([0.485, 0.456, 0.406], device=DEVICE).reshape(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225], device=DEVICE).reshape(3, 1, 1)
TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], device=DEVICE
)
FROM_YIQ = torch.linalg.inv(TO_YIQ)


def pytorch(part: str, sizes: Sizes, options) -> list[Build]:
    """The cases of a part, in PyTorch; it has none of "coding" and "coefficients"."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    builds = []
    if part == "stage1":
        builds.append(functools.partial(torch_stage1, sizes, options))
    elif part == "hyperprior":
        builds += [functools.partial(torch_hyperprior, sizes, options, d) for d in options.dtypes]
    elif part == "detection":
        from accelerator_torch_detector import torch_detector

        builds.append(functools.partial(torch_detector, sizes, options))
    elif part == "evaluation":
        builds += [functools.partial(torch_codec, sizes, options, d) for d in options.dtypes]
        builds.append(functools.partial(torch_classifier, sizes, options))
    return [lambda build=build: [build()] for build in builds]


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


class Bottleneck(nn.Module):
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


class Residual(nn.Module):
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


class FactorisedPrior(nn.Module):
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


class FilteredResNet(nn.Module):
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
            y = self.encoder(f).float()
        bits = self.prior(noisy(y)) if self.training else None
        with half():
            passed = self.decoder(rounded(y)).float()
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
    """As `icm_jax.tasks.views.contrastive`: uint8 [N, 3, S, S] -> float32 [N, 3, size, size]."""
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


class GDN(nn.Module):
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


class ImageCodec(nn.Module):
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
