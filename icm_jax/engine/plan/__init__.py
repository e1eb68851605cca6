"""What a run needs, before it is paid for: the true training step compiled for devices not at hand.

The acts are those of `engine.train` up to the compiled step, with shapes in place of arrays. For a
TPU the program is made by libtpu for the topology that is named, so memory, FLOPs and collectives
are read off the very program that would run there. Step times are a roofline's lower bounds:
nothing is executed.
"""

from icm_jax.engine.plan.chips import GIB, Chip, Target, open_target, prepare_host
from icm_jax.engine.plan.hlo import Collective, collectives, sent
from icm_jax.engine.plan.step import abstract_step, compare, counted, distinct, plan
from icm_jax.engine.plan.tables import describe

__all__ = [
    "GIB",
    "Chip",
    "Collective",
    "Target",
    "abstract_step",
    "collectives",
    "compare",
    "counted",
    "describe",
    "distinct",
    "open_target",
    "plan",
    "prepare_host",
    "sent",
]
