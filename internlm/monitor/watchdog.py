"""Says that a run is stuck, and where: a collective that one rank never joins shows no other sign for half an hour."""

import sys
import threading
import time
import traceback
from collections.abc import Callable

from internlm.utils.logger import get_logger

logger = get_logger(__name__)


class Watchdog:
    """Warns from a thread of its own when no step has ended for `seconds`, once for each such stretch of time.

    Every rank has one, and logs the stack of its main thread: where they differ is where to look.

    Args:
        tell: called with a message for people (the text of 2023), on the rank that speaks for all.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self.seconds, self._tell = seconds, tell
        self._due = time.monotonic() + seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def step_ended(self) -> None:
        self._due = time.monotonic() + self.seconds

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, self._due - time.monotonic())):
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + self.seconds
                text = f"no step has ended for {self.seconds:g} s (monitor.stuck_after); this rank is at"
                logger.warning(f"{text}\n{_stack()}")
                self._tell("Training may be in stuck status, please check it.")


def _stack() -> str:
    """Where the main thread is."""
    identity = threading.main_thread().ident
    frame = sys._current_frames().get(identity) if identity is not None else None
    return "".join(traceback.format_stack(frame))
