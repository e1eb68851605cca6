"""What is optimised: losses, predictions, parameter groups."""

from ml_collections import ConfigDict

from icm_jax.errors import IcmError
from icm_jax.tasks.autoencoder import autoencoder_compression, joint_classification
from icm_jax.tasks.classification import classification
from icm_jax.tasks.coefficients import coefficient_classification
from icm_jax.tasks.compression import compression
from icm_jax.tasks.contrastive import contrastive
from icm_jax.tasks.detection import detection
from icm_jax.tasks.filter_pretraining import filter_pretraining
from icm_jax.tasks.image_compression import image_compression
from icm_jax.tasks.object_detection import object_detection
from icm_jax.tasks.scalable import scalable_compression
from icm_jax.tasks.segmentation import segmentation
from icm_jax.tasks.task import Task

TASKS = {
    "filter_pretraining": filter_pretraining,
    "contrastive": contrastive,
    "compression": compression,
    "image_compression": image_compression,
    "autoencoder_compression": autoencoder_compression,
    "joint_classification": joint_classification,
    "classification": classification,
    "coefficient_classification": coefficient_classification,
    "segmentation": segmentation,
    "detection": detection,
    "object_detection": object_detection,
    "scalable_compression": scalable_compression,
}


def build_task(config: ConfigDict) -> Task:
    """The task that `config.name` names. Raises IcmError for an unknown name."""
    if config.name not in TASKS:
        raise IcmError(f"unknown task {config.name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[config.name](config)
