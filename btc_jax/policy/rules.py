"""A rule of a policy, and the first of many rules that matches a path."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from fnmatch import translate
from numbers import Integral, Real
from typing import Any, Literal

from btc_jax._errors import Remedied
from btc_jax._typing import Order
from btc_jax.blocks import ORDERS
from btc_jax.codecs import Codec


class BTCPolicyError(ValueError):
    """A policy does not fit the tree it is applied to."""


class NotFloatingError(Remedied, BTCPolicyError):
    """A rule asks to quantize a leaf that is not floating.

    Attributes:
        path: the leaf.
    """

    def __init__(self, problem: str, remedy: str, path: str = ""):
        super().__init__(problem, remedy)
        self.path = path


class NothingPackedError(Remedied, BTCPolicyError):
    """A policy leaves all leaves dense.

    Attributes:
        reason: why the leaf that was most likely meant to be packed is not.
        pattern: that of a rule which packs it and leaves like it.
    """

    reason: str
    pattern: str

    def __init__(self, problem: str, remedy: str, reason: str = "", pattern: str = ""):
        super().__init__(problem, remedy)
        self.reason, self.pattern = reason, pattern


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the leaves whose path matches a pattern.

    Args:
        pattern: a glob over the whole path, in which `*` also spans `/` (`"encoder/*/kernel"`); or, after `re:`, a
            regular expression that must match the whole path (`"re:layer_[0-3]/kernel"`).
        codec: how matching leaves are coded; `None` leaves them dense. `"default"` is the codec of the policy, so a
            rule that only sets an order or a weight, or packs what the default leaves dense, need not name one.
        order: layout of matching leaves; fixed, so the allocator will not change it. `None` leaves it to the policy.
        weight: factor of the squared error of matching leaves when bits are allocated for a target.
        stack: axes along which matching leaves are stacks of matrices, such as layers for a scan, in the order in which
            they are mapped over. Each matrix is packed by itself, and the packed leaf can be scanned as the dense one.
            `None` for those that its box names `layers` or `experts`, if it is in a box.
        pieces: numbers of pieces along the axes of matching leaves, each packed by itself, so that the packed leaf can
            be sharded so. `None` for as many as the leaf has shards.

    Raises:
        BTCPolicyError: if the regular expression is malformed, or an argument is of the wrong kind.

    Examples:
        >>> Rule("*/head/*", None), Rule("*/router/*", weight=10.0).codec
        (Rule(pattern='*/head/*', codec=None, order=None, weight=1.0, stack=None, pieces=None), 'default')
    """

    pattern: str
    codec: Codec | Literal["default"] | None = "default"
    order: Order | None = None
    weight: float = 1.0
    stack: int | tuple[int, ...] | None = None
    pieces: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise BTCPolicyError(f"pattern is {self.pattern!r}; it must be a string, such as '*/kernel'")
        if not (isinstance(self.codec, Codec | None) or self.codec == "default"):
            raise BTCPolicyError(
                f"rule {self.pattern!r}: codec is {self.codec!r}; it can be a codec, 'default' or None"
            )
        check_order(self.order)
        axes: Any = (self.stack,) if is_whole(self.stack) else self.stack
        fits = axes is None or (isinstance(axes, list | tuple) and all(map(is_whole, axes)))
        if not fits or len(set(axes or ())) < len(axes or ()):
            raise BTCPolicyError(
                f"rule {self.pattern!r}: stack is {self.stack!r}; it is an axis, or a tuple of several"
            )
        object.__setattr__(self, "stack", None if axes is None else tuple(axes))
        pieces = None if self.pieces is None else tuple(self.pieces) if isinstance(self.pieces, list | tuple) else (0,)
        if pieces and not all(is_whole(count) and count > 0 for count in pieces):
            raise BTCPolicyError(
                f"rule {self.pattern!r}: pieces is {self.pieces!r}; it is a tuple of numbers of 1 or more, or None"
            )
        object.__setattr__(self, "pieces", pieces)
        if not (is_number(self.weight) and 0 < self.weight < math.inf):
            raise BTCPolicyError(f"rule {self.pattern!r}: weight is {self.weight!r}; it must be a positive number")
        try:
            self.matches("")
        except re.error as error:
            raise BTCPolicyError(f"rule {self.pattern!r} is not a regular expression: {error}") from error

    def matches(self, path: str) -> bool:
        """Whether the rule is about a leaf.

        Examples:
            >>> Rule("*/kernel").matches("encoder/layer_0/kernel"), Rule("kernel").matches("head/kernel")
            (True, False)
        """
        return path == self._literal if self._literal is not None else self._regex(path) is not None

    @functools.cached_property
    def _literal(self) -> str | None:
        """The only path that matches, where there is just one. Thousands of such rules are compared at once."""
        if not self.pattern.startswith("re:"):
            return None if re.search(r"[*?[]", self.pattern) else self.pattern
        plain = re.sub(r"\\(\W)", r"\1", self.pattern[3:])
        return plain if re.escape(plain) == self.pattern[3:] else None

    @functools.cached_property
    def _regex(self) -> Callable[[str], Any]:
        pattern = self.pattern
        return re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern)).fullmatch


def first_matches(rules: Sequence[Rule], paths: Sequence[str]) -> list[int]:
    """For each path the number of the first rule that matches it, from 1; 0 where none does.

    Examples:
        >>> first_matches([Rule("a/*"), Rule("*/kernel")], ["a/kernel", "b/kernel", "b/bias"])
        [1, 2, 0]
    """
    literal, others = {}, []
    for number, rule in enumerate(rules, 1):
        if rule._literal is None:
            others.append((number, rule))
        else:
            literal.setdefault(rule._literal, number)
    return [_first(path, literal.get(path, 0), others) for path in paths]


def _first(path: str, exact: int, others: Sequence[tuple[int, Rule]]) -> int:
    for number, rule in others:
        if exact and number > exact:
            break
        if rule.matches(path):
            return number
    return exact


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_order(order: str | None) -> None:
    if order is not None and order not in ORDERS:
        raise BTCPolicyError(f"order is {order!r}; it can be None, {', '.join(map(repr, ORDERS))}")
