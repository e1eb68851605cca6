"""Writes compressai/*.npz: what CompressAI's own classes compute with the weights of `drawn`.

    python tests/golden/write_compressai.py [NAME ...]   (with compressai==1.2.8 and torch)

Nothing is downloaded. A file has the state dict, rounded to float16 ("state/KEY"), an image, and of
`forward` in test mode, float32 in the order [h, w, C]: the latents, what the hyper-synthesis says,
the likelihoods, and every third row of the picture, on 0...1.

With a context model `forward` rounds y itself, while `compress` and `decompress` round its distance
from the mean. Files of these models have y_hat and the picture of the latter two, and what
CompressAI's layers say of this y_hat: scales and means, and its likelihoods.
"""

import pathlib
import sys
import zlib

import numpy as np
import torch
from compressai.models import (
    Cheng2020Anchor,
    FactorizedPrior,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)

FOLDER = pathlib.Path(__file__).parent / "compressai"
WIDTH, CHANNELS = 8, 12
MODELS = {
    "bmshj2018-factorized": FactorizedPrior,
    "bmshj2018-hyperprior": ScaleHyperprior,
    "mbt2018-mean": MeanScaleHyperprior,
    "mbt2018": JointAutoregressiveHierarchicalPriors,
    "cheng2020-anchor": lambda width, channels: Cheng2020Anchor(width),
}
SERIAL = ("mbt2018", "cheng2020-anchor")
EVERY = 3


