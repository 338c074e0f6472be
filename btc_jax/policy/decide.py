"""The decision about each leaf: by the first rule that matches it, else by the default."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp

from btc_jax._typing import Order
from btc_jax.codecs import Codec, Multilevel, Uniform
from btc_jax.leafspec import LeafSpec
from btc_jax.pieces import Cut, cut_of
from btc_jax.policy.kinds import collection_of, kind_of, normalized_by_linen, order_of, split_path
from btc_jax.policy.rules import BTCPolicyError, NotFloatingError, Rule, check_order, first_matches, is_number
from btc_jax.policy.stacks import stacks
from btc_jax.policy.training import by_path
from btc_jax.sizes import nbytes_of_one_width

NOT_SMALLER = "would not become smaller"
_RECORD = 64
"""Bytes that a file may need more for the record of a packed leaf than of a dense one: its error, and the length of its
codes."""
_DTYPES = {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a policy decides about one leaf.

    Attributes:
        path: the leaf.
        codec: its codec, or `None` for a dense leaf.
        order: the layout: how its weights run through the blocks.
        reason: why it is packed, or is not.
        allow_transform: the allocator may switch to the layout with transformed taps if that lowers the cost.
        weight: how much its squared error counts.
        stack: how many matrices of one shape it holds, such as layers stacked for a scan.
        cut: how it is cut into pieces, each packed by itself; `None` for a leaf that is whole.
        tied_to: path of an earlier leaf that is the same array, and is packed or kept for both; or empty.
    """

    path: str
    codec: Codec | None
    order: Order
    reason: str
    allow_transform: bool = False
    weight: float = 1.0
    stack: int = 1
    cut: Cut | None = None
    tied_to: str = ""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Chooses the leaves to quantize: by the first rule whose pattern matches, else by the default.

    The default packs floating leaves of 2 axes or more that become smaller by it, except those whose path tells that
    they are not weight matrices: biases, scales and other parameters of norms, statistics, position and rotary tables,
    class and mask tokens, LoRA adapters, and collections of state such as `batch_stats`. It also leaves dense what
    belongs to training (optimizer states, moving averages, gradients), and what Linen's `WeightNorm` and `SpectralNorm`
    normalize, since these cannot read packed leaves. A rule overrides all of that. Leaves without elements, and those
    that are not floating, always stay dense.

    Args:
        codec: the codec of leaves packed by default. `None` is the one that the call implies: `Multilevel()` with a
            target such as `bits=4.5`, and `Uniform()` without.
        rules: the first that matches a leaf decides.
        names: globs of names: the default then packs only leaves with these names, whatever else the names suggest;
            `("*",)` is any. A name is the last key of a path; if that has dots, also what follows the last dot.
        min_axes: fewest axes that the default packs.
        min_size: fewest weights that the default packs; `None` for as few as make a leaf smaller, including its header
            and its record in a file.
        order: the layout of leaves whose rule names none; `None` is `"stored"` for embeddings and for leaves named
            `weight`, as in PyTorch and Equinox, and `"output-major"` for all others.

    Raises:
        BTCPolicyError: if an argument is of the wrong kind.

    Examples:
        >>> policy = Policy(Uniform(block_size=32), rules=(Rule("*/head/*", None),))
        >>> paths = ("net/body/kernel", "net/body/bias", "net/head/kernel")
        >>> leaves = [LeafSpec(path, (64, 64), jnp.dtype("float32")) for path in paths]
        >>> [(d.path, d.codec is None, d.reason) for d in policy.decide(leaves)]
        [('net/body/kernel', False, 'default'), ('net/body/bias', True, 'bias'), ('net/head/kernel', True, 'rule 1')]
    """

    codec: Codec | None = None
    rules: tuple[Rule, ...] = ()
    names: tuple[str, ...] | None = None
    min_axes: int = 2
    min_size: int | None = None
    order: Order | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rules, Rule):
            raise BTCPolicyError("rules is a single Rule; put it into a tuple: rules=(rule,)")
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.names is not None:
            object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names))
        if not isinstance(self.codec, Codec | None):
            raise BTCPolicyError(f"codec is {self.codec!r}; it must be a codec such as Uniform(), or None")
        if not all(isinstance(rule, Rule) for rule in self.rules):
            raise BTCPolicyError(f"rules are {self.rules!r}; each must be a Rule(pattern, codec)")
        if self.min_size is not None and not (is_number(self.min_size) and self.min_size >= 0):
            raise BTCPolicyError(f"min_size is {self.min_size!r}; it must be a number of 0 or more, or None")
        check_order(self.order)

    def decide(self, leaves: Sequence[LeafSpec]) -> list[Decision]:
        """One decision for each leaf, in their order. Without a codec, that of the policy is `Uniform()`.

        Raises:
            BTCPolicyError: if a rule decides about no leaf, or asks to quantize one that is not floating.
            ValueError: if a leaf cannot be cut as a rule or its sharding asks.
        """
        paths = [leaf.path for leaf in leaves]
        numbers = first_matches(self.rules, paths)
        rules = (Rule("*", order=self.order), *self.rules)
        rows = zip(leaves, numbers, _around(leaves, paths), stacks(paths, [leaf.shape for leaf in leaves]), strict=True)
        decisions = [
            _counted(self._decide(leaf, number, rules[number], why), leaf, stack) for leaf, number, why, stack in rows
        ]
        if idle := set(range(1, len(self.rules) + 1)) - set(numbers):
            raise BTCPolicyError(self._why_idle(min(idle), paths, numbers))
        return decisions

    def _decide(self, leaf: LeafSpec, number: int, rule: Rule, dense: str) -> Decision:
        """What a rule decides about a leaf; rule 0 is the default, and `dense` is why it leaves the leaf alone."""
        codec = (self.codec or implied_codec(False)) if rule.codec == "default" else rule.codec
        obstacle = leaf.note or _not_floating(leaf)
        if number and codec and obstacle and not leaf.note:
            raise NotFloatingError(
                f"rule {number} ({rule.pattern!r}) asks to quantize {leaf.path}, which is {_kind(leaf)}",
                f"narrow the pattern, or put Rule({leaf.path!r}, None) before it",
                leaf.path,
            )
        obstacle = obstacle or ("empty" if 0 in leaf.shape else "")
        if not number:
            obstacle = obstacle or dense or self._not_by_default(leaf, codec)
        reason = obstacle or (f"rule {number}" if number else "default")
        order: Order = rule.order or self.order or order_of(leaf.path)
        allow_transform = not (number and rule.order)
        codec = None if obstacle else codec
        cut = cut_of(leaf, _stack_axes(leaf, rule, number), rule.pieces) if codec else None
        return Decision(leaf.path, codec, order, reason, allow_transform, rule.weight, cut=cut)

    def _not_by_default(self, leaf: LeafSpec, codec: Codec | None) -> str:
        """Why the default leaves a floating leaf dense, or an empty string."""
        kind = kind_of(leaf.path) if self.names is None else "" if self._is_named(leaf) else "not in names"
        if why := collection_of(leaf.path) or kind:
            return why
        if len(leaf.shape) < self.min_axes:
            return f"fewer than {self.min_axes} axes"
        if self.min_size is not None:
            return "too small" if math.prod(leaf.shape) < self.min_size else ""
        return "" if codec is None or _becomes_smaller(leaf, codec) else NOT_SMALLER

    def _is_named(self, leaf: LeafSpec) -> bool:
        names = (leaf.name, split_path(leaf.path)[-1])
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.names or ())

    def _why_idle(self, number: int, paths: Sequence[str], numbers: Sequence[int]) -> str:
        rule = self.rules[number - 1]
        deciding = {path: first for path, first in zip(paths, numbers, strict=True) if rule.matches(path)}
        if not deciding:
            return f"rule {number} ({rule.pattern!r}) matches no leaf; {_nearest(rule, paths)}"
        names = " and ".join(f"rule {i} ({self.rules[i - 1].pattern!r})" for i in sorted(set(deciding.values())))
        return (
            f"rule {number} ({rule.pattern!r}) decides no leaf: the {len(deciding)} it matches, "
            f"{next(iter(deciding))} among them, are decided by {names} before it; put the narrower rule first, or "
            "drop one"
        )


def _around(leaves: Sequence[LeafSpec], paths: Sequence[str]) -> list[str]:
    """Why the other leaves or the containers exclude each leaf: it is part of the training, or normalized by Linen."""
    normalized = normalized_by_linen(paths)
    training = zip(by_path(paths), leaves, strict=True)
    return [found or leaf.training or ("normalized" if leaf.path in normalized else "") for found, leaf in training]


def _stack_axes(leaf: LeafSpec, rule: Rule, number: int) -> tuple[int, ...]:
    assert not isinstance(rule.stack, int)
    named = leaf.stacks if rule.stack is None else rule.stack
    axes = tuple(axis + len(leaf.shape) if axis < 0 else axis for axis in named)
    if len(set(axes)) < len(axes) or not all(0 <= axis < len(leaf.shape) for axis in axes):
        raise BTCPolicyError(
            f"rule {number} ({rule.pattern!r}) says that {leaf.path} is a stack along {named}, and its shape is "
            f"{list(leaf.shape)}; narrow the pattern, or name axes that it has"
        )
    return axes


def _counted(decision: Decision, leaf: LeafSpec, stack: int) -> Decision:
    """The decision with the number of its matrices: along the axes that a rule names, or guessed from names and
    shapes."""
    axes = decision.cut.stacks if decision.cut else ()
    return dataclasses.replace(decision, stack=math.prod(leaf.shape[axis] for axis in axes) if axes else stack)


def _becomes_smaller(leaf: LeafSpec, codec: Codec) -> bool:
    """Whether packing saves bytes: with all blocks at their widest, or at the default bits of a rate-controlled
    codec."""
    size, form = math.prod(leaf.shape), codec.formats[-1]
    usual = codec.default_bits if codec.rate_controlled else math.inf
    width = min((bits for bits in form.widths if bits >= usual), default=form.widths[-1])
    return nbytes_of_one_width(form, size, width) + _RECORD < size * leaf.dtype.itemsize


def implied_codec(target: bool) -> Codec:
    """The codec of a call that names none, with or without a target."""
    return Multilevel() if target else Uniform()


def _not_floating(leaf: LeafSpec) -> str:
    if leaf.dtype is None:
        return "not an array"
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return ""
    return _DTYPES.get(getattr(leaf.dtype, "kind", ""), str(leaf.dtype))


def _kind(leaf: LeafSpec) -> str:
    return "not an array" if leaf.dtype is None else f"{leaf.dtype}, not floating"


def _nearest(rule: Rule, paths: Sequence[str]) -> str:
    if not paths:
        return "the tree is empty"
    near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.3) or paths[:3]
    return f"there are {len(paths)} leaves, such as {', '.join(near)}"
