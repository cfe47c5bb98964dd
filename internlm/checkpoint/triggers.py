"""What asks a running job for a checkpoint from outside: signals and the stop file."""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from internlm.utils.errors import writing
from internlm.utils.logger import get_logger, log_once

logger = get_logger(__name__)

_LARGEST = 2**63 - 1  # the ranks agree on it as int64


class Signals:
    """SIGTERM: save and stop. SIGUSR1: save and go on. A handler sets a flag and does nothing else."""

    def __init__(self) -> None:
        self._save = self._stop = False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python can't install handlers
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        self._stop = self._stop or number == signal.SIGTERM

    def take(self) -> tuple[bool, bool]:
        """(save, stop): whether a signal has asked for it since the last call; a stop stays asked for."""
        asked = self._save, self._stop
        self._save = False
        return asked

    def close(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class StopFile:
    """One integer N, read after every step: N > 0: at step N save and stop; N < 0: at step -N save and go on."""

    def __init__(self, path: str | None) -> None:
        """Creates the file with 0, whatever was in it. None: there is none, or another rank looks at it.

        Raises:
            UserError: the file can't be written.
        """
        self.path = Path(path) if path else None
        self._reached: int | None = None  # the last N whose step has come
        if self.path is None:
            return
        with writing(f"ckpt.stop_file_path = {path!r}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("0")

    def read(self, step: int) -> int:
        """N, or 0 where there is nothing to do now or later."""
        if self.path is None:
            return 0
        try:
            number = int(self.path.read_text())
            if abs(number) > _LARGEST:
                raise ValueError(f"{number} is beyond 64 bits")
        except (OSError, ValueError) as error:
            log_once(
                logger, f"ckpt.stop_file_path {self.path} holds no integer ({error}): ignored", level=logging.WARNING
            )
            return 0
        if step == abs(number):
            self._reached = number
        if number == 0 or number == self._reached:
            return number
        todo = "stop" if number > 0 else "save"
        if step < abs(number):
            log_once(logger, f"{self.path}: training will {todo} at step {abs(number)}")
        else:
            message = f"{self.path}: training can't {todo} at step {abs(number)}, which is past: name a later one"
            log_once(logger, message, level=logging.WARNING)
        return number


def new_token() -> str:
    """A name for one save that no other save has."""
    return os.urandom(6).hex()
