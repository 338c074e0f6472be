"""Rebuilds the tree that the nodes of a manifest describe. Nothing in them is trusted."""

import collections
from collections.abc import Sequence
from typing import Any

from flax.core import FrozenDict

from btc_jax._typing import PyTree
from btc_jax.checkpoint.containers import make_box, make_variable
from btc_jax.checkpoint.errors import BTCFormatError, refusing
from btc_jax.checkpoint.structure import MAX_DEPTH

MAX_NAMED = 256
"""Kinds of named tuples in a tree, and fields of each: making their classes takes time."""

MAX_FOLDERS = 2**18
"""Dicts that paths may imply: a short text can name many."""

_MAPPINGS = {"dict": dict, "ordered": collections.OrderedDict, "frozen": FrozenDict}
_NODES = {"list": 0, "tuple": 0, **dict.fromkeys(_MAPPINGS, 1), "state": 1, "namedtuple": 2, "object": 2}
"""Where the inner nodes stand among the fields of a node."""


def rebuild(node: Any, paths: Sequence[str], leaves: Sequence[Any]) -> PyTree:
    """The tree that `describe` described, with leaves at these paths.

    Raises:
        BTCFormatError: if the node is malformed, or does not use each leaf once, in order.
    """
    rebuilding = _Rebuilding(paths, leaves)
    with refusing("the tree of the manifest"):
        tree = rebuilding.tree(node, 0)
    if rebuilding.used < len(leaves):
        raise BTCFormatError("the tree of the manifest leaves out some of its leaves")
    return tree


class _Rebuilding:
    """A tree that is being rebuilt: how many of its leaves are used, and the classes of its named tuples."""

    def __init__(self, paths: Sequence[str], leaves: Sequence[Any]):
        self._paths, self._leaves, self.used = paths, leaves, 0
        self._named: dict[Any, Any] = {}
        self._folders = 0

    def tree(self, node: Any, depth: int) -> PyTree:
        # One call a level: Python allows some hundreds of them in each other.
        if node is None:
            return None
        if type(node) is int:
            return self._leaf(node)
        if not isinstance(node, list) or not node or depth > MAX_DEPTH:
            raise BTCFormatError(f"the tree of the manifest has a malformed node, {str(node)[:60]}")
        kind, *fields = node
        if kind == "paths":
            return self._by_paths(*fields)
        items = []
        for inner in _inner(kind, fields):
            items.append(self.tree(inner, depth + 1))  # noqa: PERF401  # a comprehension would be one more
        return self._container(kind, fields, items)

    def _leaf(self, number: int) -> Any:
        if number != self.used or number >= len(self._leaves):
            raise BTCFormatError(f"the tree of the manifest has leaf {str(number)[:20]} out of its turn")
        self.used += 1
        return self._leaves[number]

    def _container(self, kind: str, fields: list[Any], items: list[PyTree]) -> PyTree:
        """The container of a node, from its rebuilt inner nodes."""
        if kind in ("list", "tuple"):
            return tuple(items) if kind == "tuple" else items
        if kind in _MAPPINGS:
            return _MAPPINGS[kind](_pairs(fields[0], items))
        if kind == "state":
            from flax import nnx

            return nnx.State(_pairs(fields[0], items))
        if kind == "variable":
            name, _, *metadata = fields
            (metadata,) = metadata or ({},)
            return make_variable(name, items[0], metadata)
        if kind == "box":
            name, _, names = fields
            return make_box(name, items[0], names)
        name, keys, _ = fields
        if not isinstance(name, str):
            raise BTCFormatError(f"the tree of the manifest has a class without a name, {str(name)[:40]}")
        pairs = _pairs(keys, items)
        return pairs if kind == "object" else self._named_tuple(name, tuple(keys))(*items)

    def _by_paths(self, count: Any, above: Any) -> dict[str, Any]:
        """Nested dicts of the next leaves, by what their paths have after the first `above` parts."""
        last = self.used + count if type(count) is int else 0
        if not self.used < last <= len(self._leaves) or type(above) is not int or above < 0:
            raise BTCFormatError(f"the tree of the manifest has {str(count)[:20]} leaves by path, which are not there")
        root: dict[str, Any] = {}
        for path, leaf in zip(self._paths[self.used : last], self._leaves[self.used : last], strict=True):
            *folders, name = path.split("/", MAX_DEPTH + above)[above:]
            place = root
            for folder in folders:
                place = self._folder(place, folder)
            if type(place) is not dict or name in place or "/" in name:
                raise BTCFormatError(f"the tree of the manifest has no place for leaf {path[:60]!r}")
            place[name] = leaf
        self.used = last
        return root

    def _folder(self, above: dict[str, Any], name: str) -> dict[str, Any]:
        """The dict of this name in another, created if necessary."""
        if name in above:
            return above[name]
        self._folders += 1
        if self._folders > MAX_FOLDERS:
            raise BTCFormatError(f"the tree of the manifest has more than {MAX_FOLDERS:,} dicts")
        above[name] = {}
        return above[name]

    def _named_tuple(self, name: str, fields: tuple[Any, ...]) -> Any:
        """The class of named tuples with this name and these fields, made once."""
        if (name, fields) not in self._named:
            if len(self._named) == MAX_NAMED or len(fields) > MAX_NAMED:
                raise BTCFormatError(
                    f"the tree of the manifest has named tuples of more than {MAX_NAMED} kinds or fields"
                )
            self._named[name, fields] = collections.namedtuple(name, fields)
        return self._named[name, fields]


def _inner(kind: Any, fields: list[Any]) -> list[Any]:
    """The nodes inside a node."""
    if kind in ("variable", "box"):
        return fields[1:2]
    if kind not in _NODES or not isinstance(fields[_NODES[kind]], list) or len(fields) > _NODES[kind] + 1:
        raise BTCFormatError(f"the tree of the manifest has a malformed node of the kind {str(kind)[:40]!a}")
    return fields[_NODES[kind]]


def _pairs(keys: Any, items: list[PyTree]) -> dict[Any, PyTree]:
    """The items of a container with unique keys."""
    fits = isinstance(keys, list) and all(isinstance(key, str) or type(key) is int for key in keys)
    if not fits or len(set(keys)) != len(keys):
        raise BTCFormatError(f"the tree of the manifest has a node with keys that do not fit: {str(keys)[:60]}")
    return dict(zip(keys, items, strict=True))
