"""What can be wrong with a file."""

from collections.abc import Iterator
from contextlib import contextmanager


class BTCFormatError(ValueError):
    """A file is not a compressed checkpoint that this version can read."""


class BTCIntegrityError(BTCFormatError):
    """A file is a compressed checkpoint, and its content was damaged."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever goes wrong while the claims of a file are looked at is a fault of the file."""
    try:
        yield
    except BTCFormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BTCFormatError(f"{what} is malformed ({type(error).__name__}: {str(error)[:200]})") from error
