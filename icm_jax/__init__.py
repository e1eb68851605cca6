"""icm_jax: learned image coding for machines as well as for humans.

    codec = icm_jax.load()                       # the model in the package, or a path
    data = codec.compress(image, quality=50)     # uint8 [H, W, 3] or [H, W] -> bytes
    image = codec.decompress(data)

Importing the package does no work: JAX is imported by the first `load`.
"""

from icm_jax.errors import IcmError

__all__ = ["IcmError", "__version__", "load"]
__version__ = "0.1.0"


def load(path=None):
    """The codec in a file that `icm_jax.codecs.model_file.save` wrote; see `FrozenCodec`.

    Args:
      path: of an .icmc file; left out, the model in the package, for photographs (models/photo.md).

    Raises: IcmError if the file is missing, damaged or not a codec. Nothing in it is executed.
    """
    from icm_jax.codecs import CODECS, model_file

    return model_file.load(path, CODECS)
