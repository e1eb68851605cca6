"""The compressive autoencoder with a code of few values (Theis et al. 2017, Torfason et al. 2018).

    x -> analysis -> y -> nearest centre -> symbols -> range coder
                                               +-> values q -> synthesis -> x_hat

The code q is an output of its own, "feature": networks may read it in place of the image. A symbol
costs what its share in its channel says (`statistics`, running means of training); the tables of
the range coder are these shares. Parameters lie under `autoencoder`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Outputs, builder, method_of, require_dtype
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.coding import tables
from icm_jax.errors import IcmError
from icm_jax.nets.autoencoder import Centres, CodeAnalysis, CodeSynthesis

PART = "autoencoder"
_RANGES = (1, 1024), (1, 1024), (2, 256), (0, 64)
"""Of width, channels, centres and blocks."""
_MOMENTUM = 0.99  # of the running histogram
_LEAST = 2.0**-16  # share of a symbol: what the coder's tables can express


class Autoencoder(ops.Module):
    """All networks of the codec; attributes as of `autoencoder_codec`."""

    width: int
    channels: int
    centres: int
    learned: bool
    blocks: int
    dtype: str

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.analysis = CodeAnalysis(self.channels, self.width, self.blocks, dtype)
        self.synthesis = CodeSynthesis(self.width, self.blocks, dtype)
        self.quantiser = Centres(self.centres, self.learned)
        uniform = lambda: jnp.full((self.channels, self.centres), 1.0 / self.centres)  # noqa: E731
        self.statistics = self.variable("batch_stats", "histogram", uniform)

    def __call__(self, x):
        """(x_hat, q, bits of a symbol, mean over channels) with gradients; updates statistics."""
        found = self.quantiser(self.analysis(x))
        if not self.is_initializing():
            new = (1.0 - _MOMENTUM) * jax.lax.stop_gradient(found.histogram)
            self.statistics.value = _MOMENTUM * self.statistics.value + new
        shares = jnp.maximum(found.histogram, 1e-9)
        bits = -(shares * jnp.log2(shares)).sum(-1).mean()
        return self.synthesis(found.q), found.q, bits

    def symbols(self, x):
        return self.quantiser.nearest(self.analysis(x))

    def code(self, symbols):
        return self.quantiser.take(symbols)

    def decode(self, symbols):
        return self.synthesis(self.code(symbols))

    def bits(self, symbols):
        shares = jnp.maximum(self.statistics.value, _LEAST)
        rows = jnp.arange(self.channels).reshape(1, 1, 1, -1)
        known = jnp.clip(symbols.astype(jnp.int32), 0, self.centres - 1)
        return -jnp.log2(shares[rows, known])


@builder("autoencoder")
def autoencoder_codec(
    width: int, channels: int, centres: int, learned: bool, blocks: int, dtype: str = "float32"
) -> Codec:
    """The codec; outputs "image", float32 on 0...255, and "feature", the code [N, H/8, W/8, C].

    Args:
      width: N, 128 in the papers. channels: C, of the code. centres: L, values that it may have.
      learned: whether they are trained; else they are integers. blocks: residual blocks each way.
      dtype: of the networks.

    Raises: IcmError for numbers below 1 or too large, a single centre, or an unknown dtype.
    """
    given = (width, channels, centres, blocks)
    if any(not low <= n <= high for n, (low, high) in zip(given, _RANGES, strict=True)):
        raise IcmError(
            f"no autoencoder of width {width}, channels {channels}, centres {centres}, blocks "
            f"{blocks}: they are from {tuple(low for low, _ in _RANGES)} to "
            f"{tuple(high for _, high in _RANGES)}"
        )
    require_dtype(dtype)
    module = Autoencoder(width, channels, centres, learned, blocks, dtype)

    run = method_of(module, PART, ("params", "batch_stats"))

    def shares_of(variables):
        shares = np.asarray(variables["batch_stats"][PART]["histogram"], np.float64)
        shares = np.maximum(shares, _LEAST)
        shares /= shares.sum(axis=1, keepdims=True) * (1 + 1e-9)
        return tables.from_pmfs(list(shares), np.zeros(channels, np.int32))

    def init(key, image):
        del image
        collections = module.init(key, jnp.zeros((1, 16, 16, 3)))
        return {name: {PART: tree} for name, tree in collections.items()}

    def symbols(variables, inputs):
        image = ops.pad_to(inputs["image"], 8).astype(jnp.float32)
        return run(variables, image, method="symbols")

    def image_of(variables, decoded, shape):
        return ops.crop_to(run(variables, decoded["y"], method="decode"), *shape)

    return Codec(
        parts=(PART,),
        init=init,
        analyse=lambda variables, inputs: {"y": symbols(variables, inputs)},
        segments=(
            priors.per_channel(
                "y",
                priors.halvings(3, channels),
                lambda variables, y: run(variables, y, method="bits"),
                shares_of,
            ),
        ),
        outputs=Outputs(
            image=image_of,
            feature=lambda variables, decoded, shape: run(variables, decoded["y"], method="code"),
        ),
        tiling=_tiling(symbols, blocks),
    )


def _tiling(front, blocks: int) -> Tiling:
    # Layers look 2 + 4 + 8 pixels far, back 8 + 4 + 2, each way with blocks of twice 4.
    halo = 14 + 8 * blocks + -(14 + 8 * blocks) % 8
    back = (Back("image", ("y",), 1, halo // 8), Back("feature", ("y",), 8, 0))
    return Tiling(("y",), front, 8, 8, halo, back)


def relaxed(codec: Codec, variables, image: jax.Array):
    """What training sees of an `autoencoder_codec`, with gradients through the quantiser.

    Args: image: [N, H, W, 3] on 0...255, sides multiples of 8.
    Returns: (x_hat float32 [N, H, W, 3], q float32 [N, H/8, W/8, C], H(q): bits of a symbol by the
      batch's histograms, the new statistics).
    """
    module = Autoencoder(**dict(codec.config[1]))
    of_codec = {name: variables[name][PART] for name in ("params", "batch_stats")}
    outputs, updated = module.apply(of_codec, image, mutable=["batch_stats"])
    return *outputs, updated["batch_stats"]
