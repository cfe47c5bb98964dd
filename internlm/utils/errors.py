"""The error for mistakes that the user can fix, and helpers that raise, collect and print it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave. The message names the key, file or line, the value, the reason and the fix.

    `train.py` and the tools print it without a traceback and exit with code 2.
    """


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """A user's mistake, or a file that can't be read, ends the body of the `with` and becomes one of `problems`."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename}: can't be read ({error.strerror or error})")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns an OSError while writing `what` (a full disk, a missing permission) into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} can't be written: {error}") from error


def exit_code(run: Callable[[], object]) -> int:
    """Runs a tool. The exit code: 0, or 2 with the message on stderr for a UserError or a file that can't be used.

    Ctrl-C is 130. Any other error keeps its traceback.
    """
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0
