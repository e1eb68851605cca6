"""Pictures coded for a detector: what its outputs lose is what their flaws cost.

    aim = aimed.at_detector(detector, variables, image, (416, 416), quality=20)
    bitstream.encode(icm_jax.load(), image[None], quality=20, effort=2, aim=aim)

The files are those of any picture, for any decoder of the model: the encoder alone knows the
detector. No labels are needed: the detector's outputs on the picture itself are the truth, and the
Kullback-Leibler divergence from them is the cost (`icm_jax.tasks.detection.divergence`).
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.codecs import bitstream
from icm_jax.codecs.codec import Codec
from icm_jax.codecs.layered import base_quality
from icm_jax.codecs.refine import Aim
from icm_jax.codecs.scalable import DETECTOR, LATENT, detector_of
from icm_jax.data.geometry import GREY, letterbox
from icm_jax.measure import darknet
from icm_jax.nets.detector import Detector, Part
from icm_jax.nets.yolo import build_detector
from icm_jax.tasks.detection import divergence, scaled

BITS, FINER = 1500.0, 180.0
"""What a nat is worth at quality 0, and how many times as much at 100: the model in the package
pays that many times as much for an error there."""


class Divergence(NamedTuple):
    """The cost of an `Aim`: of its detector's outputs for a picture within a grey canvas.

    Attributes:
      canvas: height and width. extent: top, left, height, width of the picture in it.
    """

    detector: Detector
    canvas: tuple[int, int]
    extent: tuple[int, int, int, int]

    def __call__(self, variables: Mapping[str, Any], image: jax.Array) -> jax.Array:
        """Bits for an image float32 [1, H, W, 3]; variables: of `at_detector`."""
        found = self.outputs(variables["detector"], image)
        return variables["price"] * divergence(variables["outputs"], found)[0]

    def outputs(self, variables, image: jax.Array):
        """What the detector makes of it, [1, h, w, A, 5 + K] each."""
        top, left, height, width = self.extent
        if image.shape[1:3] != (height, width):
            image = jax.image.resize(image, (1, height, width, 3), "linear")
        rest = self.canvas[0] - top - height, self.canvas[1] - left - width
        pads = (0, 0), (top, rest[0]), (left, rest[1]), (0, 0)
        boxed = jnp.pad(image, pads, constant_values=GREY)
        return Part(self.detector).apply(variables, scaled(boxed), train=False)


def at_detector(
    detector: Detector,
    variables: Mapping[str, Any],
    image: np.ndarray,
    canvas: tuple[int, int],
    quality: float,
    extent: tuple[int, int, int, int] | None = None,
) -> Aim:
    """The aim of a picture, uint8 [H, W, 3].

    Args:
      variables: {collection: the detector's}.
      canvas: height and width of what the detector takes, multiples of its grid.
      quality: 0 to 100; the higher, the more a nat is worth.
      extent: top, left, height, width of the picture in the canvas; None: as Darknet puts it.
    """
    if extent is None:
        _, extent = letterbox(image, canvas, "centre")
    top, left, height, width = map(int, extent)
    cost = Divergence(detector, canvas, (top, left, height, width))
    outputs = jax.device_get(_outputs(cost, variables, image[None].astype(np.float32)))
    price = np.float32(BITS * FINER ** (quality / 100))
    return Aim(cost, {"detector": variables, "outputs": outputs, "price": price})


class Tail(NamedTuple):
    """The cost of an `Aim` at a decoded feature: of what a detector's tail makes of it."""

    detector: Detector

    def __call__(self, variables: Mapping[str, Any], feature: jax.Array) -> jax.Array:
        """Bits for a feature float32 [1, h, w, F]; variables: of `at_feature`."""
        part = Part(self.detector, self.detector.split)
        found = part.apply(variables["detector"], feature, train=False)
        return variables["price"] * divergence(variables["outputs"], found)[0]


def at_feature(
    detector: Detector, variables: Mapping[str, Any], image: np.ndarray, quality: float
) -> Aim:
    """The aim of a base layer that codes the feature of a picture, uint8 [H, W, 3], whose sides
    are multiples of the codec's grid; `quality` is the base's, others as of `at_detector`."""
    sides = image.shape[0], image.shape[1]
    whole = at_detector(detector, variables, image, sides, quality, (0, 0, *sides))
    return Aim(Tail(detector), whole.variables, "feature")


def at_weights(weights: str | os.PathLike) -> Callable[..., Aim]:
    """(image uint8 [H, W, 3] or [H, W], quality or None) -> the aim at a detector of Darknet's.

    Raises: IcmError as `darknet.finder`.
    """
    detector, size, variables = darknet.published(weights)
    own = jax.device_get(variables)

    def of_image(image: np.ndarray, quality: float | None) -> Aim:
        image = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
        quality = bitstream.DEFAULT_QUALITY if quality is None else quality
        return at_detector(detector, own, image, size, quality)

    return of_image


def at_own(frozen: bitstream.FrozenCodec) -> Callable[..., Aim]:
    """As `at_weights`, at the detector that a codec in layers holds, which reads its base.

    Raises: IcmError if it holds none.
    """
    detector = detector_of(frozen.codec)
    grid, trees = math.lcm(detector.grid, LATENT), frozen.variables
    own = {name: tree[DETECTOR] for name, tree in trees.items() if DETECTOR in tree}

    def of_image(image: np.ndarray, quality: float | None) -> Aim:
        image = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
        quality = bitstream.DEFAULT_QUALITY if quality is None else quality
        quality = base_quality(frozen.codec, quality)
        return at_feature(detector, own, ops.pad_to(image[None], grid)[0], quality)

    return of_image


def of_task(
    config: ConfigDict,
    variables: Mapping[str, Any],
    image: np.ndarray,
    canvas: tuple[int, int],
    extent: tuple[int, int, int, int],
    quality: float,
) -> Aim:
    """The same for a task with fields `detector` and `classes`, and all of its variables."""
    detector = build_detector(config.detector, config.classes)
    own = {name: tree[DETECTOR] for name, tree in variables.items() if DETECTOR in tree}
    return at_detector(detector, own, image, canvas, quality, extent)


def of_streams(
    config: ConfigDict,
    variables: Mapping[str, Any],
    codec: Codec,
    images: np.ndarray,
    quality: float | None,
) -> list[Aim]:
    """The aims of a codec's own files at such a detector: of its feature, or else of its image.

    Args:
      config, variables: as of `of_task`. images: uint8 [N, H, W, 3], H and W multiples of the grid.
      quality: of the codec; None, of one rate: as 50.
    """
    quality = bitstream.DEFAULT_QUALITY if quality is None else quality
    if "feature" not in codec.outputs:
        whole = images.shape[1:3], (0, 0, *images.shape[1:3])
        return [of_task(config, variables, image, *whole, quality) for image in images]
    detector = build_detector(config.detector, config.classes)
    quality = base_quality(codec, quality)
    own = {name: tree[DETECTOR] for name, tree in variables.items() if DETECTOR in tree}
    return [at_feature(detector, own, image, quality) for image in images]


@functools.partial(jax.jit, static_argnums=0)
def _outputs(cost: Divergence, variables, image):
    return cost.outputs(variables, image)
