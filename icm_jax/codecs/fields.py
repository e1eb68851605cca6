"""What the arguments of codecs may be in a config; their builders say what they mean."""

from icm_jax.codecs import compressai, hyperprior, layered, scalable
from icm_jax.data.fields import (
    DTYPE,
    FLAG,
    Table,
    either,
    number,
    one_of,
    optional,
    several,
    whole,
)
from icm_jax.nets import resnet

COUNT = whole(1)
VARIANT = one_of(*resnet.STAGES)
WIDTHS = either(COUNT, several(COUNT, 4))
DETECTORS: dict[str, Table] = {
    "yolov3": {
        "width": optional(number(above=0)),
        "depth": optional(number(above=0)),
        "split": optional(whole()),
    },
    "yolov3-tiny": {"split": optional(whole())},
}
"""Of `icm_jax.nets.yolo.DETECTORS`."""
CODECS: dict[str, Table] = {
    "omni_filter": {
        "variant": VARIANT,
        "width": COUNT,
        "channels": COUNT,
        "widths": several(COUNT, 3),
        "dtype": optional(DTYPE),
    },
    "omni_feature": {
        "variant": VARIANT,
        "width": COUNT,
        "filter_channels": COUNT,
        "filter_widths": several(COUNT, 3),
        "channels": COUNT,
        "widths": several(COUNT, 2),
        "hyper_channels": COUNT,
    },
    "image": {
        "kind": one_of(*hyperprior.KINDS),
        "width": WIDTHS,
        "channels": COUNT,
        "levels": optional(COUNT),
        "dtype": optional(DTYPE),
        "last": optional(one_of(3, 5)),
    },
    "space_channel": {
        "widths": several(COUNT, 2),
        "slices": several(COUNT),
        "checkered": optional(whole()),
        "blocks": optional(several(COUNT, 3)),
        "back_blocks": optional(several(COUNT, 3)),
        "inner": optional(COUNT),
        "hyper_channels": optional(COUNT),
        "side": optional(COUNT),
        "levels": optional(COUNT),
        "dtype": optional(DTYPE),
    },
    "compressai": {
        "architecture": one_of(*compressai.ARCHITECTURES),
        "width": COUNT,
        "channels": COUNT,
        "dtype": optional(DTYPE),
    },
    "autoencoder": {
        "width": COUNT,
        "channels": COUNT,
        "centres": whole(2, 256),
        "learned": FLAG,
        "blocks": whole(),
        "dtype": optional(DTYPE),
    },
    "scalable": {
        "kind": one_of(*scalable.KINDS),
        "width": WIDTHS,
        "base": COUNT,
        "enhancement": COUNT,
        "hypers": one_of(1, 2),
        "backbone": optional(one_of(*scalable.BACKBONES)),
    },
    "layered": {
        "kind": one_of(*layered.KINDS),
        "widths": several(COUNT, 2),
        "base": several(COUNT),
        "enhancement": several(COUNT),
        "hypers": one_of(1, 2),
        "checkered": optional(whole()),
        "blocks": optional(several(COUNT, 3)),
        "base_blocks": optional(several(COUNT, 3)),
        "inner": optional(COUNT),
        "hyper_channels": optional(COUNT),
        "side": optional(COUNT),
        "levels": optional(COUNT),
        "share": optional(number(above=0, most=1)),
        "through": optional(one_of(*layered.THROUGH)),
        "dtype": optional(DTYPE),
        "ahead": optional(FLAG),
    },
}
"""Of `icm_jax.codecs.CODECS`. One of your own may be added to both; it may be left out here."""
