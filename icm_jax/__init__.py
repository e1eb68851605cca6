"""icm_jax: learned image coding for machines as well as for humans.

    codec = icm_jax.load("model.icmc")
    data = codec.compress(image, quality=50)     # uint8 [H, W, 3] or [H, W] -> bytes
    image = codec.decompress(data)

Importing the package does no work: JAX is imported by the first `load`.
"""

from icm_jax.errors import IcmError

__all__ = ["IcmError", "load"]


def load(path):
    """The codec in a file that `icm_jax.codecs.codec.save` wrote; see `FrozenCodec`.

    Raises: IcmError if the file is missing, damaged or not a codec. Nothing in it is executed.
    """
    from icm_jax import codecs

    return codecs.codec.load(path, codecs.CODECS)
