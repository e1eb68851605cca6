"""Parameter-free array functions: bounds, rounding, noise, colour, layout, places on devices."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Array = TypeVar("Array", np.ndarray, jax.Array)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Module(nn.Module):
    """Flax's module for type checkers, to which the results of `apply` and `init` are a union of
    all that there may be: with collections that change and without."""

    if TYPE_CHECKING:

        def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...
        def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]: ...


_mesh: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar(
    "mesh", default=None
)


@contextlib.contextmanager
def traced_on(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Within, functions are traced for the devices of this mesh."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def on_each_device(x: jax.Array) -> jax.Array:
    """x, gathered so that each device holds all of it; x itself where no mesh is `traced_on`."""
    mesh = _mesh.get()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())) if mesh else x


_window: contextvars.ContextVar[tuple[tuple[int, int], jax.Array] | None] = contextvars.ContextVar(
    "window", default=None
)


@contextlib.contextmanager
def within(size: tuple[int, int], bounds: jax.Array) -> Iterator[None]:
    """Within, what is traced sees a window of an image, beyond whose border `inside` has zeros.

    Args:
      size: height and width of the window, in elements of what is cut.
      bounds: int32 [N, 4], rows from, to and columns from, to (exclusive) that are of the image.
    """
    token = _window.set((size, bounds))
    try:
        yield
    finally:
        _window.reset(token)


def inside(x: jax.Array, fill: float = 0.0) -> jax.Array:
    """x [N, h, w, C], `fill` beyond the image's border where a window of it is traced `within`.

    Convolutions call it on what they take: they find the zeros there that padding would give them
    on the whole image. Of what has 2^k times fewer rows, the part of the image is rounded up.
    """
    bounds = _bounds_of(x)
    return x if bounds is None else clear_outside(x, bounds, fill)


def _bounds_of(x: jax.Array) -> jax.Array | None:
    """What of x [N, h, w, C] is of the image, int32 [N, 4], where a window is traced `within`."""
    found = _window.get()
    if found is None:
        return None
    size, bounds = found
    ends = []
    for axis in (0, 1):
        begin, end = bounds[:, 2 * axis], bounds[:, 2 * axis + 1]
        rows, whole = x.shape[1 + axis], size[axis]
        up, down = max(rows // whole, 1), max(whole // rows, 1)
        ends += [begin // down * up, -(-end // down) * up]
    return jnp.stack(ends, axis=1)


@contextlib.contextmanager
def ending_with(x: jax.Array) -> Iterator[None]:
    """Within, an image of which a window is traced ends where the last element of x [N, h, w, C]
    does: what is made of x, finer and not yet cropped, then sees what it sees of a whole image."""
    bounds = _bounds_of(x)
    if bounds is None:
        yield
        return
    with within((x.shape[1], x.shape[2]), bounds):
        yield


def mirrored(x: jax.Array, before: int, after: int) -> jax.Array:
    """x [N, h, w, C] with so many rows and columns more in front and behind, mirrored at its edges;
    of a window that is traced `within`, at the image's border."""
    bounds = _bounds_of(x)
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), mode="reflect")
    if bounds is None:
        return x
    for axis in (1, 2):
        end = bounds[:, 2 * axis - 1]
        places = jnp.full_like(end, -before), end
        for first, count in zip(places, (before, after), strict=True):
            x = _mirrored_at(x, axis, first, count, end, before)
    return x


def _mirrored_at(x, axis: int, first, count: int, end, before: int):
    """x with rows (axis 1) or columns (axis 2) from `first` on mirrored, of an image that ends at
    `end`, both int32 [N]; `before` rows stand in front of its own."""
    if not count:
        return x
    place = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    period = jnp.maximum(2 * (end[:, None] - 1), 1)
    source = jnp.minimum(place % period, period - place % period) + before
    across = [-1 if at == axis else 1 for at in (1, 2)]
    strips = jnp.take_along_axis(x, source.reshape(len(x), *across, 1), axis=axis)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
    if len(x) == 1:  # in place, on CPUs
        return put(x[0], strips[0], first[0] + before)[None]
    return jax.vmap(put)(x, strips, first + before)


