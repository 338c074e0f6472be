"""The containers of a tree as JSON, and back, without running or importing anything that a file names.

A node is the number of a leaf, `null` for `None`, or a list that begins with its kind:

    ["paths", leaves, depth]            nested dicts of the next leaves, by the parts of their paths after the first
    ["list" | "tuple", nodes]
    ["dict" | "ordered" | "frozen" | "state", keys, nodes]
    ["namedtuple" | "object", name, keys, nodes]
    ["variable" | "box", name, node, metadata]

What will be restored as something else is collected, for a warning.
"""

import collections
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax.core import FrozenDict

from btc_jax._typing import PyTree
from btc_jax.checkpoint.containers import box_names, is_box, nnx_class, variable_class, variable_metadata
from btc_jax.checkpoint.errors import BTCTreeWarning
from btc_jax.tensor import is_packed

if TYPE_CHECKING:
    import flax.nnx

MAX_DEPTH = 200

_MAPPINGS = {dict: "dict", collections.OrderedDict: "ordered", FrozenDict: "frozen"}


def describe(tree: PyTree, paths: Sequence[str]) -> Any:
    """The containers of a tree with leaves of these paths, in the order of `jax.tree.leaves`.

    Warns:
        BTCTreeWarning: if a container will be restored as something else without a template.

    Raises:
        TypeError: if a key is neither text nor a whole number, or the tree is too deep.

    Examples:
        >>> describe({"a": (1.0, None), "b": {"c": 2.0}}, ["a/0", "b/c"])
        ['dict', ['a', 'b'], [['tuple', [0, None]], ['paths', 1, 1]]]
    """
    describing = _Describing(paths)
    node, _ = describing.node(tree, 0)
    describing.warn()
    return node


class _Describing:
    """A tree that is being described: how many of its leaves were passed, and what a file cannot keep."""

    def __init__(self, paths: Sequence[str]):
        self._paths, self._passed = paths, 0
        self._lost: dict[str, list[str]] = {}
        state = nnx_class("State")
        self._mappings: dict[Any, str] = {**_MAPPINGS, state: "state"} if state else _MAPPINGS

    def node(self, tree: PyTree, depth: int) -> tuple[Any, list[tuple[str, ...]] | None]:
        """The node of a subtree, and the keys of each of its leaves if it is nothing but nested dicts."""
        if depth > MAX_DEPTH:
            raise TypeError(f"the tree is more than {MAX_DEPTH} containers deep")
        if tree is None:
            return None, None
        children = [] if is_packed(tree) else _children(tree)
        if children is None or is_packed(tree):
            self._passed += 1
            return self._passed - 1, [()]
        first, start, described = self._passed, self._here(), []
        for _, child in children:  # one call a level: Python allows some hundreds of them in each other
            described.append(self.node(child, depth + 1))
        return self._container(tree, [_key(keys[0]) for keys, _ in children], described, first, start)

    def warn(self) -> None:
        """One warning about everything that will be restored as something else."""
        if not self._lost:
            return
        listed = [
            f"{paths[0] or 'the tree'}{f' and {len(paths) - 1} more' if paths[1:] else ''}: {what}"
            for what, paths in self._lost.items()
        ]
        more = f"; and {len(listed) - 5} other kinds" if len(listed) > 5 else ""
        warnings.warn(
            f"what is loaded from this checkpoint differs from what is saved, unless load(like=...) is given a "
            f"template: {'; '.join(listed[:5])}{more}",
            BTCTreeWarning,
            stacklevel=4,
        )

    def _container(self, tree: PyTree, keys: list[Any], described: list[Any], first: int, start: str) -> Any:
        """The node of a container, and the keys of its leaves, from those of its children."""
        nodes = [node for node, _ in described]
        if type(tree) in (list, tuple):
            return [type(tree).__name__, nodes], None
        if isinstance(tree, nnx_class("Variable")):
            return self._variable(tree, nodes[0], start), None
        if is_box(tree):
            names, lost = box_names(tree)
            self._lose(start, *(f"the {name} of a {type(tree).__name__} is not kept" for name in lost))
            return ["box", type(tree).__name__, nodes[0], names], None
        mappings = self._mappings
        kind = mappings.get(type(tree)) or next((k for c, k in mappings.items() if isinstance(tree, c)), None)
        if kind == "dict" and type(tree) is dict:
            return self._dict(keys, nodes, [relative for _, relative in described], first)
        if kind and type(tree) in mappings:
            return [kind, keys, nodes], None
        return self._other(tree, kind, keys, nodes, start), None

    def _dict(self, keys: list[Any], nodes: list[Any], relatives: list[Any], first: int) -> tuple[Any, Any]:
        """The node of a dict: implied by the paths of its leaves if that restores exactly it."""
        plain = nodes and all(relatives) and all(type(key) is str and "/" not in key for key in keys)
        if plain:
            inside = [(key, *rest) for key, relative in zip(keys, relatives, strict=True) for rest in relative]
            parts = [path.split("/") for path in self._paths[first : self._passed]]
            above = len(parts[0]) - len(inside[0])
            if above >= 0 and all(tuple(part[above:]) == keys for part, keys in zip(parts, inside, strict=True)):
                return ["paths", len(inside), above], inside
        return ["dict", keys, nodes], None

    def _variable(self, variable: "flax.nnx.Variable", node: Any, start: str) -> Any:
        kind, (metadata, lost) = variable_class(variable), variable_metadata(variable)
        if kind is not type(variable):
            self._lose(start, f"a {type(variable).__name__} comes back as nnx.{kind.__name__}")
        self._lose(start, *(f"the metadata {name!r} of a {kind.__name__} is not kept" for name in lost))
        return ["variable", kind.__name__, node, *([metadata] if metadata else [])]

    def _other(self, tree: PyTree, kind: str | None, keys: list[Any], nodes: list[Any], start: str) -> Any:
        name = type(tree).__name__
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            self._lose(start, f"a {name} comes back as a named tuple of another class")
            return ["namedtuple", name, keys, nodes]
        back = {"frozen": "FrozenDict", "state": "nnx.State"}.get(kind or "", "dict")
        self._lose(start, f"a {name} comes back as a {back}")
        return ["object", name, keys, nodes] if kind is None else [kind if back != "dict" else "dict", keys, nodes]

    def _lose(self, path: str, *what: str) -> None:
        for one in what:
            self._lost.setdefault(one, []).append(path)

    def _here(self) -> str:
        """The path of the leaf that comes next."""
        return self._paths[self._passed] if self._passed < len(self._paths) else ""


def _children(tree: PyTree) -> list[tuple[Any, PyTree]] | None:
    """The children of a container with their keys; `None` for a leaf."""
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda child: child is not tree)
    return None if any(child is tree for _, child in children) else children


def _key(key: Any) -> str | int:
    for attribute in ("key", "name", "idx"):
        value = getattr(key, attribute, None)
        if isinstance(value, str) or type(value) is int:
            return value
    raise TypeError(f"the key {key} of a container is neither text nor a whole number; such a tree cannot be stored")
