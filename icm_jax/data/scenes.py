"""`scenes`: the embedded data set, a TFDS builder that draws its images itself.

Twelve classes, four shapes times three fine textures, lie on backgrounds with the power spectrum of
natural images (1/f^a, correlated colours), among distractors, occluders, shading and noise. Objects
and backgrounds have muted colours: instances are then told apart by what they show rather than by
their palette, and contrastive features learn the classes.
The shape survives strong compression, the texture (a period of 6 to 10 pixels) does not: accuracy
falls step by step as bits are taken away. The label is the class of the largest object.

Generation is a function of (configuration, split, index) alone, takes no download and writes
array_record files, read back by `tfds.data_source`; TensorFlow is not needed. The files' folder is
named after the configuration and a checksum of what is drawn, so images of an earlier way of
drawing are never taken for these.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import math
import os
import sys
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

from icm_jax.data import fields
from icm_jax.errors import IcmError

SHAPES = ("disc", "square", "triangle", "star")
TEXTURES = ("stripes", "checks", "rings")
CLASSES = tuple(f"{texture}_{shape}" for shape in SHAPES for texture in TEXTURES)
SPLITS = ("train", "validation")


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """Sizes of one version of `scenes`: side in pixels, images per split, seed, JPEG quality."""

    size: int = 96
    train: int = 5000
    validation: int = 800
    seed: int = 0
    quality: int = 95


class Scenes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; its features are image, label, objects (bbox, label) and mask."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: ScenesConfig

    def _info(self):
        side = self.builder_config.size
        features = {
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "objects": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            ),
            "mask": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), description=__doc__
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        config = self.builder_config

        def example(index):
            scene = draw(config.seed, split, index, config.size)
            jpeg = simplejpeg.encode_jpeg(scene["image"], config.quality, "RGB", "420")
            png = io.BytesIO()
            Image.fromarray(scene["mask"]).save(png, "PNG")
            png.seek(0)
            objects = [
                {"bbox": tfds.features.BBox(*box), "label": int(label)}
                for box, label in zip(scene["boxes"], scene["labels"], strict=True)
            ]
            return {
                "image": io.BytesIO(jpeg),
                "label": int(scene["labels"][0]),
                "objects": objects,
                "mask": png,
            }

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            yield from enumerate(threads.map(example, range(getattr(config, split))))


def prepared(data_dir: str | os.PathLike, **sizes) -> tfds.core.DatasetBuilder:
    """A builder whose files exist: generated on first use, whole or not at all.

    Args:
      data_dir: TFDS folder.
      **sizes: fields of ScenesConfig.

    Raises: IcmError for sizes that cannot be drawn or a folder that cannot be written.
    """
    config = ScenesConfig(name="custom", **sizes)
    fields.check(dataclasses.asdict(config), fields.SCENES, "data")
    name = "px{size}_n{train}_{validation}_s{seed}_q{quality}".format(**dataclasses.asdict(config))
    drawn = zlib.crc32(draw(config.seed, "train", 0, 64)["image"].tobytes())
    config = dataclasses.replace(config, name=f"{name}_{drawn:08x}")
    # TFDS tells of it on standard output, which belongs to results.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        make = functools.partial(
            Scenes, data_dir=os.path.expanduser(data_dir), config=config, file_format="array_record"
        )
        try:
            make().download_and_prepare(file_format="array_record")
        except FileExistsError:  # another process was first: its files are the same
            pass
        except OSError as error:
            raise IcmError(
                f"cannot write scenes below {data_dir}: {error.strerror or error}; set data.path "
                "or ICM_JAX_CACHE to a folder that can be written"
            ) from error
        return make()


def draw(seed: int, split: str, index: int, size: int) -> dict[str, np.ndarray]:
    """One scene.

    Returns: {"image": uint8 [S, S, 3], "mask": uint8 [S, S] (0 background, class + 1),
      "boxes": float [k, 4] (ymin, xmin, ymax, xmax in 0...1), "labels": int [k]}, largest first.
      Objects of which others hide more than three quarters are in the picture but not listed.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    image = _background(rng, size)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(0, 3)):
        _paint(image, _distractor(rng, size), _noise(rng, size, 1.5) * 0.1 + _tone(rng, 0.3, 0.7))
    owner = np.zeros((size, size), np.uint8)  # which object shows at a pixel
    found = []
    for number, radius in enumerate(sorted(_radii(rng, size)), 1):  # the largest last, on top
        label = int(rng.integers(len(CLASSES)))
        inside, colour = _object(rng, size, radius, label)
        _paint(image, inside, colour)
        mask[inside > 0.5], owner[inside > 0.5] = label + 1, number
        rows, columns = np.nonzero(inside > 0.5)
        box = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
        found.insert(0, (number, rows.size, np.array(box) / size, label))
    for _ in range(rng.integers(0, 2)):  # thin occluders over everything
        bar = _bar(rng, size)
        _paint(image, bar, np.broadcast_to(_tone(rng, 0.2, 0.8), image.shape))
    shown = [item for item in found if (owner == item[0]).sum() >= 0.25 * item[1]]
    image *= 1 + rng.uniform(-0.35, 0.35) * _ramp(rng, size)[..., None]
    image += rng.normal(0, rng.uniform(0.0, 0.04), image.shape)
    image = np.clip(image * rng.uniform(0.75, 1.15) + rng.uniform(-0.08, 0.08), 0, 1)
    return {
        "image": np.ascontiguousarray(np.rint(image * 255).astype(np.uint8)),
        "mask": mask,
        "boxes": np.array([box for _, _, box, _ in shown], np.float32),
        "labels": np.array([label for _, _, _, label in shown]),
    }


