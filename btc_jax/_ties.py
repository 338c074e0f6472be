"""One array at two paths of a tree, such as an embedding that is also the output layer: packed once, counted once."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from btc_jax.policy import Decision
from btc_jax.tensor import is_packed

T = TypeVar("T")


def tie(leaves: Sequence[Any], decisions: Sequence[Decision]) -> list[Decision]:
    """Make leaves that are one object, and are coded alike, follow the first of them.

    If the policy distinguishes them, as by a rule that leaves one dense or names another order, they stay separate. The
    larger of their weights counts.
    """
    alike: dict[Any, list[Decision]] = defaultdict(list)
    for leaf, how in zip(leaves, decisions, strict=True):
        alike[_key(leaf, how)].append(how)
    found = []
    for leaf, how in zip(leaves, decisions, strict=True):
        origin, *others = alike[_key(leaf, how)]
        weight = max(one.weight for one in (origin, *others))
        found.append(dataclasses.replace(how, weight=weight) if origin is how else _following(origin, how.path))
    return found


def _key(leaf: Any, how: Decision) -> Any:
    """The same for leaves that can be one."""
    return (id(leaf), how.codec, None if how.allow_transform else how.order) if can_be_tied(leaf) else how.path


def first_paths(leaves: Mapping[str, Any]) -> dict[str, str]:
    """For each path that of the first leaf which is the same object, most often the path itself."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(leaf), path) if can_be_tied(leaf) else path for path, leaf in leaves.items()}


def can_be_tied(leaf: Any) -> bool:
    """Whether a leaf is an array that can occur twice. A `ShapeDtypeStruct` is not: it may describe several arrays."""
    return is_packed(leaf) or isinstance(leaf, jax.Array | np.ndarray)


def once(function: Callable[..., T], decisions: Sequence[Decision], *rows: Iterable[Any]) -> list[T]:
    """The results of a function for all leaves; those that follow another share its result."""
    results: dict[str, T] = {}
    for how, *row in zip(decisions, *rows, strict=True):
        results[how.path] = results[how.tied_to] if how.tied_to else function(how, *row)
    return [results[how.path] for how in decisions]


def _following(origin: Decision, path: str) -> Decision:
    return dataclasses.replace(origin, path=path, reason=f"tied to {origin.path}", tied_to=origin.path)
