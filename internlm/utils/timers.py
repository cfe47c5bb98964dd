"""Clocks for the host and for work queued on a device."""

import time
from types import TracebackType

import torch


class Timer:
    """Host stopwatch, running from its creation; also a context manager that stops at its end.

    with Timer() as timer:
        work()
    print(timer.seconds)
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stop: float | None = None

    @property
    def seconds(self) -> float:
        """Time since the start (or the last lap), until now or until the context ended."""
        return (time.perf_counter() if self._stop is None else self._stop) - self._start

    def lap(self) -> float:
        """Seconds since the start or the last lap; the next one begins now."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    def __enter__(self) -> "Timer":
        self._start, self._stop = time.perf_counter(), None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop = time.perf_counter()


class DeviceTimer:
    """Times work between `start()` and `stop()` on the device's own clock, without waiting for it.

    `seconds` is read after the caller has synchronised for a reason of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._begin = self._end = 0.0

    def start(self) -> None:
        self._begin = time.perf_counter()
        if self._events is not None:
            self._events[0].record()

    def stop(self) -> None:
        self._end = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._end - self._begin
