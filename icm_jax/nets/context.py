"""A context model in raster order: what is known around a position tells how it is distributed.

    # # # # #     the twelve positions that the position x sees (Minnen et al. 2018; the masked
    # # # # #     convolution is van den Oord et al. 2016, "Pixel recurrent neural networks")
    # # x

As x in column j of row i looks no further than column j + 2 of the row before, all positions with
the same j + 3 i, a wave, can be had at once: w + 3 (h - 1) waves, in place of h w positions one by
one, with the same result. All that follows the masked convolution looks at single positions; so it
is a 1×1 convolution here, of the twelve side by side, and a wave is an array [N, P, 1, C].
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.nets import integer
from icm_jax.nets.integer import Node

BEFORE, BESIDE = 2, 2
"""Rows above, and columns on both sides, that a position sees."""
_PLACES = np.array([(row, column) for row in range(3) for column in range(5)][:12], np.int32)
"""Of what is seen, in an array with `BEFORE` rows above and `BESIDE` columns on both sides more."""
SEEN = len(_PLACES)
LAG = BESIDE + 1
"""Columns by which a wave lies further left in the next row."""


def padded(latent, xp=np):
    """[N, h, w, C] with zeros where positions at its border look."""
    return xp.pad(latent, ((0, 0), (BEFORE, 0), (BESIDE, BESIDE), (0, 0)))


def around(latent, xp=np):
    """What each position sees, side by side: [N, h, w, C] -> [N, h, w, 12 C]."""
    _, height, width, _ = latent.shape
    wide = padded(latent, xp)
    seen = [wide[:, row : row + height, left : left + width] for row, left in _PLACES]
    return xp.concatenate(seen, axis=-1)


def waves(height: int, width: int) -> int:
    """How many there are.

    >>> waves(3, 7)
    13
    """
    return width + LAG * (height - 1)


def longest(height: int, width: int) -> int:
    """Positions in the longest wave."""
    return min(height, -(-width // LAG))


def wave(number: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the positions of a wave.

    >>> [part.tolist() for part in wave(6, 3, 5)]
    [[1, 2], [3, 0]]
    """
    first = max(0, -((width - 1 - number) // LAG))
    rows = np.arange(first, min(height - 1, number // LAG) + 1)
    return rows, number - LAG * rows


def seen_from(wide, rows, columns):
    """What positions see, out of what `padded` gives: [N, P, 1, 12 C]."""
    down, right = _PLACES.T[:, None]
    found = wide[:, rows[:, None] + down, columns[:, None] + right]
    return found.reshape(len(wide), len(rows), 1, -1)


def in_waves(latent: jax.Array, once: jax.Array, decided: Callable) -> jax.Array:
    """A latent as it is decoded, wave by wave in one program: float [N, h, w, C].

    Args:
      latent: float [N, h, w, C]. once: [N, h, w, K], what the model knows without its context.
      decided: (latent, once, what is seen) at the positions of a wave, [N, P, 1, ...] -> what they
        are decoded to.
    """
    _, height, width, _ = latent.shape
    places = jnp.arange(longest(height, width), dtype=jnp.int32)

    def step(number, wide):
        first = jnp.maximum(0, -((width - 1 - number) // LAG))
        rows = first + places
        columns = number - LAG * rows
        inside = (rows < height) & (columns >= 0)
        at = jnp.where(inside, rows, 0), jnp.where(inside, columns, 0)
        given = latent[:, at[0], at[1]][:, :, None], once[:, at[0], at[1]][:, :, None]
        values = decided(*given, seen_from(wide, *at))[:, :, 0]
        put = jnp.where(inside, at[0] + BEFORE, len(wide[0])), at[1] + BESIDE  # outside: nowhere
        return wide.at[:, put[0], put[1]].set(values, mode="drop")

    empty = padded(jnp.zeros_like(latent), jnp)
    found = jax.lax.fori_loop(0, waves(height, width), step, empty)
    return found[:, BEFORE:, BESIDE:-BESIDE]


class ContextNodes(ops.Module):
    """The parameters of a hyper-synthesis and a context model, node by node as `integer` has them.

    Attributes:
      nodes: that of `SEEN` in them takes the twelve of each of `channels` channels of y.
    """

    nodes: tuple[Node, ...]
    channels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> dict[str, jax.Array]:
        """z float [N, h, w, C], only for its channels -> the kernel of each node."""
        features = {"z": z.shape[-1], "around": SEEN * self.channels}
        scales = np.repeat([1.0, 0.0], self.channels).astype(np.float32)  # a new codec's
        found = {}
        for node in self.nodes:
            last = node is self.nodes[-1]
            init = (lambda *_: jnp.asarray(scales)) if last else nn.initializers.zeros
            inputs = sum(features[name] for name in node.inputs)
            shape = (node.side, node.side, inputs, node.features)
            kernel: Any = self.param(f"{node.name}_kernel", nn.initializers.lecun_normal(), shape)
            self.param(f"{node.name}_bias", init, (node.features,))
            features[node.name] = node.features // 4 if node.up else node.features
            found[node.name] = kernel
        return found


def weights(params) -> dict[str, integer.Weights]:
    """Parameters of `ContextNodes` as `integer` takes them."""
    names = [name.removesuffix("_kernel") for name in params if name.endswith("_kernel")]
    return {
        name: integer.Weights(params[f"{name}_kernel"], params[f"{name}_bias"]) for name in names
    }


def params(of_nodes: Mapping[str, integer.Weights]) -> dict[str, np.ndarray]:
    """The parameters that `weights` makes these of."""
    return {
        f"{name}_{kind}": value
        for name, layer in of_nodes.items()
        for kind, value in layer._asdict().items()
    }


def nodes_of(hyper: tuple[Node, ...], channels: int) -> tuple[Node, ...]:
    """Hyper-synthesis and context model of y of so many channels: scales, then means (Minnen et al.
    2018, table 1, with the widths of CompressAI)."""
    known = (hyper[-1].name, "context")
    return (
        *hyper,
        Node("context", ("around",), features=2 * channels, side=1),
        Node("joint_0", known, "leaky_relu", features=channels * 10 // 3, side=1),
        Node("joint_1", ("joint_0",), "leaky_relu", features=channels * 8 // 3, side=1),
        Node("joint_2", ("joint_1",), features=2 * channels, side=1),
    )


def transposed_hyper(channels: int) -> tuple[Node, ...]:
    """The hyper-synthesis of `entropy_parameters.scale_synthesis_nodes`, with twice as many outputs
    as y has channels (Minnen et al. 2018, table 1)."""
    widths = channels, channels * 3 // 2
    return (
        Node("hyper_0", ("z",), "leaky_relu", up=True, features=4 * widths[0]),
        Node("hyper_1", ("hyper_0",), "leaky_relu", up=True, features=4 * widths[1]),
        Node("hyper_2", ("hyper_1",), features=2 * channels),
    )


def subpixel_hyper(channels: int) -> tuple[Node, ...]:
    """The hyper-synthesis of Cheng et al. 2020: five 3×3 convolutions, two by sub-pixels."""
    wide = channels * 3 // 2
    return (
        Node("hyper_0", ("z",), "leaky_relu", features=channels),
        Node("hyper_1", ("hyper_0",), "leaky_relu", up=True, features=4 * channels),
        Node("hyper_2", ("hyper_1",), "leaky_relu", features=wide),
        Node("hyper_3", ("hyper_2",), "leaky_relu", up=True, features=4 * wide),
        Node("hyper_4", ("hyper_3",), features=2 * channels),
    )
