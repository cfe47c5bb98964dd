"""Log lines with the rank in front, filtered by rank in one place.

Code logs as if it were alone: INFO appears once (from rank 0), WARNING and above from every rank that has one.
"""

import logging
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

ROOT = "internlm"
MOST_EARLY = 1000  # lines; a tool has no file and logs for as long as it lives

_seen: set[tuple[str, int, str]] = set()


def get_logger(name: str) -> logging.Logger:
    """The logger `name` below "internlm"; `get_logger(__name__)` in a module, any short name in a script."""
    if name == ROOT or name.startswith(ROOT + "."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT}.{name.strip('_')}")


def log_once(logger: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Log `message` unless this process has logged it before at that level. For what all ranks have to say alike, or
    rank 0 alone: it alone writes."""
    key = (logger.name, level, message)
    if key not in _seen:
        _seen.add(key)
        logger.log(level, message, stacklevel=2, extra={"common": True})


def common_warning(logger: logging.Logger, message: str) -> None:
    """A warning that every rank raises alike, such as a skipped step: rank 0 alone writes it."""
    logger.warning(message, stacklevel=2, extra={"common": True})


class _StdoutHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stdout` is at that moment: a live progress display replaces it while it is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        # Lines with `extra={"file_only": True}` are shown on the terminal in another form.
        self.addFilter(lambda record: not getattr(record, "file_only", False))

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream follows sys.stdout")


class _FileHandler(logging.FileHandler):
    """Opened at the first line, so that ranks without warnings never touch the (often shared) file.

    A full disk is reported once, not by a traceback for every line; the terminal still shows every line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8", delay=True)
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"{self.baseFilename} can't be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Early(logging.Handler):
    """Keeps the lines that come before the file is known."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=MOST_EARLY)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def setup_logging(rank: int, world_size: int, log_file: Path | None = None) -> None:
    """Send the lines of all "internlm" loggers to stdout and, when given, to `log_file` (appended, folder created).

    Rank 0 writes INFO and above, the others WARNING and above. Calling again replaces the earlier set-up; what was
    logged under one without a file goes to the file first.
    """
    logger = logging.getLogger(ROOT)
    early = [record for handler in logger.handlers if isinstance(handler, _Early) for record in handler.records]
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(
        f"%(asctime)s [rank {rank}/{world_size}] %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    handlers: list[logging.Handler] = [_StdoutHandler()]
    if log_file is None:
        handlers.append(_Early())
    else:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_FileHandler(log_file))
        handlers[-1].setFormatter(formatter)
        for record in early:
            handlers[-1].handle(record)
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        if rank != 0:
            handler.addFilter(lambda record: not getattr(record, "common", False))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
