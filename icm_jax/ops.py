"""Parameter-free array functions: bounds, rounding, noise, colour scaling."""

import jax
import jax.numpy as jnp

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@jax.custom_vjp
def lower_bound(x: jax.Array, bound: float) -> jax.Array:
    """max(x, bound) whose gradient also passes where it would push x back up (papers.md 6.1)."""
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
    """Rounds half to even; the gradient is the identity's."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def quantise(x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """x + U(-1/2, 1/2) with a key (training), rounding without one."""
    if key is not None:
        return x + jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5)
    return round_straight_through(x)


def normalise(image: jax.Array, dtype=jnp.float32) -> jax.Array:
    """uint8 or float RGB on 0...255 [..., 3] to zero mean and unit variance per channel."""
    mean, std = (
        jnp.asarray(v, jnp.float32).reshape((1,) * (image.ndim - 1) + (3,)) for v in (MEAN, STD)
    )
    return ((image.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)


def crop_to(x: jax.Array, height: int, width: int) -> jax.Array:
    """The top-left [N, height, width, C] of x."""
    return x[:, :height, :width]
