"""The error that says: the user can mend this."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave. The message names the key, file or line, the value, the reason and the fix.

    `train.py` and the tools print it without a traceback and exit with code 2.
    """


def exit_code(run: Callable[[], object]) -> int:
    """Run a tool: 0, or 2 with the message of a UserError on stderr; any other error keeps its traceback."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
