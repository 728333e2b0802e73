"""The one error that a user's input can cause. The command line prints it as one line and exits
with 2.
"""


class VerifyError(ValueError):
    """Bad input: the message names the value, what is wrong with it and what would be right."""


class RecordsError(VerifyError):
    """Records cannot be written: whoever runs must stop, or what is measured then is lost."""
