"""Residual networks (He et al. 2016) cut after layer 1, where Omni-ICM puts its codec.

    image -> Head (7×7/2, 3×3/2 max pool, layer 1) -> f [H/4] -> Tail (layers 2-4) -> c2, c3, c4

f is what the information filter and the feature codec work on (Feng et al. 2022); c2, c3 and c4
stand at H/8, H/16 and H/32, or finer where `output_stride` turns strides into dilation (DeepLab).
Block counts: 10 (the smallest, for trials), 18 and 34 basic, 50, 101 and 152 bottleneck, 26 and 44
thinned, 71 after Torfason et al. 2018, whose cResNets (c39, c51, c72) have no head: their tail
begins with a learned code at H/8.

Fast forms, measured on XLA's CPU backend at 64 × 64 px, width 16: the gradient of the plain 7×7/2
convolution takes 70 ms against 15 ms as space-to-depth; that of a windowed max 38 ms against 6 ms
as a maximum over shifted slices, and half of that where the place of the maximum is kept. For 3×3/2
the plain form is the fastest. Training steps of narrow ResNets-50 take 0.55 to 0.8 of the time
where 1×1 convolutions are differentiated as matrix products (`benchmarks/profile_step.py
--config=configs/jpeg_dct.py`).
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax import ops
from icm_jax.errors import IcmError
from icm_jax.nets.convolution import down_by_two, pointwise
from icm_jax.nets.layers import end_of_block


class Stages(NamedTuple):
    """block: "basic" or "bottleneck"; depths: blocks in layers 1 to 4, cResNets have no layer 1."""

    block: str
    depths: tuple[int, int, int, int]


STAGES = {
    "10": Stages("basic", (1, 1, 1, 1)),
    "18": Stages("basic", (2, 2, 2, 2)),
    "26": Stages("bottleneck", (2, 2, 2, 2)),
    "34": Stages("basic", (3, 4, 6, 3)),
    "44": Stages("bottleneck", (1, 4, 6, 3)),
    "50": Stages("bottleneck", (3, 4, 6, 3)),
    "71": Stages("bottleneck", (3, 4, 13, 3)),
    "101": Stages("bottleneck", (3, 4, 23, 3)),
    "152": Stages("bottleneck", (3, 8, 36, 3)),
    "c39": Stages("bottleneck", (0, 4, 6, 3)),
    "c51": Stages("bottleneck", (0, 4, 10, 3)),
    "c72": Stages("bottleneck", (0, 4, 17, 3)),
}
EXPANSION = {"basic": 1, "bottleneck": 4}
_HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def stages(variant: str) -> Stages:
    """The row of STAGES. Raises: IcmError if there is none."""
    if variant not in STAGES:
        raise IcmError(f"no ResNet variant {variant!r}; choose one of {', '.join(STAGES)}")
    return STAGES[variant]


def feature_channels(variant: str, width: int = 64) -> int:
    """Channels of f, the output of `Head`: 256 for ResNet-50 of width 64."""
    return width * EXPANSION[stages(variant).block]


class Conv(ops.Module):
    """k×k convolution without bias, He initialisation.

    Zero padding is dilation·(k // 2) a side; of even k one less in front.
    """

    features: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        """float [N, H, W, C] -> dtype [N, ceil(H/stride), ceil(W/stride), features].

        gain: float32 [features], factors of the output, or None.
        """
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", _HE, shape)
        if gain is not None:
            kernel = kernel * gain.reshape(1, 1, 1, -1)
        x = ops.inside(x) if self.kernel > 1 else x
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.stride == 2 and self.kernel != 3:
            return down_by_two(x, kernel)
        if self.stride == 1 and self.kernel == 1:
            return pointwise(x, kernel)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,) * 2,
            [(self.dilation * ((self.kernel - 1) // 2), self.dilation * (self.kernel // 2))] * 2,
            rhs_dilation=(self.dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(ops.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy 2015).

    Statistics are float32 whatever `dtype` is, and of the global batch: under jit with a sharded
    batch the means below are means over all devices. The variance is the biased one in training and
    in the running average.

    Attributes:
      groups: above 1, so many equal parts of the batch are normalised each by itself. If devices
      divide them, none waits for another: the running averages alone, of the groups' mean
      statistics, are sent.
    """

    zero_scale: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    groups: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, conv: Conv | None = None) -> jax.Array:
        """float [..., C] -> dtype [..., C]; updates "batch_stats" if `train`.

        With `conv` this is what it makes of conv(x). At test time the scale then goes into the
        kernel, and all that is left is a bias, which GPUs add, as they take the ReLU after it,
        before a result of the convolution is written.

        Raises: IcmError if `groups` does not divide the batch.
        """
        channels = conv.features if conv else x.shape[-1]
        initial = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", initial, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if conv and not train:
            gain = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            offset = (bias - running_mean.value * gain).astype(self.dtype)
            y = conv(x, gain).astype(self.dtype)
            return y + offset.reshape((1,) * (y.ndim - 1) + (channels,))
        x = (conv(x) if conv else x).astype(jnp.float32)
        shape, grouped = x.shape, train and self.groups > 1
        if grouped:
            if shape[0] % self.groups:
                raise IcmError(f"{self.groups} groups do not divide a batch of {shape[0]} images")
            x = x.reshape(self.groups, -1, *shape[1:])
        scale, bias, mean, var = (
            v.reshape((1,) * (x.ndim - 1) + (channels,))
            for v in (scale, bias, running_mean.value, running_var.value)
        )
        if train:
            axes = tuple(range(int(grouped), x.ndim - 1))
            mean = jnp.mean(x, axes, keepdims=True)
            # One pass over x; ReLU networks keep |mean| near the deviation, so few digits are lost.
            square = jnp.mean(jnp.square(x), axes, keepdims=True)
            var = jnp.maximum(square - jnp.square(mean), 0.0)
            if not self.is_initializing():
                for running, found in ((running_mean, mean), (running_var, var)):
                    found = found.reshape(-1, channels).mean(axis=0)
                    running.value = self.momentum * running.value + (1.0 - self.momentum) * found
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        y = x * gain + (bias - mean * gain)
        return y.reshape(shape).astype(self.dtype)


