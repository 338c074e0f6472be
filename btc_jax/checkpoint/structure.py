"""The containers of a tree as JSON, and back, without running or importing anything that a file names.

A node is the number of a leaf, `null` for `None`, or `[kind, name, keys, nodes]`. Kinds: `dict`, `list`, `tuple`,
`namedtuple`, `state` and `variable` (NNX), and `object` for every other pytree node, which comes back as a dict.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from btc_jax._typing import PyTree
from btc_jax.checkpoint.errors import BTCFormatError, refusing
from btc_jax.tensor import is_packed

MAX_DEPTH = 200
MAX_NAMED = 256
"""Kinds of named tuples in a tree, and fields of each: making their classes takes time."""

_KINDS = ("dict", "list", "tuple", "namedtuple", "state", "variable", "object")
_VARIABLES: dict[str, type[nnx.Variable]] = {
    name: kind for name, kind in vars(nnx).items() if isinstance(kind, type) and issubclass(kind, nnx.Variable)
}
"""The variables of NNX itself. A class of the user's comes back as a plain `Variable`: a file must not import it."""


def describe(tree: PyTree) -> Any:
    """The containers of a tree; leaves are numbered in the order of `jax.tree.leaves`.

    Raises:
        TypeError: a key is neither text nor a whole number, or the tree is too deep.

    Example:
        >>> describe({"a": (1.0, None), "b": [2.0]})
        ['dict', '', ['a', 'b'], [['tuple', '', [], [0, None]], ['list', '', [], [1]]]]
    """
    return _describe(tree, iter(range(2**62)), 0)


def rebuild(node: Any, leaves: list[Any]) -> PyTree:
    """The tree that `describe` described, of these leaves.

    Raises:
        BTCFormatError: the node is malformed, or does not take each leaf once, in order.
    """
    numbers = iter(range(len(leaves)))
    with refusing("the tree of the manifest"):
        tree = _rebuild(node, leaves, numbers, {}, 0)
    if next(numbers, None) is not None:
        raise BTCFormatError("the tree of the manifest leaves out some of its leaves")
    return tree


def _describe(tree: PyTree, numbers: Iterator[int], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise TypeError(f"the tree is more than {MAX_DEPTH} containers deep")
    if tree is None:
        return None
    if is_packed(tree):
        return next(numbers)
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda child: child is not tree)
    if any(child is tree for _, child in children):
        return next(numbers)
    kind, name = _kind(tree)
    keys = [] if kind in ("list", "tuple") else [_key(keys[0]) for keys, _ in children]
    return [kind, name, keys, [_describe(child, numbers, depth + 1) for _, child in children]]


def _kind(tree: PyTree) -> tuple[str, str]:
    if isinstance(tree, nnx.State):
        return "state", ""
    if isinstance(tree, nnx.Variable):
        return "variable", type(tree).__name__
    if isinstance(tree, Mapping):
        return "dict", ""
    if type(tree) in (list, tuple):
        return type(tree).__name__, ""
    named = isinstance(tree, tuple) and hasattr(tree, "_fields")
    return ("namedtuple" if named else "object"), type(tree).__name__


def _key(key: Any) -> str | int:
    for attribute in ("key", "name", "idx"):
        value = getattr(key, attribute, None)
        if isinstance(value, str) or type(value) is int:
            return value
    raise TypeError(f"the key {key} of a container is neither text nor a whole number; such a tree cannot be stored")


def _rebuild(node: Any, leaves: list[Any], numbers: Iterator[int], named: dict[Any, Any], depth: int) -> PyTree:
    if node is None:
        return None
    if type(node) is int:
        if node != next(numbers, None):
            raise BTCFormatError(f"the tree of the manifest has leaf {node} out of its turn")
        return leaves[node]
    kind, name, keys, nodes = _checked(node, depth)
    items = [_rebuild(item, leaves, numbers, named, depth + 1) for item in nodes]
    if kind in ("list", "tuple"):
        return tuple(items) if kind == "tuple" else items
    if kind == "variable":
        return _VARIABLES.get(name, nnx.Variable)(items[0])
    if kind == "namedtuple":
        return _named_tuple(name, tuple(keys), named)(*items)
    pairs = dict(zip(keys, items, strict=True))
    return nnx.State(pairs) if kind == "state" else pairs


def _named_tuple(name: str, fields: tuple[Any, ...], named: dict[Any, Any]) -> Any:
    """The class of named tuples with this name and these fields, made once."""
    if (name, fields) not in named:
        if len(named) == MAX_NAMED or len(fields) > MAX_NAMED:
            raise BTCFormatError(f"the tree of the manifest has named tuples of more than {MAX_NAMED} kinds or fields")
        named[name, fields] = collections.namedtuple(name, fields)
    return named[name, fields]


def _checked(node: Any, depth: int) -> tuple[str, str, list[Any], list[Any]]:
    if not (isinstance(node, list) and len(node) == 4 and depth <= MAX_DEPTH):
        raise BTCFormatError(f"the tree of the manifest has a malformed node, {str(node)[:60]}")
    kind, name, keys, nodes = node
    named = all(isinstance(key, str) or type(key) is int for key in keys) if isinstance(keys, list) else False
    if kind not in _KINDS or not isinstance(name, str) or not named or not isinstance(nodes, list):
        raise BTCFormatError(f"the tree of the manifest has a malformed node, {str(node)[:60]}")
    if len(set(map(repr, keys))) != len(keys) or len(keys) != (0 if kind in ("list", "tuple") else len(nodes)):
        raise BTCFormatError(f"the tree of the manifest has a node with keys that do not fit: {str(keys)[:60]}")
    if kind == "variable" and len(nodes) != 1:
        raise BTCFormatError("the tree of the manifest has a variable without one value")
    return kind, name, keys, nodes
