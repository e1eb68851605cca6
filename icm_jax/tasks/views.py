"""Random views of a batch of images, on the device, inside the jitted step.

Every example has its own key, folded in from its row in the global batch, so that views do not
depend on how the batch is sharded. Cropping, resizing and blurring are products with small banded
matrices: that is fast on every backend and needs no gather.

A view's `size` is one number of pixels or (height, width), as in configs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.data.geometry import sides
from icm_jax.errors import IcmError

# MoCo v2's augmentation (Chen et al. 2020): crop 0.2 to 1 of the area, jitter (0.4, 0.4, 0.4, 0.1)
# with probability 0.8, greyscale 0.2, blur 0.5 with sigma 0.1 to 2 in a view of 224, flip 0.5.
CROP_SCALE = (0.2, 1.0)
JITTER = (0.4, 0.4, 0.4, 0.1)
JITTER_P, GREY_P, BLUR_P, FLIP_P = 0.8, 0.2, 0.5, 0.5
BLUR_SIGMA, BLUR_SIZE = (0.1, 2.0), 224
SEEN = 1 / 3  # of a box, or it is none in a view
LUMA = (0.299, 0.587, 0.114)

Size = int | tuple[int, int]


def contrastive(images: jax.Array, size: Size, *, key: jax.Array) -> jax.Array:
    """MoCo v2's views: uint8 [N, H, W, 3] -> float32 [N, *size, 3] on 0...255."""
    size = sides(size)

    def one(image, key):
        keys = jax.random.split(key, 4)
        window = _random_window(keys[0], image.shape[:2], CROP_SCALE, size)
        view = _resample(image.astype(jnp.float32) / 255.0, window, size)
        view = _jitter(view, keys[1])
        grey = jnp.broadcast_to(_luma(view), view.shape)
        view = jnp.where(jax.random.bernoulli(keys[2], GREY_P), grey, view)
        return 255.0 * _blur(view, keys[3])

    return jax.vmap(one)(images, _row_keys(key, len(images)))