class Block(ops.Module):
    """Residual block: x + branch(x), then ReLU.

    Basic: 3×3, 3×3. Bottleneck: 1×1, 3×3, 1×1 to four times the features. The stride sits in the
    first 3×3, or in the first 1×1 with `stride_in_1x1` (He et al.'s original). The last gamma
    starts at zero, so that a new block is the identity (Goyal et al. 2017).

    Attributes:
      kernel: of the bottleneck's middle convolution. out: channels at the end, 0 for those above.
      bn_groups: see `BatchNorm`.
    """

    block: str
    features: int
    stride: int = 1
    dilation: int = 1
    stride_in_1x1: bool = False
    dtype: Any = jnp.float32
    kernel: int = 3
    out: int = 0
    bn_groups: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        bottleneck = self.block == "bottleneck"
        out = self.out or self.features * EXPANSION[self.block]
        first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        layers = (
            [(self.features, 1, first), (self.features, self.kernel, second), (out, 1, 1)]
            if bottleneck
            else [(self.features, 3, self.stride), (out, 3, 1)]
        )
        norm = partial(BatchNorm, dtype=self.dtype, groups=self.bn_groups)
        y = x
        for i, (features, kernel, stride) in enumerate(layers):
            dilation = self.dilation if kernel > 1 else 1
            last = i == len(layers) - 1
            conv = Conv(features, kernel, stride, dilation, self.dtype, name=f"conv{i + 1}")
            y = norm(zero_scale=last, name=f"bn{i + 1}")(y, train, conv)
            y = y if last else nn.relu(y)
        if self.stride != 1 or x.shape[-1] != out:
            conv = Conv(out, 1, self.stride, dtype=self.dtype, name="shortcut_conv")
            x = norm(name="shortcut_bn")(x, train, conv)
        return end_of_block(nn.relu(x.astype(self.dtype) + y))


class Layer(ops.Module):
    """`depth` blocks; the first has the stride (or, dilated, the dilation of the layer before)."""

    block: str
    depth: int
    features: int
    stride: int = 1
    dilation: int = 1
    first_dilation: int = 1
    stride_in_1x1: bool = False
    dtype: Any = jnp.float32
    bn_groups: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.depth):
            x = Block(
                self.block,
                self.features,
                stride=self.stride if i == 0 else 1,
                dilation=self.first_dilation if i == 0 else self.dilation,
                stride_in_1x1=self.stride_in_1x1,
                dtype=self.dtype,
                bn_groups=self.bn_groups,
                name=f"block{i}",
            )(x, train)
        return x


