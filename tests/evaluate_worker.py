"""One process of tests/test_evaluators.py: scores trained runs.

python evaluate_worker.py BASE COORDINATOR COUNT INDEX
"""

import pathlib
import sys
import warnings

import jax

warnings.simplefilter("ignore")
base, coordinator, count, index = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, int(count), int(index))

from icm_jax.engine.run import load_run  # noqa: E402
from icm_jax.measure.evaluate import evaluate  # noqa: E402

for folder in sorted(pathlib.Path(base).glob("*/config.json")):
    evaluate(load_run(folder.parent), base)
