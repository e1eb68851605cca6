"""A context model in two passes (He et al. 2021, "Checkerboard context model", CVPR).

The transforms and the side information are those of the package's scale hyperprior; scales and
means of y come from a network that sees, in the second pass, what the first has decoded.
"""

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.codecs import image_codec, priors
from icm_jax.codecs.codec import Codec, builder
from icm_jax.nets.entropy_parameters import EntropyParameters
from icm_jax.nets.integer import Node

PART = "checkerboard"


def checkerboard(shape: tuple[int, int, int]) -> np.ndarray:
    """The black squares first, then the white ones, whose neighbours are known by then."""
    rows, columns, _ = np.indices(shape)
    return (rows + columns) % 2


def parameters(width: int, channels: int) -> EntropyParameters:
    nodes = (
        Node("hyper_0", ("z",), "leaky_relu", up=True, features=4 * width),
        Node("hyper_1", ("hyper_0",), "leaky_relu", up=True, features=4 * width),
        Node("context", ("y",), features=2 * width, side=5),
        Node("joint", ("hyper_1", "context", "known"), "leaky_relu", features=4 * width, side=1),
        Node("last", ("joint",), features=2 * channels, side=1),
    )
    return EntropyParameters(nodes, channels, mean=True)


@builder("checkerboard")
def checkerboard_codec(width: int, channels: int, levels: int = 1) -> Codec:
    """Numbers as of `image_codec`."""
    base = image_codec("scale_hyperprior", width, channels, levels)
    module = parameters(width, channels)

    def init(key, image):
        variables = base.init(key, image)
        del variables["params"]["image_codec"]["hyper_synthesis"]
        y = jnp.zeros((1, 4, 4, channels))
        inputs = {"z": jnp.zeros((1, 1, 1, width)), "y": y, "known": y}
        found = module.init(jax.random.fold_in(key, 1), inputs)["params"]
        return {"params": variables["params"] | {PART: found}}

    def real(variables, inputs):
        return module.apply({"params": variables["params"][PART]}, inputs)

    network = priors.Network(module.nodes, real, module.weights, (PART,))
    z, y = base.segments
    y = priors.conditional(y.name, y.shape, network, mean=True, passes=checkerboard)
    return base._replace(parts=(*base.parts, PART), init=init, segments=(z, y))
