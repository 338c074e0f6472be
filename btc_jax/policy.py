"""Which leaf is quantized, with which codec and in which order; and if not, why not. Values are never looked at."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from btc_jax._errors import Remedied
from btc_jax._typing import Order
from btc_jax.blocks import ORDERS
from btc_jax.codecs import Codec, Uniform

_STATE_COLLECTIONS = ("batch_stats", "cache", "intermediates")
"""Collections of a Linen variables dict that are state, not weights."""

_KINDS = {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}


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
    """A policy leaves all leaves dense."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the leaves whose path matches a pattern.

    Args:
        pattern: a glob over the whole path, in which `*` also spans `/` (`"encoder/*/kernel"`); or, after `re:`, a
            regular expression that must match the whole path (`"re:layer_[0-3]/kernel"`).
        codec: how matching leaves are coded; `None` leaves them dense.
        order: how their weights run through the blocks, just so; `None` leaves it to the policy.
        weight: how much the squared error of matching leaves counts, where bits are shared out for a target.

    Raises:
        BTCPolicyError: the regular expression is malformed, or an argument is of the wrong kind.
    """

    pattern: str
    codec: Codec | None
    order: Order | None = None
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise BTCPolicyError(f"pattern is {self.pattern!r}; it must be a string, such as '*/kernel'")
        if not isinstance(self.codec, Codec | None):
            raise BTCPolicyError(f"rule {self.pattern!r}: codec is {self.codec!r}; it can be a codec or None")
        _check_order(self.order)
        if not (_is_number(self.weight) and 0 < self.weight < math.inf):
            raise BTCPolicyError(f"rule {self.pattern!r}: weight is {self.weight!r}; it must be a positive number")
        try:
            self.matches("")
        except re.error as error:
            raise BTCPolicyError(f"rule {self.pattern!r} is no regular expression: {error}") from error

    def matches(self, path: str) -> bool:
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], path) is not None
        return fnmatchcase(path, self.pattern)


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What a policy knows of a leaf.

    Attributes:
        path: the keys of the leaf joined by `/`.
        shape: its shape.
        dtype: its dtype; `None` for what is no array.
        note: why the leaf cannot be quantized whatever the policy says, or empty.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    note: str = ""

    @property
    def name(self) -> str:
        """The last key of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a policy says of one leaf.

    Attributes:
        path: the leaf.
        codec: its codec, or `None` for a dense leaf.
        order: how its weights run through the blocks.
        reason: why it is taken, or is not.
        free: the order may become the one that transforms the taps as well, where that pays.
        weight: how much its squared error counts.
    """

    path: str
    codec: Codec | None
    order: Order
    reason: str
    free: bool = False
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Policy:
    """Chooses the leaves to quantize: by the first rule whose pattern matches, else by the default.

    The default takes floating leaves that are named `kernel` or `embedding`, have 2 axes or more and 4096 weights or
    more, and are not in a state collection such as `batch_stats`. A rule overrides all of that.

    Args:
        codec: the codec of leaves taken by default.
        rules: looked through in order; the first that matches a leaf decides.
        names: globs for the names (last keys) that the default takes; `("*",)` takes any.
        min_axes: fewest axes that the default takes.
        min_size: fewest weights that the default takes.
        order: how the weights run through the blocks, where the rule does not say; `None` is `"stored"` for leaves
            named `embedding`, `"output-major"` for all others.
        taps: where bits are shared out for a target, an order may become the one that transforms the taps of a
            convolution as well, if that pays.
        balance: where bits are shared out for a target, the squared error of a leaf counts `rms ** -balance`: 0 for the
            least total error, 2 for the least error of each leaf relative to its weights.

    Example:
        >>> policy = Policy(Uniform(block_size=32), rules=(Rule("*/head/*", None),))
        >>> leaves = [LeafSpec(f"{p}/kernel", (64, 64), np.dtype("float32")) for p in ("net/body", "net/head")]
        >>> [(d.path, d.codec is None, d.reason) for d in policy.decide(leaves)]
        [('net/body/kernel', False, 'default'), ('net/head/kernel', True, 'rule 1')]
    """

    codec: Codec = dataclasses.field(default_factory=Uniform)
    rules: tuple[Rule, ...] = ()
    names: tuple[str, ...] = ("kernel", "embedding")
    min_axes: int = 2
    min_size: int = 4096
    order: Order | None = None
    taps: bool = True
    balance: float = 0.0

    def __post_init__(self):
        if isinstance(self.rules, Rule):
            raise BTCPolicyError("rules is a single Rule; put it into a tuple: rules=(rule,)")
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names))
        if not isinstance(self.codec, Codec):
            raise BTCPolicyError(f"codec is {self.codec!r}; it must be a codec such as Uniform()")
        if not all(isinstance(rule, Rule) for rule in self.rules):
            raise BTCPolicyError(f"rules are {self.rules!r}; each must be a Rule(pattern, codec)")
        if not (_is_number(self.balance) and 0 <= self.balance <= 2):
            raise BTCPolicyError(f"balance is {self.balance!r}; it must be a number from 0 to 2")
        _check_order(self.order)

    def decide(self, leaves: Sequence[LeafSpec]) -> list[Decision]:
        """One decision a leaf, in their order.

        Raises:
            BTCPolicyError: a rule decides no leaf, or asks to quantize what is not floating.
        """
        decisions = [self._decide(leaf) for leaf in leaves]
        for number, rule in enumerate(self.rules, 1):
            matching = [leaf.path for leaf in leaves if rule.matches(leaf.path)]
            if not matching:
                raise BTCPolicyError(f"rule {number} ({rule.pattern!r}) matches no leaf; {_nearest(rule, leaves)}")
            if not any(self._first_match(path) == number for path in matching):
                raise BTCPolicyError(self._conflict(number, matching))
        return decisions

    def _decide(self, leaf: LeafSpec) -> Decision:
        number = self._first_match(leaf.path)
        rule = self.rules[number - 1] if number else Rule("*", self.codec, self.order)
        obstacle = leaf.note or _not_floating(leaf)
        if number and rule.codec and obstacle and not leaf.note:
            raise NotFloatingError(
                f"rule {number} ({rule.pattern!r}) asks to quantize {leaf.path}, which is {_kind(leaf)}",
                f"narrow the pattern, or put Rule({leaf.path!r}, None) before it",
                leaf.path,
            )
        if not number:
            obstacle = obstacle or self._not_by_default(leaf)
        order: Order = rule.order or self.order or ("stored" if leaf.name == "embedding" else "output-major")
        reason = obstacle or (f"rule {number}" if number else "default")
        free = self.taps and not (number and rule.order)
        return Decision(leaf.path, None if obstacle else rule.codec, order, reason, free, rule.weight)

    def _first_match(self, path: str) -> int:
        """Number of the rule that decides a path, from 1; 0 is the default."""
        return next((number for number, rule in enumerate(self.rules, 1) if rule.matches(path)), 0)

    def _not_by_default(self, leaf: LeafSpec) -> str:
        """Why the default leaves a floating leaf dense, or an empty string."""
        collection = leaf.path.split("/", 1)[0]
        if collection in _STATE_COLLECTIONS:
            return collection
        if not any(fnmatchcase(leaf.name, name) for name in self.names):
            return "unnamed" if leaf.name.isdigit() else leaf.name or "unnamed"
        if len(leaf.shape) < self.min_axes:
            return f"fewer than {self.min_axes} axes"
        return "too small" if np.prod(leaf.shape, dtype=np.int64) < self.min_size else ""

    def _conflict(self, number: int, matching: Sequence[str]) -> str:
        earlier = sorted({self._first_match(path) for path in matching})
        names = " and ".join(f"rule {i} ({self.rules[i - 1].pattern!r})" for i in earlier)
        return (
            f"rule {number} ({self.rules[number - 1].pattern!r}) decides no leaf: the {len(matching)} it matches, "
            f"{matching[0]} among them, are decided by {names} before it; put the narrower rule first, or drop one"
        )


def _not_floating(leaf: LeafSpec) -> str:
    if leaf.dtype is None:
        return "not an array"
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return ""
    return _KINDS.get(getattr(leaf.dtype, "kind", ""), str(leaf.dtype))


def _kind(leaf: LeafSpec) -> str:
    return "not an array" if leaf.dtype is None else f"{leaf.dtype}, not floating"


def _nearest(rule: Rule, leaves: Sequence[LeafSpec]) -> str:
    paths = [leaf.path for leaf in leaves]
    if not paths:
        return "the tree is empty"
    near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.3) or paths[:3]
    return f"there are {len(paths)} leaves, such as {', '.join(near)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_order(order: str | None) -> None:
    if order is not None and order not in ORDERS:
        raise BTCPolicyError(f"order is {order!r}; it can be None, {', '.join(map(repr, ORDERS))}")
