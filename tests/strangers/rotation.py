"""Another task: which way up is an image (Gidaris et al. 2018, arXiv:1803.07728)? No labels.

view, turned by 0, 90, 180 and 270 degrees -> ResNet -> dense layer -> four logits
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax.engine.run import Run, make_run
from icm_jax.tasks import TASKS, Task, views
from icm_jax.tasks.classification import classifier_on, classifier_task
from icm_jax.tasks.task import TRAIN, build_trunk


def rotation(config) -> Task:
    """The task; fields: the model's, size (a number). Every image is seen all four ways."""
    init, classify = classifier_on(build_trunk(config), 4, config.size)

    def logits_of(variables, batch, key):
        if key is None:
            images = views.centre(batch["image"], config.size)
        else:
            images, _ = views.mild(batch["image"], config.size, crop=config.crop, key=key)
        turned = jnp.concatenate([jnp.rot90(images, turn, axes=(1, 2)) for turn in range(4)])
        return classify(variables, turned, None, key is not None)

    task = classifier_task(init, logits_of, lambda name: TRAIN)

    def loss(variables, batch, key, step):
        rows = len(batch["image"])
        told = {"label": jnp.repeat(jnp.arange(4), rows), "valid": jnp.tile(batch["valid"], 4)}
        return task.loss(variables, batch | told, key, step)

    return task._replace(loss=loss)


def rotation_run(**data) -> Run:
    """A narrow ResNet on 48 × 48 pixels of a data set, e.g. name="photos", path=FOLDER."""
    TASKS["rotation"] = rotation
    train = dict(steps=30, batch_size=16, learning_rate=3e-3, optimiser="adamw", warmup_steps=5)
    train |= dict(log_every=10, save_every=30, clip_norm=1.0, accumulate=1, ema=0.0, fsdp=1)
    config = ConfigDict(dict(data=dict(data, canvas=48), train=dict(train, remat="none")))
    task = dict(name="rotation", frontend="pixels", variant="10", width=8, dtype="float32")
    task |= dict(size=48, crop=(0.5, 1.0), bn_groups=0)
    return make_run(config, config.train, name="rotation", seed=0, task=task, weight_decay=0.0)
