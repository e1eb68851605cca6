"""Signals that ask a training run to save and stop."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

_asked = itertools.count(1)  # of all runs: JAX's coordinator stops after the largest


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], int]]:
    """Within: () -> the signal for which to save and stop after this step, or 0; to be asked once a
    step. SIGTERM pods get before they are taken away, SIGINT is Ctrl-C; a second one ends at once.

    Of several processes, any may get SIGTERM; JAX's coordinator, which handles it then, lets all
    know at the same step. Saving is collective: who saved alone would wait for ever.
    """
    if jax.process_count() > 1:

        def asked():
            reached = multihost_utils.reached_preemption_sync_point(next(_asked))
            return signal.SIGTERM if reached else 0

        yield asked
        return
    got: list[int] = []
    former = {}

    def note(number, _):
        got.append(number)
        signal.signal(number, former[number])

    if threading.current_thread() is threading.main_thread():
        former = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: got[0] if got else 0
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