def reduced(x: jax.Array, height: int, width: int) -> jax.Array:
    """x [N, H, W, C] by bicubic interpolation to [N, height, width, C], whole factors; of a window
    that is traced `within`, without what lies beyond the image's border."""

    def resized(x):
        return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "cubic")

    if _window.get() is None:
        return resized(x)
    share = resized(inside(jnp.ones((*x.shape[:3], 1), x.dtype)))
    return resized(inside(x)) / jnp.where(share > 0.5, share, 1.0)


def clear_outside(x: jax.Array, bounds: jax.Array, fill: float = 0.0) -> jax.Array:
    """x [N, h, w, C] with `fill` but in rows and columns of `bounds`, int32 [N, 4] as in `within`.

    >>> clear_outside(jnp.ones((1, 1, 4, 1)), jnp.array([[0, 1, 1, 3]])).ravel().tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    row = jnp.arange(x.shape[1], dtype=jnp.int32).reshape(1, -1, 1, 1)
    column = jnp.arange(x.shape[2], dtype=jnp.int32).reshape(1, 1, -1, 1)
    top, bottom, left, right = (bounds[:, n].reshape(-1, 1, 1, 1) for n in range(4))
    kept = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return jnp.where(kept, x, jnp.asarray(fill, x.dtype))


@jax.custom_vjp
def lower_bound(x: jax.Array, bound: float) -> jax.Array:
    """max(x, bound) whose gradient also passes where it pushes x back up (docs/papers.md 6.1)."""
    return jnp.maximum(x, jnp.asarray(bound, x.dtype))


def _lower_forward(x, bound):
    return lower_bound(x, bound), x >= jnp.asarray(bound, x.dtype)


def _lower_backward(inside, gradient):
    return jnp.where(inside | (gradient < 0), gradient, jnp.zeros_like(gradient)), None


lower_bound.defvjp(_lower_forward, _lower_backward)


def upper_bound(x: jax.Array, bound: float) -> jax.Array:
    """min(x, bound) whose gradient also passes where it would push x back down."""
    return -lower_bound(-x, -bound)


def round_straight_through(x: jax.Array) -> jax.Array:
    """Rounds half to even; the gradient is the identity's.

    >>> round_straight_through(jnp.array([0.5, 1.5, -0.6])).tolist()
    [0.0, 2.0, -1.0]
    """
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def quantise(
    x: jax.Array,
    mean: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    temperature: jax.Array | None = None,
) -> jax.Array:
    """x + U(-1/2, 1/2) with a key (training); without one, rounded, seen from `mean`; with a key
    and a temperature `rounded_by_chance`, so seen."""
    if key is not None and temperature is None:
        return x + jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5)
    seen = x if mean is None else x - mean
    if key is None or temperature is None:
        seen = round_straight_through(seen)
    else:
        seen = rounded_by_chance(seen, key, temperature)
    return seen if mean is None else seen + mean


def rounded_by_chance(x: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """Up or down by a relaxed choice, near the nearer integer the likelier: float like x.

    Stochastic Gumbel annealing (Yang, Bamler and Mandt 2020, "Improving inference for neural image
    compression", section 3.1): the logits of the two are -atanh(distance) / temperature, and so is
    the choice relaxed. At a temperature of 0 it is rounding.
    """
    low = jnp.floor(x)
    up = jnp.clip(x - low, 1e-4, 1 - 1e-4)
    logit = (jnp.arctanh(up) - jnp.arctanh(1 - up)) / temperature
    chance = jax.random.logistic(key, x.shape, x.dtype)
    return low + jax.nn.sigmoid((logit + chance) / temperature)


def normalise(image: jax.Array, dtype=jnp.float32) -> jax.Array:
    """uint8 or float RGB on 0...255 [..., 3] to zero mean and unit variance per channel."""
    mean, std = (
        jnp.asarray(v, jnp.float32).reshape((1,) * (image.ndim - 1) + (3,)) for v in (MEAN, STD)
    )
    return ((image.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)


def ycbcr(image: jax.Array) -> jax.Array:
    """RGB on 0...255 -> (Y - 128, Cb, Cr), all about zero (JFIF 1.02): float [N, H, W, 3], same."""
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    planes = jnp.matmul(image, jnp.asarray(matrix, image.dtype).T, precision="highest")
    return planes - jnp.asarray([128.0, 0.0, 0.0], image.dtype).reshape(1, 1, 1, 3)


def ycbcr_420(image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """RGB, float [N, H, W, 3], even sides -> Y - 128 [N, H, W], Cb and Cr [N, H/2, W/2].

    Chroma is the mean of 2×2 pixels, as in JPEG files with 4:2:0 sampling.
    """
    planes = ycbcr(image)
    n, h, w, _ = image.shape
    small = planes[..., 1:].reshape(n, h // 2, 2, w // 2, 2, 2).mean(axis=(2, 4))
    return planes[..., 0], small[..., 0], small[..., 1]


def halved(size: int, times: int) -> int:
    """`size` after `times` halvings, each rounded up.

    >>> halved(17, 2)
    5
    """
    return -(-size // 2**times)


def crop_to(x: jax.Array, height: int, width: int) -> jax.Array:
    """The top-left [N, height, width, C] of x."""
    return x[:, :height, :width]


def pad_to(image: Array, factor: int) -> Array:
    """[N, H, W, C] with its last row and column repeated up to multiples of `factor`.

    >>> pad_to(np.array([[1, 2, 3], [4, 5, 6]]).reshape(1, 2, 3, 1), 2)[0, ..., 0]
    array([[1, 2, 3, 3],
           [4, 5, 6, 6]])
    """
    pads = [(0, -side % factor) for side in image.shape[1:3]]
    if isinstance(image, np.ndarray):
        return np.pad(image, ((0, 0), *pads, (0, 0)), mode="edge")
    return jnp.pad(image, ((0, 0), *pads, (0, 0)), mode="edge")


def depth_to_space(x: jax.Array, side: int = 2) -> jax.Array:
    """[N, h, w, side²·F] -> [N, side·h, side·w, F]; channels are (row, column, feature).

    >>> depth_to_space(jnp.arange(4).reshape(1, 1, 1, 4))[0, ..., 0].tolist()
    [[0, 1], [2, 3]]
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, side, side, c // side**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, side * h, side * w, c // side**2)


def space_to_depth(x: jax.Array, side: int = 2) -> jax.Array:
    """What `depth_to_space` takes back: [N, H, W, F] -> [N, H/side, W/side, side²·F].

    >>> space_to_depth(jnp.arange(8).reshape(1, 2, 4, 1))[0, 0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // side, w // side, side**2 * c)


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_CONSTANTS = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""C1 and C2 of Wang et al. 2004, for values on 0...255."""
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multi-scale SSIM (Wang et al. 2003) as a loss sees it: float32 [N, H, W, C] twice -> [N].

    The same definition as `icm_jax.measure.metrics.ms_ssim`, on 0...255; sides at least 176.
    Negative means of a scale are kept above zero, so that the gradient stays finite.
    """
    c1, c2 = SSIM_CONSTANTS

    def band(length):
        """[length - 10, length]: the Gaussian window at every place where it fits."""
        rows = jnp.arange(length - SSIM_WINDOW + 1, dtype=jnp.float32)[:, None]
        distance = jnp.arange(length, dtype=jnp.float32)[None, :] - rows - SSIM_WINDOW // 2
        inside = jnp.abs(distance) <= SSIM_WINDOW // 2
        weights = jnp.where(inside, jnp.exp(-0.5 * jnp.square(distance / SSIM_SIGMA)), 0.0)
        return weights / weights.sum(axis=1, keepdims=True)

    def blurred(image):
        down, across = band(image.shape[1]), band(image.shape[2])
        return jnp.einsum("ph,nhwc,qw->npqc", down, image, across, precision="highest")

    def downsampled(image):
        n, h, w, c = image.shape
        even = image[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
        return even.mean(axis=(2, 4))

    product = jnp.ones((x.shape[0], x.shape[3]))
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        mean_x, mean_y = blurred(x), blurred(y)
        variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
        value = (2 * (blurred(x * y) - mean_x * mean_y) + c2) / (variances + c2)
        if scale == len(MS_SSIM_WEIGHTS) - 1:
            value = value * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        product = product * jnp.maximum(value.mean(axis=(1, 2)), 1e-4) ** weight
        x, y = downsampled(x), downsampled(y)
    return product.mean(axis=-1)
