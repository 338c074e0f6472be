"""Trees that cannot be quantized, and what to do instead."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from btc_jax._mesh import refuse_staging, staging
from btc_jax.coding import has_one_width
from btc_jax.policy import Decision, NothingPackedError
from btc_jax.policy.decide import NOT_SMALLER
from btc_jax.policy.kinds import split_path
from btc_jax.policy.training import REASONS
from btc_jax.tensor import is_packed

_WEIGHTS = ("too small", NOT_SMALLER, "not in names", *REASONS)
_UNALTERABLE = ("bool", "integer", "complex", "empty", "not an array", "already quantized")


def refuse_mixed_widths_under_jit(leaves: Sequence[Any], decisions: Sequence[Decision]) -> None:
    """Refuse leaves without values, and traced ones unless all their blocks have one width."""
    traced = staging() or any(isinstance(leaf, Tracer) for leaf in leaves)
    if not (traced and all(has_one_width(how.codec) for how in decisions if how.codec)):
        refuse_without_values(leaves, decisions)


def refuse_without_values(leaves: Sequence[Any], decisions: Sequence[Decision]) -> None:
    for leaf, decision in zip(leaves, decisions, strict=True):
        if decision.codec is None:
            continue
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{decision.path} is traced by jax.jit, grad or vmap. btc_quantize reads the widths of the blocks "
                "on the host: call it outside, use btc_reconstruct inside, or a codec of one width: Multilevel(width=4)"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{decision.path} is a ShapeDtypeStruct, without values; btc_plan works on such trees, and so does "
                "jax.eval_shape(lambda p: btc_quantize(p, Multilevel(width=4)), tree) with a codec of one width"
            )
    refuse_staging(next((how.path for how in decisions if how.codec is not None), "the tree"))


def refuse_nothing_to_do(leaves: Sequence[Any], decisions: Sequence[Decision]) -> None:
    if not leaves:
        raise ValueError(
            "the tree is empty; pass the model's parameters, such as variables['params'] or nnx.state(model)"
        )
    if any(decision.codec is not None for decision in decisions) or any(map(is_packed, leaves)):
        return
    reasons = Counter(decision.reason for decision in decisions)
    listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
    largest = max(zip(leaves, decisions, strict=True), key=lambda pair: _promise(*pair))[1]
    raise NothingPackedError(
        f"no leaf is packed: all {len(leaves)} stay dense ({listed}; {largest.path!r} for one)",
        f"{_remedy(largest)}; btc_plan shows each reason",
        largest.reason,
        _pattern(largest),
    )


def _promise(leaf: Any, how: Decision) -> tuple[int, int]:
    """Ranks the leaf first that was most likely meant to be packed."""
    rank = 0 if how.reason in _UNALTERABLE else 2 if how.reason in _WEIGHTS else 1
    return rank, math.prod(getattr(leaf, "shape", ()))


def _remedy(how: Decision) -> str:
    if how.reason in _UNALTERABLE:
        return "none of them holds floating weights: pass the parameters of a model"
    if how.reason in REASONS:
        first = how.path[: len(split_path(how.path)[0])]
        return (
            f"if these are the weights to pack, pass what is under {first!r} as a tree of its own, or add "
            f"Rule({_pattern(how)!r})"
        )
    if how.reason in ("too small", NOT_SMALLER):
        return "Policy(min_size=0) packs small leaves as well"
    if how.reason == "not in names":
        return "Policy(names=None) packs all weight matrices, whatever their names"
    return f"Rule({how.path!r}) in a policy packs such a leaf all the same"


def _pattern(how: Decision) -> str:
    """Of a rule that packs the leaf, and those like it if it is one of many; empty if no rule can."""
    if how.reason in _UNALTERABLE:
        return ""
    first, last = how.path[: len(split_path(how.path)[0])], split_path(how.path)[-1]
    return f"{first}*{last}" if how.reason in REASONS else how.path


def refuse_beside_like(codec: Any, policy: Any, goal: Mapping[str, Any], room: float) -> None:
    given = {"codec": codec, "policy": policy, "room": room or None, **goal}
    if other := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"like and {other[0]} are given; like says how each leaf is packed: leave out {other[0]}")


def refuse_other_paths(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    if odd := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"the trees differ: {odd[0]!r} is in only one of them ({len(odd)} such leaves in total)")


def refuse_other_trees(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse swapped trees, whose figures would look like no error at all."""
    packed = {path for path, leaf in after.items() if is_packed(leaf)}
    originally = {path for path, leaf in before.items() if is_packed(leaf)}
    if lost := sorted(originally - packed):
        raise ValueError(
            f"{lost[0]} is packed in the first tree and dense in the second; give the original tree first: "
            "btc_metrics(params, quantized)"
        )
    if not packed - originally:
        what = "both trees are packed" if packed else "no leaf of the second tree is packed"
        raise ValueError(
            f"{what}, so there is nothing to measure; give the tree before btc_quantize first, then its result: "
            "btc_metrics(params, quantized)"
        )