class Head(ops.Module):
    """Stem and layer 1: normalised image to f.

    Attributes:
      variant: key of STAGES. width: channels of the stem (64 in the paper). dtype: of computation;
      parameters and statistics are float32. bn_groups: see `BatchNorm`.
    """

    variant: str
    width: int = 64
    dtype: Any = jnp.float32
    bn_groups: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float [N, H, W, 3], normalised -> dtype [N, H/4, W/4, feature_channels]."""
        block, depths = stages(self.variant)
        stem = Conv(self.width, 7, 2, dtype=self.dtype, name="stem")
        norm = BatchNorm(dtype=self.dtype, groups=self.bn_groups, name="stem_bn")
        x = nn.relu(norm(x, train, stem))  # [N, H/2, W/2, width]
        x = max_pool(ops.inside(x))  # after ReLU zeros are as good as none; [N, H/4, W/4, width]
        layer = partial(Layer, dtype=self.dtype, bn_groups=self.bn_groups, name="layer1")
        return layer(block, depths[0], self.width)(x, train)


class Tail(ops.Module):
    """Layers 2 to 4: f to (c2, c3, c4).

    Attributes:
      variant, width, dtype, bn_groups: as of `Head`. output_stride: 32, or 16 or 8 where layer 4,
      or 3 and 4, keep their resolution and are dilated instead: the same parameters, and on the
      coarse grid the same values (Chen et al. 2017). stride_in_1x1: see `Block`. A cResNet's input
      is at H/8, where layer 2 has no stride.
    """

    variant: str
    width: int = 64
    output_stride: int = 32
    stride_in_1x1: bool = False
    dtype: Any = jnp.float32
    bn_groups: int = 0

    @nn.compact
    def __call__(self, f: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float [N, H/4, W/4, C], of a cResNet [N, H/8, W/8, C] -> dtype c2, c3, c4 with 2, 4 and 8
        times the channels of layer 1.

        Raises: IcmError if output_stride is not 8, 16 or 32.
        """
        block, depths = stages(self.variant)
        if self.output_stride not in (8, 16, 32):
            raise IcmError(f"output_stride is {self.output_stride}; choose 8, 16 or 32")
        x, at, dilation, outputs = f, 4 if depths[0] else 8, 1, []
        for i in range(1, 4):
            usual = 4 * 2**i  # the stride of the whole network after this layer, undilated
            stride = 2 if at < min(usual, self.output_stride) else 1
            before, at = dilation, at * stride
            dilation = usual // at
            x = Layer(
                block,
                depths[i],
                self.width * 2**i,
                stride,
                dilation,
                before,
                self.stride_in_1x1,
                self.dtype,
                self.bn_groups,
                name=f"layer{i + 1}",
            )(x, train)
            outputs.append(x)
        return tuple(outputs)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """3×3/2 maximum, padding 1: float [N, H, W, C] -> [N, ceil(H/2), ceil(W/2), C].

    The gradient goes to the first maximum of a window.
    """
    return _pooled(x)[0]


def _pooled(x):
    """The maxima, and which of the nine places of its window each is: uint8."""
    h, w = ((side + 1) // 2 for side in x.shape[1:3])
    pads = (0, 0), (1, 2 * h - x.shape[1]), (1, 2 * w - x.shape[2]), (0, 0)
    x = jnp.pad(x, pads, constant_values=-jnp.inf)
    best = x[:, : 2 * h - 1 : 2, : 2 * w - 1 : 2]
    at = jnp.zeros(best.shape, jnp.uint8)
    for place in range(1, 9):
        top, left = divmod(place, 3)
        value = x[:, top : top + 2 * h - 1 : 2, left : left + 2 * w - 1 : 2]
        at = jnp.where(value > best, jnp.uint8(place), at)
        best = jnp.maximum(best, value)
    return best, at


def _pool_forward(x):
    best, at = _pooled(x)
    return best, (at, x)


def _pool_backward(saved, gradient):
    at, x = saved
    n, h, w, c = at.shape
    zero = jnp.zeros((), gradient.dtype)

    def of(top, left):
        return jnp.where(at == 3 * top + left, gradient, zero)

    def following(y, axis):
        pads = [(0, 0, 0)] * 4
        pads[axis] = (-1, 1, 0)
        return jax.lax.pad(y, zero, pads)

    # An even row is in the middle of one window, an odd one ends one and begins the next.
    rows = [(of(top, 1), of(top, 2) + following(of(top, 0), 2)) for top in range(3)]
    odd = [end + following(begin, 1) for end, begin in zip(rows[2], rows[0], strict=True)]
    y = jnp.stack([jnp.stack(pair, axis=3) for pair in (rows[1], odd)], axis=2)
    return (y.reshape(n, 2 * h, 2 * w, c)[:, : x.shape[1], : x.shape[2]],)


max_pool.defvjp(_pool_forward, _pool_backward)


def global_pool(x: jax.Array) -> jax.Array:
    """Mean over space in float32: float [N, H, W, C] -> float32 [N, C]."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
