"""The one exception that a command turns into a sentence and exit code 2."""


class UserError(Exception):
    """Something the user can mend; the message names the thing and the mend in one sentence."""
