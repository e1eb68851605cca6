"""Convolutions that double or halve the sides, and what goes with them, in the form that each
platform is quick at. All forms of one are equal but for rounding."""

import functools
import os

import jax
import jax.numpy as jnp

from icm_jax import ops

_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"


@functools.cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """Of programs of floating-point convolutions and their gradients, for `jax.jit`.

    On CPUs XLA leaves them to Eigen and oneDNN then, not to YNNPACK, whose gradients to kernels
    take three times as long (docs/cpu.md); it stays where XLA_FLAGS name it.
    """
    if platform != "cpu" or _YNNPACK in os.environ.get("XLA_FLAGS", ""):
        return {}
    options: dict[str, str | bool] = {_YNNPACK: ""}
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except RuntimeError:  # another XLA, which does not know the option
        return {}
    return options


def _by_platform(on_cpu, backward_on_cpu, elsewhere):
    """One convolution f(x, kernel, ...) out of equal forms of it.

    Programs for CPUs compute `on_cpu` and `backward_on_cpu`: (x, kernel, ..., gradient) -> a
    gradient to each, as what XLA is quick at forward is not what it is quick at backward; all
    others compute `elsewhere` and its gradient.
    """

    # By the platform that the program is for, which a plan's is not the one it is made on.
    def forward(*operands):
        if on_cpu is elsewhere:
            return on_cpu(*operands)
        return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)

    def backward(saved, gradient):
        forms = {"cpu": backward_on_cpu, "default": _gradient_of(elsewhere)}
        return jax.lax.platform_dependent(*saved, gradient, **forms)

    convolution = jax.custom_vjp(forward)
    convolution.defvjp(lambda *operands: (forward(*operands), operands), backward)
    return convolution


def _gradient_of(form):
    def gradients(*operands_and_gradient):
        *operands, gradient = operands_and_gradient
        return jax.vjp(form, *operands)[1](gradient)

    return gradients


def _matrix_product(x, kernel):
    return jax.lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


