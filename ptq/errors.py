"""The errors a user can meet. The command prints the message as one line and leaves with `exit_code`."""


class PtqError(Exception):
    """Base class. The message is one line: what, where, how to mend."""

    exit_code = 2


class BadInput(PtqError):
    """A file, a name, an option or a number that cannot be used as given."""

    exit_code = 2


class UnsupportedModel(PtqError):
    """A model whose structure no architecture spec describes."""

    exit_code = 3


class NumericalFailure(PtqError):
    """A result that is not a finite number, or a matrix that could not be factorised."""

    exit_code = 4


class LostProcess(PtqError):
    """Another process of a distributed run is gone; this one can only be resumed, as after an interruption."""

    exit_code = 130