def mild(
    images: jax.Array,
    size: Size,
    masks: jax.Array | None = None,
    *,
    crop: tuple[float, float] = (0.5, 1.0),
    key: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Random resized crop and flip, the same for image and mask (nearest for masks).

    Args:
      images: uint8 [N, H, W, 3]. masks: uint8 [N, H, W] or None. crop: least and largest
        share of the area that a view shows; (1, 1) with a view of the canvas' size only flips.
    Returns: float32 [N, *size, 3] on 0...255 and uint8 [N, *size] or None.
    """
    size = sides(size)

    def one(image, mask, key):
        window = _random_window(key, image.shape[:2], crop, size)
        view = _resample(image.astype(jnp.float32), window, size)
        return view, None if mask is None else _nearest(mask, window, size)

    axes = (0, None if masks is None else 0, 0)
    return jax.vmap(one, axes)(images, masks, _row_keys(key, len(images)))


def coefficients(
    luma: jax.Array, chroma: jax.Array, size: Size, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Crop and flip of DCT coefficients: exactly those of the image so cropped and mirrored.

    Args:
      luma: [N, h, w, 64]. chroma: [N, h/2, w/2, 128]. size: in multiples of 16, as the corners of
        the views are. key: None for the centre, not mirrored.
    Returns: [N, height/8, width/8, 64] and [N, height/16, width/16, 128], same dtypes.
    """
    size = sides(size)
    down, across = size[0] // 16, size[1] // 16
    room = [chroma.shape[1] - down, chroma.shape[2] - across]
    if size[0] % 16 or size[1] % 16 or min(room) < 0:
        raise IcmError(
            f"no view of {_text(size)} pixels in {chroma.shape[1]} × {chroma.shape[2]} × 16"
        )
    signs = jnp.asarray([(-1) ** (i % 8) for i in range(64)], luma.dtype).reshape(1, 1, -1)

    def cut(luma, chroma, top, left):
        luma = jax.lax.dynamic_slice(luma, (2 * top, 2 * left, 0), (2 * down, 2 * across, 64))
        return luma, jax.lax.dynamic_slice(chroma, (top, left, 0), (down, across, 128))

    def one(luma, chroma, key):
        corner, flip = _aligned_window(key, room)
        luma, chroma = cut(luma, chroma, *corner)
        mirrored = luma[:, ::-1] * signs, chroma[:, ::-1] * jnp.tile(signs, 2)
        return jnp.where(flip, mirrored[0], luma), jnp.where(flip, mirrored[1], chroma)

    if key is None:
        return jax.vmap(lambda y, c: cut(y, c, room[0] // 2, room[1] // 2))(luma, chroma)
    return jax.vmap(one)(luma, chroma, _row_keys(key, len(luma)))


def aligned(images: jax.Array, size: Size, *, key: jax.Array | None = None) -> jax.Array:
    """The views of `coefficients`, of pixels: same key, same crops and flips.

    Args:
      images: [N, H, W, 3], sides multiples of 16. size, key: as of `coefficients`.
    Returns: [N, *size, 3], same dtype.
    """
    size = sides(size)
    room = [(images.shape[1] - size[0]) // 16, (images.shape[2] - size[1]) // 16]
    if size[0] % 16 or size[1] % 16 or min(room) < 0:
        raise IcmError(f"no view of {_text(size)} pixels in {images.shape[1]} × {images.shape[2]}")

    def one(image, key):
        (top, left), flip = _aligned_window(key, room)
        view = jax.lax.dynamic_slice(image, (16 * top, 16 * left, 0), (*size, 3))
        return jnp.where(flip, view[:, ::-1], view)

    if key is None:
        top, left = (16 * (free // 2) for free in room)
        return images[:, top : top + size[0], left : left + size[1]]
    return jax.vmap(one)(images, _row_keys(key, len(images)))


def _aligned_window(key, room):
    """(top, left) in MCUs, and whether to mirror."""
    keys = jax.random.split(key, 3)
    corner = [jax.random.randint(k, (), 0, r + 1) for k, r in zip(keys[:2], room, strict=True)]
    return corner, jax.random.bernoulli(keys[2], FLIP_P)


def boxed(
    images: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    masks: jax.Array | None = None,
    *,
    crop: tuple[float, float],
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Random resized crop, flip and colour jitter of images with boxes, and masks of their objects.

    Args:
      images: uint8 [N, H, W, 3]. boxes: float32 [N, B, 4] (ymin, xmin, ymax, xmax) as fractions;
        valid: bool [N, B]. masks: bool [N, B, h, w] at every H/h pixels, or None. crop: least and
        largest share of the area that a view shows.
    Returns: float32 [N, H, W, 3] on 0...255; the boxes as fractions of the view, cut at its sides;
      which are valid: at least a third of them must be seen (`SEEN`); and the masks in the view.
    """
    pixels = jnp.array(images.shape[1:3], jnp.float32)
    step = 1.0 if masks is None else images.shape[1] / masks.shape[2]

    def one(image, corners, masks, key):
        keys = jax.random.split(key)
        window = _random_window(keys[0], image.shape[:2], crop, image.shape[:2])
        top, left, height, width, flip = window
        view = _resample(image.astype(jnp.float32) / 255.0, window, image.shape[:2])
        view = 255.0 * _jitter(view, keys[1])
        start, extent = jnp.tile(jnp.stack([top, left]), 2), jnp.tile(jnp.stack([height, width]), 2)
        placed = (corners * jnp.tile(pixels, 2)[None] - start[None]) / extent[None]
        mirrored = jnp.stack(
            [placed[:, 0], 1.0 - placed[:, 3], placed[:, 2], 1.0 - placed[:, 1]], axis=1
        )
        placed = jnp.where(flip, mirrored, placed)
        whole = jnp.prod(placed[:, 2:] - placed[:, :2], axis=1)
        placed = jnp.clip(placed, 0.0, 1.0)
        seen = jnp.prod(placed[:, 2:] - placed[:, :2], axis=1) >= SEEN * whole
        if masks is not None:
            coarse = (*(side / step for side in window[:4]), flip)
            masks = jax.vmap(lambda mask: _nearest(mask, coarse, mask.shape))(masks)
        return view, placed, seen, masks

    axes = (0, 0, None if masks is None else 0, 0)
    keys = _row_keys(key, len(images))
    found, placed, seen, masks = jax.vmap(one, axes)(images, boxes, masks, keys)
    return found, placed, valid & seen, masks


def cut(images: jax.Array, size: Size, *, key: jax.Array) -> jax.Array:
    """Random windows, flipped or not, of the pixels as they are: [N, *size, 3] like `images`.

    Raises: IcmError if the canvas is smaller than `size`.
    """
    size = sides(size)
    room = [images.shape[1] - size[0], images.shape[2] - size[1]]
    if min(room) < 0:
        raise IcmError(_too_small(images, size))

    def one(image, key):
        keys = jax.random.split(key, 3)
        top, left = (jax.random.randint(k, (), 0, r + 1) for k, r in zip(keys, room, strict=False))
        view = jax.lax.dynamic_slice(image, (top, left, 0), (*size, image.shape[-1]))
        return jnp.where(jax.random.bernoulli(keys[2], FLIP_P), view[:, ::-1], view)

    return jax.vmap(one)(images, _row_keys(key, len(images)))


def centre(images: ops.Array, size: Size) -> ops.Array:
    """The central [N, *size, ...] of images or masks [N, H, W, ...].

    Raises: IcmError if the canvas is smaller than `size`.
    """
    size = sides(size)
    room = [images.shape[1] - size[0], images.shape[2] - size[1]]
    if min(room) < 0:
        raise IcmError(_too_small(images, size))
    top, left = room[0] // 2, room[1] // 2
    return images[:, top : top + size[0], left : left + size[1]]


def _text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]} × {size[1]}"


def _too_small(images, size: tuple[int, int]) -> str:
    return (
        f"a canvas of {images.shape[1]} × {images.shape[2]} pixels holds no view of {_text(size)}; "
        "set data.canvas to at least model.size"
    )


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _random_window(key, shape, scale, size=(1, 1)):
    """(top, left, height, width, flip?): area share and 3/4 to 4/3 of the aspect of a view of this
    size, as Inception crops."""
    keys = jax.random.split(key, 5)
    height, width = (jnp.float32(side) for side in shape)
    area = height * width * jax.random.uniform(keys[0], minval=scale[0], maxval=scale[1])
    bound = math.log(4 / 3)
    aspect = jnp.exp(jax.random.uniform(keys[1], minval=-bound, maxval=bound)) * (size[1] / size[0])
    aspect = jnp.clip(aspect, area / jnp.square(height), jnp.square(width) / area)  # stays inside
    crop_width, crop_height = jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)
    top = jax.random.uniform(keys[2]) * (height - crop_height)
    left = jax.random.uniform(keys[3]) * (width - crop_width)
    return top, left, crop_height, crop_width, jax.random.bernoulli(keys[4], FLIP_P)


def _weights(start, extent, flip, size, length):
    """[size, length]: antialiased bilinear weights of `size` samples of a window."""
    step = extent / size
    place = start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * step - 0.5
    place = jnp.where(flip, place[::-1], place)
    distance = jnp.abs(jnp.arange(length, dtype=jnp.float32)[None, :] - place[:, None])
    weights = jnp.maximum(0.0, 1.0 - distance / jnp.maximum(step, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _resample(image, window, size):
    top, left, height, width, flip = window
    rows = _weights(top, height, False, size[0], image.shape[0])
    columns = _weights(left, width, flip, size[1], image.shape[1])
    return _separable(image, rows, columns)


def _separable(image, rows, columns):
    return jnp.einsum("ph,hwc,qw->pqc", rows, image, columns, precision="high")


def _nearest(mask, window, size):
    top, left, height, width, flip = window
    down, across = (jnp.arange(side, dtype=jnp.float32) + 0.5 for side in size)
    rows = jnp.clip((top + down * height / size[0]).astype(jnp.int32), 0, mask.shape[0] - 1)
    columns = jnp.clip((left + across * width / size[1]).astype(jnp.int32), 0, mask.shape[1] - 1)
    columns = jnp.where(flip, columns[::-1], columns)
    return mask[rows[:, None], columns[None, :]]


def _luma(image):
    red, green, blue = (image[..., i : i + 1] * weight for i, weight in enumerate(LUMA))
    return red + green + blue


def _jitter(image, key):
    """Brightness, contrast, saturation, hue, in this order; hue as a rotation in YIQ."""
    keys = jax.random.split(key, 5)
    brightness, contrast, saturation = (
        jax.random.uniform(k, minval=1 - strength, maxval=1 + strength)
        for k, strength in zip(keys[:3], JITTER[:3], strict=True)
    )
    view = jnp.clip(image * brightness, 0.0, 1.0)
    view = jnp.clip(contrast * view + (1 - contrast) * _luma(view).mean(), 0.0, 1.0)
    view = jnp.clip(saturation * view + (1 - saturation) * _luma(view), 0.0, 1.0)
    angle = 2 * math.pi * jax.random.uniform(keys[3], minval=-JITTER[3], maxval=JITTER[3])
    view = jnp.clip(_rotate_hue(view, angle), 0.0, 1.0)
    return jnp.where(jax.random.bernoulli(keys[4], JITTER_P), view, image)


def _rotate_hue(image, angle):
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    # What stays (Y), and what cos and sin multiply; as products of channels, which are fused.
    parts = (
        np.diag([1.0, 0, 0]),
        np.diag([0, 1.0, 1]),
        np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
    )
    stays, cosine, sine = (
        jnp.asarray(np.linalg.inv(to_yiq) @ part @ to_yiq, jnp.float32) for part in parts
    )
    turn = stays + jnp.cos(angle) * cosine + jnp.sin(angle) * sine
    return sum(image[..., i : i + 1] * turn[:, i].reshape(1, 1, 3) for i in range(3))


def _blur(image, key):
    keys = jax.random.split(key)
    sigma = jax.random.uniform(keys[0], minval=BLUR_SIGMA[0], maxval=BLUR_SIGMA[1])
    sigma = sigma * min(image.shape[:2]) / BLUR_SIZE  # a smaller view has the finer detail
    blurred = jax.random.bernoulli(keys[1], BLUR_P)

    def kernel(side):
        places = jnp.arange(side, dtype=jnp.float32)
        distance = places[:, None] - places[None, :]
        weights = jnp.exp(-0.5 * jnp.square(distance / sigma))
        weights = weights / weights.sum(axis=1, keepdims=True)
        return jnp.where(blurred, weights, jnp.eye(side))

    return _separable(image, kernel(image.shape[0]), kernel(image.shape[1]))


def qualities(key: jax.Array, ends: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(quality, λ), float32 [count] each, of the examples of a batch: qualities at equal distances
    from a random start, modulo 1; log λ goes linearly with them between `ends`, float32 [2]."""
    quality = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    return quality, jnp.exp(ends[0] + quality * (ends[1] - ends[0]))
