"""What can be wrong with a file."""

from collections.abc import Iterator
from contextlib import contextmanager

from btc_jax._errors import Remedied


class BTCFormatError(ValueError):
    """A file is not a compressed checkpoint that this version can read."""


class BTCNotCompressedError(Remedied, BTCFormatError):
    """A file is something else than a compressed checkpoint."""

    def __init__(self, problem: str, remedy: str = "btc_jax.save and btc_jax.compress_file write one"):
        super().__init__(problem, remedy)


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
