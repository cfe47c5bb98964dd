"""The error that says: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the key, file or line, the value, the reason and the fix.

    `train.py` and the tools print it without a traceback and exit with code 2.
    """
