"""Python's garbage collector, kept from pausing in the middle of a step.

A full collection looks at every object of torch and of the model, for a tenth of a second and more, whenever enough new
ones have come; the ranks pause at different times, and all wait for the slowest.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector(every: int = 50) -> Iterator[Callable[[], None]]:
    """Stops automatic collection inside. Yields a function to call once a step, which collects each `every` calls.

    Objects that live at the start are never examined again, so a collection takes a millisecond.
    """
    calls = 0

    def collect() -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()
