"""One process of tests/test_resume.py: trains a small stage 1 with the real loop.

python train_worker.py BASE OVERRIDES_JSON [COORDINATOR COUNT INDEX]
"""

import dataclasses
import json
import pathlib
import sys
import warnings

import jax

warnings.simplefilter("ignore")
if len(sys.argv) > 3:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

from icm_jax.engine import train  # noqa: E402
from icm_jax.main import load_experiment  # noqa: E402

base = pathlib.Path(sys.argv[1])
path = pathlib.Path(__file__).resolve().parent.parent / "configs" / "omni_icm.py"
module = load_experiment(path)
config = module.get_config("tiny")
config.data.path = str(base.parent / "data")
config.stage1.learning_rate = 1e-4  # gentle: rounding differences must not be amplified
config.stage1.negatives = "both"  # the queue, too, lies on all devices
config.pretrain.steps = config.stage0.steps = 0
run = module.runs(config)[0]
changes = dict(name="run", steps=10, save_every=3, log_every=1) | json.loads(sys.argv[2])
run = dataclasses.replace(run, **changes)
train.train(run, base)