def _radii(rng, size):
    main = rng.uniform(0.28, 0.42) * size
    return [main, *(rng.uniform(0.3, 0.5) * main for _ in range(rng.integers(0, 2)))]


def _noise(rng, size, exponent):
    """[S, S, 3] noise of spectrum 1/f^exponent, unit variance, correlated channels."""
    y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(y, x), 1 / size) ** exponent
    amplitude[0, 0] = 0
    spectrum = rng.normal(size=(3, *amplitude.shape)) + 1j * rng.normal(size=(3, *amplitude.shape))
    channels = np.fft.irfft2(spectrum * amplitude, s=(size, size))
    channels /= channels.std(axis=(1, 2), keepdims=True)
    mixing = np.full((3, 3), 0.5) + 0.5 * np.eye(3) + rng.normal(0, 0.1, (3, 3))
    mixing /= np.linalg.norm(mixing, axis=1, keepdims=True)
    return np.einsum("ij,jhw->hwi", mixing, channels)


def _background(rng, size):
    base = _tone(rng, 0.35, 0.65)
    return base + rng.uniform(0.06, 0.14) * _noise(rng, size, rng.uniform(0.9, 1.6))


def _tone(rng, low, high):
    """A muted colour: one brightness, a little colour."""
    return np.clip(rng.uniform(low, high) + rng.normal(0, 0.04, 3), 0, 1)


def _grid(size):
    return np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")


def _ramp(rng, size):
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * math.pi)
    return (np.cos(angle) * x + np.sin(angle) * y) / size - 0.5


def _turned(rng, size, centre):
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * math.pi)
    u, v = x - centre[1], y - centre[0]
    return np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u


def _distractor(rng, size):
    u, v = _turned(rng, size, rng.uniform(0, size, 2))
    a, b = rng.uniform(0.06, 0.25, 2) * size
    return _soft(1 - np.hypot(u / a, v / b), min(a, b))


def _bar(rng, size):
    u, v = _turned(rng, size, rng.uniform(0.2 * size, 0.8 * size, 2))
    return _soft(np.minimum(1 - np.abs(u) / (0.25 * size), 1 - np.abs(v) / 1.5), 1.5)


def _object(rng, size, radius, label):
    """(coverage [S, S] in 0...1, colours [S, S, 3]) of one object wholly inside the image."""
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    u, v = _turned(rng, size, rng.uniform(radius, size - radius, 2))
    u, v = u / radius, v / radius
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    edge = {
        "disc": 0.9 - r,
        "square": 0.7 - np.maximum(np.abs(u), np.abs(v)),
        "triangle": 0.48
        - np.max(
            [np.cos(t) * u + np.sin(t) * v for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)], axis=0
        ),
        "star": 0.66 + 0.3 * np.cos(5 * angle) - r,
    }[shape]
    turn = 2 * math.pi * radius / rng.uniform(6, 10)
    phase = rng.uniform(0, 2 * math.pi, 2)
    wave = {
        "stripes": np.sin(turn * u + phase[0]),
        "checks": np.sin(turn * u + phase[0]) * np.sin(turn * v + phase[1]) * 1.4,
        "rings": np.sin(turn * r + phase[0]),
    }[texture]
    dark, light = _tone(rng, 0.0, 0.3), _tone(rng, 0.7, 1.0)
    contrast = rng.uniform(0.6, 1.0)
    blend = 0.5 + 0.5 * contrast * np.clip(2 * wave, -1, 1)[..., None]
    return _soft(edge, radius), dark + (light - dark) * blend


def _soft(distance, scale):
    """Coverage of a pixel by a region, from the signed distance to its border in units of scale."""
    return np.clip(distance * scale + 0.5, 0, 1)


def _paint(image, coverage, colour):
    image += coverage[..., None] * (colour - image)
