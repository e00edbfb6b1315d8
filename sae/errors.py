"""The one exception type for mistakes a user can mend."""


class InputError(ValueError):
    """Bad input: the message is one line saying what is wrong, what was expected and what to do.

    The command line prints the message and exits with code 2; nothing else in the project catches it.
    """
