"""Errors of the library in the words of the command line."""

import re
from functools import singledispatch

from btc_jax._errors import ArgumentError, ConflictingArgumentsError, LeafError
from btc_jax.checkpoint.errors import BTCNotCompressedError
from btc_jax.policy import NotFloatingError, NothingPackedError
from btc_jax.policy.decide import NOT_SMALLER
from btc_jax.stream.plan import CompressedSourceError

_OPTIONS = {"sqnr_db": "sqnr"}
"""Options that have another name than their argument."""


@singledispatch
def at_a_prompt(error: Exception) -> str:
    """What an error says to somebody who has commands and options, not functions and arguments."""
    return str(error)


def _option(argument: str) -> str:
    return f"--{_OPTIONS.get(argument, argument).replace('_', '-')}"


def _dense(path: str) -> str:
    """The option that leaves just this leaf dense, quoted for a shell."""
    pattern = f"re:{re.escape(path)}" if any(letter in path for letter in "*?[") else path
    return "--rule '" + pattern.replace("'", "'\"'\"'") + "=dense'"


@at_a_prompt.register
def _(error: KeyError) -> str:
    return str(error.args[0]) if error.args else ""


@at_a_prompt.register
def _(error: ArgumentError) -> str:
    return f"{_option(error.name)} {error.problem}"


@at_a_prompt.register
def _(error: ConflictingArgumentsError) -> str:
    return f"{' and '.join(f'{_option(name)} {value}' for name, value in error.given.items())} {error.problem}"


@at_a_prompt.register
def _(error: LeafError) -> str:
    return f"{error}; {_dense(error.path)} leaves it dense"


@at_a_prompt.register
def _(error: NotFloatingError) -> str:
    return f"{error.problem}; narrow the pattern, or put {_dense(error.path)} before it"


@at_a_prompt.register
def _(error: NothingPackedError) -> str:
    small, rule = (
        error.reason in ("too small", NOT_SMALLER),
        f"--rule '{error.pattern}=packed' packs such a leaf all the same",
    )
    way = "--min-size 0 packs small leaves as well" if small else rule if error.pattern else "name another file"
    return f"{error.problem}; {way}; `btc plan` shows each reason"


@at_a_prompt.register
def _(error: BTCNotCompressedError) -> str:
    return f"{error.problem}; `btc quantize` makes one"


@at_a_prompt.register
def _(error: CompressedSourceError) -> str:
    return f"{error.problem}; `btc dequantize` makes it dense again"
