"""Automatic garbage collection is off inside, and everything is as before afterwards."""

import gc
import weakref

import pytest

from internlm.utils.garbage import paused_collector


class Knot:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def test_collects_at_the_given_calls_only():
    with paused_collector(every=2) as collect:
        assert not gc.isenabled()
        alive = weakref.ref(Knot())
        collect()
        assert alive() is not None
        collect()
        assert alive() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_error_leaves_the_collector_on():
    with pytest.raises(ValueError), paused_collector():
        raise ValueError
    assert gc.isenabled()
