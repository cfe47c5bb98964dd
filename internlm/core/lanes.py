"""Lanes: queues in which collectives run beside compute, in the order in which they were submitted.

On a GPU a lane is a CUDA stream. On a CPU it is one thread, so that gloo's transfers overlap with compute there as well
and the order of collectives is the same on all ranks.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch

Work = Callable[[], None]


class Lane(Protocol):
    """A queue of work beside the current stream of compute."""

    def submit(self, work: Work) -> Callable[[], None]:
        """Queues `work` after what compute has launched so far. Returns a function that makes compute wait for it."""
        ...


class StreamLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def submit(self, work: Work) -> Callable[[], None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.no_grad():
            work()
            done = self.stream.record_event()
        return partial(_wait_for, done, work)


def _wait_for(done: torch.cuda.Event, work: Work) -> None:
    # `work` is only held: its memory must not be given to others until compute has waited.
    torch.cuda.current_stream().wait_event(done)


class ThreadLane:
    """One thread. An error of the work is raised where compute waits for it."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="lane")

    def submit(self, work: Work) -> Callable[[], None]:
        done: Future[None] = self.executor.submit(_without_grad, work)
        return lambda: done.result()


class InlineLane:
    """No overlap: the work is done when `submit` returns."""

    def submit(self, work: Work) -> Callable[[], None]:
        _without_grad(work)
        return _nothing


def build_lanes(device: torch.device, overlap_reduce: bool, overlap_gather: bool) -> tuple[Lane, Lane]:
    """Lanes for reductions and for gathers. On a CPU both are one thread: gloo pairs transfers by their order."""
    inline = InlineLane()
    if device.type == "cuda":
        return (StreamLane(device) if overlap_reduce else inline), (StreamLane(device) if overlap_gather else inline)
    thread = ThreadLane() if overlap_reduce or overlap_gather else inline
    if overlap_reduce == overlap_gather:
        return thread, thread
    # One of the two doesn't overlap, but it must still wait for what the thread has not finished.
    waiting = _WaitingLane(thread)
    return (thread, waiting) if overlap_reduce else (waiting, thread)


class _WaitingLane:
    """Submits to another lane and waits at once."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    def submit(self, work: Work) -> Callable[[], None]:
        self.lane.submit(work)()
        return _nothing


def _without_grad(work: Work) -> None:
    with torch.no_grad():
        work()


def _nothing() -> None:
    pass
