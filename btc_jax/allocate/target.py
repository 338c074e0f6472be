"""The target of an allocation, in bits, bytes or error."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from btc_jax._errors import ArgumentError, ConflictingArgumentsError
from btc_jax.codecs import Codec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Target(NamedTuple):
    """A target: `bits` (effective, over the quantized leaves), `size` (bytes of the whole tree, dense leaves included),
    `rmse` (in units of the weights) or `sqnr_db`, over the quantized weights."""

    kind: Literal["bits", "size", "rmse", "sqnr_db"]
    value: float
    named: bool = True
    """Whether the user asked for it. If not, the nearest attainable value will do."""

    def refuse_fixed(self, codecs: Iterable[Codec]) -> None:
        """Raise if none of these codecs can change its widths for the target."""
        if not any(codec.rate_controlled for codec in codecs):
            raise ValueError(
                f"{self.kind}={self.value:g} is asked for, but no leaf has a codec that adapts to a target; use "
                "Multilevel(), or Uniform(threshold='auto')"
            )

    def refuse(self, low: float, high: float) -> NoReturn:
        """Raise: leaves and codecs attain only values from `low` to `high`."""
        form = ",.0f" if self.kind == "size" else ".4g"
        reach = f"these leaves and codecs reach from {low:{form}} to {high:{form}}"
        raise ArgumentError(self.kind, f"of {self.value:{form}} cannot be reached: {reach}")


def target_of(**targets: Any) -> Target | None:
    """The one target that is given, or `None`.

    Raises:
        ValueError: if several are given, or one is not a positive number.

    Examples:
        >>> target_of(bits=None, size="25MB")
        Target(kind='size', value=25000000.0, named=True)
    """
    given = {kind: value for kind, value in targets.items() if value is not None}
    if len(given) > 1:
        raise ConflictingArgumentsError(given, "are given; one target decides the others: give one")
    for kind, value in given.items():
        number = nbytes_of(value) if kind == "size" else _number(kind, value)
        if not 0 < number < math.inf:
            raise ArgumentError(kind, f"is {value!r}; it must be a positive number")
        return Target(kind, number)  # pyright: ignore[reportArgumentType]
    return None


def default_target(codecs: Sequence[Codec]) -> Target:
    """The default target of leaves with these rate-controlled codecs."""
    return Target("bits", max(codec.default_bits for codec in codecs), named=False)


def nbytes_of(size: Any, name: str = "size") -> float:
    """Bytes in a size such as `"25MB"`, `"1.5 GiB"` or a number, which is the argument `name`.

    Raises:
        ValueError: if it is not a size of 1 byte or more.

    Examples:
        >>> nbytes_of("1.5KiB")
        1536.0
    """
    match = re.fullmatch(r"(\d{1,15}\.?\d{0,6}) ?([A-Za-z]*)", size, re.ASCII) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper(), 0) if match else 0
    number = float(match[1]) * unit if match else _number(name, size) if not isinstance(size, str) else 0.0
    if not number >= 1:
        raise ArgumentError(name, f"is {size!r}; it must be 1 byte or more, such as '500MB', '2GiB' or 1000000")
    return number


def _number(kind: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentError(kind, f"is {value!r}; it must be a number") from None
