"""A codec of one's own, trained, and beside JPEG in a report."""

import ml_collections

from icm_jax.codecs import CODECS
from icm_jax.engine.run import Labels, Point, make_run
from strangers.codec import checkerboard_codec

CODECS["checkerboard"] = checkerboard_codec


def get_config():
    train = dict(steps=1000, batch_size=8, learning_rate=1e-3, optimiser="adamw", warmup_steps=50)
    train |= dict(log_every=20, save_every=500, clip_norm=1.0, accumulate=1, ema=0.0)
    train |= dict(fsdp=1, remat="none")
    data = dict(name="photos", path="", canvas=256)
    codec = dict(name="checkerboard", width=32, channels=48)
    return ml_collections.ConfigDict(dict(name="mine", data=data, train=train, codec=codec))


def runs(config):
    task = dict(name="image_compression", codec=config.codec.to_dict(), lambdas=(0.01,), size=128)
    task |= dict(metric="mse", ms_ssim_weight=0.0, straight_through=True)
    scored = (Point("picture"), *(Point("jpeg", quality) for quality in (20, 40, 60)))
    more = dict(seed=0, weight_decay=0.0, evaluate=scored)
    labels = Labels("image", "checkerboard")
    return [make_run(config, config.train, name="mine", task=task, labels=labels, **more)]
