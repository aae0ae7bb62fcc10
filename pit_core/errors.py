"""The one exception that users are meant to read."""


class PitError(Exception):
    """A user-facing error: one plain sentence that says what was expected, what came, and what to do.

    The command line prints the message and exits with code 2; nodes show it as the node's error.
    """
