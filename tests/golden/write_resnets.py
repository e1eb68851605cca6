"""Writes resnets.npz: what torchvision computes, layer by layer, with the weights of `drawn`.

    python tests/golden/write_resnets.py   (with torch, torchvision and safetensors)

Nothing is downloaded: weights are drawn from their names by NumPy, as the test draws them again.
The file has, for every network and every module that gives an output of its own, PROBES values of
it in float32, evenly spread over the array in the order [N, H, W, C], and its mean of squares.
small.safetensors is what the format's own library writes: three types and a note.
"""

import pathlib
import zlib

import numpy as np

try:
    import torch
    import torchvision
    from safetensors.torch import save_file
except ImportError:  # the test needs `drawn`, `image` and `probes` alone
    pass

GOLDEN = pathlib.Path(__file__).parent
NETWORKS = ("resnet18", "resnet50")
PROBES = 24
CLASSES = 1000


def image() -> np.ndarray:
    """uint8 [1, 45, 70, 3]: sides that no stride divides."""
    return np.random.default_rng(7).integers(0, 256, (1, 45, 70, 3), np.uint8)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of this name, float16; statistics of BatchNorm are not those of a new network."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaf, normalised = name.rpartition(".")[2], "bn" in name or "downsample.1" in name
    if len(shape) > 1:
        values = rng.standard_normal(shape, np.float32) * (2 / np.prod(shape[1:])) ** 0.5
    elif leaf == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    elif leaf == "weight" and normalised:
        values = rng.uniform(0.2, 0.9, shape)
    else:
        values = rng.normal(0, 0.2, shape)
    return values.astype(np.float16)


def probes(x: np.ndarray) -> np.ndarray:
    """float32 [PROBES + 1] of an output [N, H, W, C] or [N, C]."""
    places = np.linspace(0, x.size - 1, PROBES).round().astype(int)
    return np.append(x.reshape(-1)[places], np.square(x, dtype=np.float64).mean()).astype("f4")


def computed(name: str) -> dict[str, np.ndarray]:
    """{module: probes of its output} of one network of torchvision."""
    network = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES).eval()
    state = network.state_dict()
    for key, value in state.items():
        if value.ndim:
            state[key] = torch.from_numpy(drawn(key, tuple(value.shape))).float()
    network.load_state_dict(state)
    found = {}

    def keep(key):
        def hook(module, inputs, output):
            x = output.numpy()
            found[f"{name}/{key}"] = probes(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)

        return hook

    for key, module in network.named_modules():
        if key in ("bn1", "maxpool", "fc") or (key.startswith("layer") and key.count(".") == 1):
            module.register_forward_hook(keep(key))
    x = torch.from_numpy(image()).permute(0, 3, 1, 2) / 255
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    x = torchvision.transforms.functional.normalize(x, weights.mean, weights.std)
    with torch.inference_mode():
        network(x)
    return found


def main():
    found = {}
    for name in NETWORKS:
        found |= computed(name)
    np.savez_compressed(GOLDEN / "resnets.npz", **found)
    some = torch.arange(-3, 3).reshape(2, 3) / 4
    small = {"half": some.half(), "brain": some.bfloat16(), "whole.float": some[:, :1].clone()}
    small |= {"count": torch.tensor(5), "nothing": torch.zeros(0, 4)}
    save_file(small, GOLDEN / "small.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