def _pointwise_as_it_is(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_pointwise = _by_platform(_pointwise_as_it_is, _gradient_of(_matrix_product), _pointwise_as_it_is)


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1×1 convolution: [N, H, W, C], [1, 1, C, F] -> [N, H, W, F]."""
    return _pointwise(x, kernel)


def _even(x):
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))


def _down_by_blocks(x, kernel):
    """`down_by_two` as a convolution with stride 1 of 2×2 blocks of pixels."""
    x, (size, _, c, features) = _even(x), kernel.shape
    if size == 1:
        return _matrix_product(x[:, ::2, ::2], kernel)
    n, h, w = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
    x = x.reshape(n, h, 2, w, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, 4 * c)
    left = size // 2  # output o reads inputs 2o - left ... 2o - left + size - 1
    lead = left % 2  # zeros in front make the window start on an even input
    blocks = (size + lead + 1) // 2
    kernel = jnp.pad(kernel, ((lead, 2 * blocks - size - lead),) * 2 + ((0, 0), (0, 0)))
    kernel = kernel.reshape(blocks, 2, blocks, 2, c, features).transpose(0, 2, 1, 3, 4, 5)
    before = (left + lead) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.reshape(blocks, blocks, 4 * c, features),
        (1, 1),
        [(before, blocks - 1 - before)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _down_by_wide_blocks(x, kernel):
    """`_down_by_blocks` of images, with a fourth channel of zeros."""
    missing = -x.shape[-1] % 4
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return _down_by_blocks(x, jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0))))


def _down_as_it_is(x, kernel):
    # The last column of zeros on the right meets no window; uneven padding is a copy on GPUs.
    x, pad = _even(x), kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _up_by_phases(x, kernel):
    """Stride-2 transposed convolution: out[o] = Σ_i x[i] · kernel[o - 2i + k // 2], k > 1.

    Rows and columns of the result that are even, or odd, are a convolution each, of every second
    tap; so none is multiplied by zeros, as blocks of 2×2 pixels have them.
    """
    left = kernel.shape[0] // 2

    def taps(phase):
        """(first tap of a phase, padding before, behind)."""
        first = (phase + left) % 2
        behind = (phase + left - first) // 2
        return first, len(range(first, kernel.shape[0], 2)) - 1 - behind, behind

    rows = []
    for row, above, below in map(taps, (0, 1)):
        columns = [
            jax.lax.conv_general_dilated(
                x,
                kernel[row::2, column::2][::-1, ::-1],
                (1, 1),
                [(above, below), (before, behind)],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for column, before, behind in map(taps, (0, 1))
        ]
        rows.append(jnp.stack(columns, axis=3))
    n, h, w, _ = x.shape
    return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, kernel.shape[3])


def _down_backward(x, kernel, gradient):
    """Of `down_by_two`, k > 1: to x by the transposed convolution, whose strided form is slow on
    CPUs; to the kernel by the form as it is."""
    to_x = _up_by_phases(gradient, kernel.swapaxes(2, 3))[:, : x.shape[1], : x.shape[2]]
    return to_x, jax.vjp(lambda kernel: _down_as_it_is(x, kernel), kernel)[1](gradient)[0]


_down = _by_platform(_down_as_it_is, _down_backward, _down_as_it_is)
_down_of_ones = _by_platform(_down_as_it_is, _gradient_of(_down_by_blocks), _down_as_it_is)
# Matrix units take channels by eight or more: of an image, most would be zeros.
_down_of_image = _by_platform(_down_as_it_is, _gradient_of(_down_by_blocks), _down_by_wide_blocks)
# Of three channels XLA's strided form of a codec's kernel on CPUs takes three times as long as that
# of blocks; of the larger kernel of ResNet's stem it was not measured.
_down_of_small_kernel = _by_platform(
    _down_by_blocks, _gradient_of(_down_by_blocks), _down_by_wide_blocks
)
_SMALL_KERNEL = 5
_FEW = 5
"""Fewer channels than these are an image's."""


def down_by_two(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride-2 cross-correlation with zero padding k // 2; odd sides are padded to even ones.

    [N, H, W, C], [k, k, C, F] -> [N, ceil(H/2), ceil(W/2), F].
    """
    if x.shape[-1] >= _FEW:
        return (_down if kernel.shape[0] > 1 else _down_of_ones)(x, kernel)
    small = kernel.shape[0] <= _SMALL_KERNEL
    return (_down_of_small_kernel if small else _down_of_image)(x, kernel)


def _up_by_blocks(x, kernel, bias):
    """`up_by_two` as one 3×3 convolution to blocks of 2×2 pixels."""
    c, features = kernel.shape[2:]
    missing = (5 - kernel.shape[0]) // 2
    kernel = jnp.pad(kernel, ((missing, missing),) * 2 + ((0, 0), (0, 0)))
    # Output row 2m + a sees input row m + d through tap a + 2 - 2d, d = -1, 0, 1.
    taps = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0))).reshape(3, 2, 3, 2, c, features)
    taps = taps[::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5).reshape(3, 3, c, 4 * features)
    y = jax.lax.conv_general_dilated(
        x, taps, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # The bias here, where GPUs add it within the convolution.
    return ops.depth_to_space(y + jnp.tile(bias, 4).reshape(1, 1, 1, -1))


def _up_by_phases_with_bias(x, kernel, bias):
    return _plus(_up_by_phases(x, kernel), bias)


def _up_backward(x, kernel, bias, gradient):
    """Of `up_by_two`: the transposed convolution of the transposed one is the strided one."""
    strided = down_by_two(gradient, kernel.swapaxes(2, 3))
    _, of_kernel = jax.vjp(lambda kernel: _down_as_it_is(gradient, kernel), kernel.swapaxes(2, 3))
    return strided, of_kernel(x)[0].swapaxes(2, 3), _sum_as_product(x, bias, gradient)[1]


_up = _by_platform(_up_by_phases_with_bias, _up_backward, _up_by_blocks)
_up_to_image = _by_platform(_up_by_blocks, _up_backward, _up_by_blocks)


def up_by_two(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Stride-2 transposed convolution, k×k for k = 3 or 5, padding k // 2, output padding 1.

    [N, H, W, C], [k, k, C, F], [F] -> [N, 2H, 2W, F].
    """
    return (_up if kernel.shape[3] >= _FEW else _up_to_image)(x, kernel, bias)


def _sum_as_product(x, bias, gradient):
    """XLA sums over positions on CPUs by windows, of one thread, ten times as slowly."""
    del x
    flat = gradient.reshape(-1, bias.shape[0])
    ones = jnp.ones((1, len(flat)), flat.dtype)
    total = jnp.matmul(ones, flat, precision="highest", preferred_element_type=jnp.float32)
    return gradient, total[0].astype(bias.dtype)


def _plus(x, bias):
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


_plus_bias = _by_platform(_plus, _sum_as_product, _plus)


def plus_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """A number for each channel added: [..., C], [C] -> [..., C]."""
    return _plus_bias(x, bias)


def _product_backward(x, matrix, gradient):
    """XLA's products on CPUs copy their first operand to contract its rows: better x, which is at
    hand, than the gradient, whose sums and roots it would then compute once more, out of order."""
    flat, of_flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    to_matrix = jax.lax.dot_general(flat, of_flat, (((0,), (0,)), ((), ())))
    return jnp.matmul(gradient, matrix.T), to_matrix


_product = _by_platform(jnp.matmul, _product_backward, jnp.matmul)


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Matrix product over channels: [..., C], [C, F] -> [..., F]."""
    return _product(x, matrix)