def image() -> np.ndarray:
    """uint8 [128, 128, 3]: octaves of noise, and an edge."""
    rng, total = np.random.default_rng(3), np.zeros((128, 128, 3))
    for side in (4, 16, 64, 128):
        noise = rng.normal(0, 100 / side**0.5, (side, side, 3))
        total += np.kron(noise, np.ones((128 // side, 128 // side, 1)))
    total[:, 70:] += 60
    return (total + 110).clip(0, 255).astype(np.uint8)


def drawn(name: str, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
    """The parameter of this name. Some of GDN's lie below their bound, and medians between whole
    numbers."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(".beta"):
        return rng.uniform(-0.2, 1.2, shape)
    if name.endswith(".gamma"):
        return rng.uniform(-0.2, 0.4, shape) + 0.2 * np.eye(shape[0])
    if "quantiles" in name:
        middle = rng.uniform(-1.5, 1.5, (shape[0], 1, 1))
        return middle + np.array([-12.0, 0.0, 12.0])
    if "matri" in name:
        return rng.normal(-0.1 if "4" in name else -1.3, 0.3, shape)
    if "factor" in name:
        return rng.normal(0, 0.5, shape)
    if len(shape) == 4:
        transposed = transposed and name.startswith(("g_s", "h_s.0", "h_s.2"))
        inputs = shape[0] / 4 if transposed else shape[1]
        return rng.normal(0, (2 / (inputs * shape[2] * shape[3])) ** 0.5, shape)
    return rng.normal(0, 0.2, shape)


def halved(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def spread(layer, outputs: torch.Tensor, wanted: np.ndarray | float, middle: np.ndarray | float):
    """Lets a layer's outputs [1, C, h, w] have these deviations and means."""
    mean, scale = outputs.mean((0, 2, 3)), outputs.std((0, 2, 3))
    ratio = torch.as_tensor(wanted).float() / scale
    transposed = isinstance(layer, torch.nn.ConvTranspose2d)
    of_kernel = ratio.reshape((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
    layer.weight.data = halved(layer.weight.data * of_kernel)
    shifted = (layer.bias.data - mean) * ratio + torch.as_tensor(middle).float()
    layer.bias.data = halved(shifted)


def made(name: str):
    """(the network, the image as it takes it)."""
    network = MODELS[name](WIDTH, CHANNELS).eval()
    for key, value in network.named_parameters():
        of_key = drawn(key, tuple(value.shape), name != "cheng2020-anchor")
        value.data = halved(torch.from_numpy(of_key))
    x = torch.from_numpy(image()).permute(2, 0, 1)[None] / 255
    channels = WIDTH if name == "cheng2020-anchor" else CHANNELS
    sizes = np.geomspace(0.08, 9.0, channels)  # of y's channels
    spread(network.g_a[6], network.g_a(x), sizes, 0.1 * sizes)
    if name == "cheng2020-anchor":  # inverse GDN about squares what is large
        for at in (1, 3, 5):
            block, given = network.g_s[at], network.g_s[:at](torch.round(network.g_a(x)))
            first = block.leaky_relu(block.subpel_conv(given))
            spread(block.conv, block.conv(first), np.full(WIDTH, 0.5), 0.0)
            spread(block.upsample[0], block.upsample[0](given), np.full(4 * WIDTH, 0.7), 0.0)
        last = network.g_s[7][0]
        spread(last, last(network.g_s[:7](torch.round(network.g_a(x)))), np.full(12, 0.2), 0.5)
    for at in (0, 2, 4, 6) if name != "cheng2020-anchor" else ():
        size, middle = (0.2, 0.5) if at == 6 else (0.3, 0.0)
        output = network.g_s[: at + 1](torch.round(network.g_a(x)))
        spread(network.g_s[at], output, torch.full((output.shape[1],), size), middle)
    if name == "bmshj2018-factorized":
        return network, x
    y = network.g_a(x).abs() if name == "bmshj2018-hyperprior" else network.g_a(x)
    spread(network.h_a[-1], network.h_a(y), np.full(WIDTH, 2.5), 0.3)
    z = torch.round(network.h_a(y))
    said = network.h_s[: 5 if name != "cheng2020-anchor" else 9](z)
    wanted, middle = 0.15 * sizes, 1.3 * sizes
    if name != "bmshj2018-hyperprior":
        wanted, middle = np.tile(wanted, 2), np.append(middle, 0.1 * sizes)
    if name not in SERIAL:
        spread(network.h_s[4], said, wanted, middle)
        return network, x
    spread(network.h_s[-1], said, np.ones(2 * channels), 0.0)
    spread(network.context_prediction, told(network, y, z)[0], np.ones(2 * channels), 0.0)
    spread(network.entropy_parameters[4], told(network, y, z)[1], wanted, middle)
    return network, x


def told(network, y: torch.Tensor, z: torch.Tensor):
    """(what the context model says of y, scales and means)."""
    context = network.context_prediction(torch.round(y))
    return context, network.entropy_parameters(torch.cat((network.h_s(z), context), dim=1))


def computed(name: str) -> dict[str, np.ndarray]:
    network, x = made(name)
    found = {}

    def keep(key):
        def hook(module, inputs, output):
            found[key] = output

        return hook

    for key in ("g_a", "h_a", "h_s"):
        if hasattr(network, key):
            getattr(network, key).register_forward_hook(keep(key))
    result = network(x)
    likelihoods = dict(result["likelihoods"])
    network.update()
    if name in SERIAL:
        network.g_s.register_forward_pre_hook(lambda module, given: found.update(y_hat=given[0]))
        result = network.decompress(**network.compress(x))
        both = torch.cat((found["h_s"], network.context_prediction(found["y_hat"])), dim=1)
        found["entropy_parameters"] = network.entropy_parameters(both)
        scales, means = found["entropy_parameters"].chunk(2, 1)
        _, likelihoods["y"] = network.gaussian_conditional(found["y_hat"], scales, means=means)
    found |= {f"likelihoods/{k}": value for k, value in likelihoods.items()}
    found["x_hat"] = result["x_hat"][:, :, ::EVERY]
    arrays = {k: v.numpy()[0].transpose(1, 2, 0) for k, v in found.items()}
    for key, value in network.state_dict().items():
        value = value.numpy()
        arrays[f"state/{key}"] = value.astype(np.float16 if value.dtype == np.float32 else "i4")
    return arrays | {"image": image()}


def main():
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MODELS:
        with torch.inference_mode():
            np.savez_compressed(FOLDER / f"{name}.npz", **computed(name))


if __name__ == "__main__":
    main()
