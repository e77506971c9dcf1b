"""The one exception that means "the input is wrong, and here is how to mend it"."""


class InputError(ValueError):
    """Bad input: a message of one line that says what is wrong, which file or argument, and how to mend it.

    The command line prints it after `error: ` without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker's exception comes back as this class with the worker's whole traceback as its message.
        if message.startswith("Caught "):
            message = message.rstrip().splitlines()[-1].removeprefix("seg_attn.errors.InputError: ")
        super().__init__(message)
