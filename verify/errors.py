"""The one error that a user's input can cause. The command line prints it as one line and exits
with 2.
"""


class VerifyError(ValueError):
    """Bad input: the message names the value, what is wrong with it and what would be right."""
