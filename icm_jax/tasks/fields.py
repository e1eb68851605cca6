"""What the fields of tasks may be; the tasks say what they mean."""

from icm_jax.codecs import CODECS
from icm_jax.codecs import fields as of_codecs
from icm_jax.codecs.fields import VARIANT
from icm_jax.data.fields import (
    DTYPE,
    FLAG,
    NAME,
    SHARES,
    SIZE,
    Named,
    Table,
    number,
    one_of,
    optional,
    several,
    whole,
)
from icm_jax.nets import dct, resnet
from icm_jax.tasks.coefficients import INPUTS
from icm_jax.tasks.contrastive import NEGATIVES
from icm_jax.tasks.detection import PROTOCOLS
from icm_jax.tasks.task import FRONTENDS

CODEC = Named(CODECS, of_codecs.CODECS)
DETECTOR = Named(None, of_codecs.DETECTORS)  # or a .cfg file, by its name
POSITIVE, WEIGHT, SHARE = number(above=0), number(0), number(0, 1)
NETWORK: Table = {"variant": VARIANT, "width": whole(1), "dtype": DTYPE, "size": SIZE}
VIEWED: Table = {**NETWORK, "crop": SHARES, "bn_groups": optional(whole())}
"""Of a ResNet, with random views."""
TRUNK: Table = {**VIEWED, "frontend": one_of(*FRONTENDS), "codec": CODEC._replace(needed=False)}
TRUNK |= {"stride_in_1x1": optional(FLAG)}
RATE: Table = {"codec": CODEC, "target_bpp": POSITIVE, "beta": WEIGHT, "size": SIZE}
TASKS: dict[str, Table] = {
    "filter_pretraining": {**VIEWED, "codec": CODEC},
    "contrastive": {
        **VIEWED,
        "codec": CODEC,
        "projector_hidden": whole(1),
        "embedding": whole(1),
        "alpha": WEIGHT,
        "l1": WEIGHT,
        "negatives": one_of(*NEGATIVES),
        "queue": whole(1),
        "momentum": SHARE,
        "temperature": POSITIVE,
    },
    "compression": {
        **NETWORK,
        "crop": SHARES,
        "filter": CODEC,
        "codec": CODEC,
        "lmbda": POSITIVE,
        "feature_weights": several(WEIGHT, 3),
        "relative": FLAG,
    },
    "image_compression": {
        "codec": CODEC,
        "lambdas": several(POSITIVE),
        "metric": one_of("mse", "ms_ssim", "both"),
        "ms_ssim_weight": WEIGHT,
        "size": SIZE,
        "straight_through": FLAG,
    },
    "autoencoder_compression": RATE,
    "joint_classification": {**NETWORK, "crop": SHARES, **RATE, "gamma": WEIGHT},
    "classification": {**TRUNK, "mode": one_of("finetune", "linear")},
    "coefficient_classification": {
        "input": one_of(*INPUTS),
        "network": one_of(*dct.WIRINGS, *resnet.STAGES),
        "width": POSITIVE,
        "dtype": DTYPE,
        "size": SIZE,
    },
    "segmentation": {
        **TRUNK,
        "aspp_rates": several(whole(1)),
        "output_stride": one_of(8, 16, 32),
    },
    "detection": {
        "detector": DETECTOR,
        "dtype": DTYPE,
        "anchor_scale": POSITIVE,
        "least": SHARE,
        "overlap": SHARE,
        "limit": whole(1),
        "protocol": optional(one_of(*PROTOCOLS)),
        "crop": SHARES,
        "size": SIZE,
    },
    "object_detection": {
        **TRUNK,
        "channels": whole(1),
        "convolutions": whole(1),
        "range_scale": POSITIVE,
        "masks": FLAG,
        "mask_boxes": whole(1),
        "least": SHARE,
        "overlap": SHARE,
        "limit": whole(1),
        "protocol": optional(one_of(*PROTOCOLS)),
    },
    "scalable_compression": {
        "detector": DETECTOR,
        "codec": CODEC,
        "lambdas": several(POSITIVE),
        "feature_weight": WEIGHT,
        "output_weight": optional(WEIGHT),
        "picture_weight": optional(WEIGHT),
        "fixed": optional(several(NAME, least=0)),
        "size": SIZE,
        "straight_through": FLAG,
    },
}
"""Of `icm_jax.tasks.TASKS`. One of your own may be added to both; it may be left out here."""
