"""What can be wrong with a file, and what saving warns of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from btc_jax.formats import UnknownFormatError


class BTCFormatError(ValueError):
    """A file is not a compressed checkpoint that this version can read."""


class BTCNotCompressedError(BTCFormatError):
    """A file is something else than a compressed checkpoint.

    Attributes:
        problem: what it is.
        remedy: what writes a compressed one.
    """

    problem: str
    remedy: str

    def __init__(self, problem: str, remedy: str = "btc_jax.save and btc_jax.quantize_file write one"):
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


class BTCIntegrityError(BTCFormatError):
    """A file is a compressed checkpoint, and its content was damaged."""


class BTCUnknownFormatError(BTCFormatError):
    """A leaf matches its checksum, but its format is not registered here.

    Attributes:
        format: the id of the format; see `btc_jax.formats.register_format`.
    """

    def __init__(self, message: str, form: Any):
        super().__init__(message)
        self.format = form


class BTCTreeWarning(UserWarning):
    """Something in a saved tree will be restored as something else, unless `load` is given a template (`like`)."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns any error while the claims of a file are checked into an error about the file."""
    try:
        yield
    except BTCFormatError:
        raise
    except UnknownFormatError as error:
        raise BTCUnknownFormatError(f"{what}: {error}", error.id) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BTCFormatError(f"{what} is malformed ({type(error).__name__}: {str(error)[:200]})") from error
