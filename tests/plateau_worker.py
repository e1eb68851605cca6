"""One of two processes of tests/test_plateau.py: the toy with two devices, one each.

python plateau_worker.py FOLDER COORDINATOR INDEX
"""

import pathlib
import sys
import warnings

import jax

warnings.simplefilter("ignore")
folder, coordinator, index = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, 2, int(index))

from test_plateau import fit  # noqa: E402

fit(pathlib.Path(folder))
