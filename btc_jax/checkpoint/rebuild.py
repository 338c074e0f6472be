"""The tree that the nodes of a manifest describe, of which nothing is believed."""

import collections
from collections.abc import Sequence
from typing import Any

from flax import nnx
from flax.core import FrozenDict

from btc_jax._typing import PyTree
from btc_jax.checkpoint.containers import make_box, make_variable
from btc_jax.checkpoint.errors import BTCFormatError, refusing
from btc_jax.checkpoint.structure import MAX_DEPTH

MAX_NAMED = 256
"""Kinds of named tuples in a tree, and fields of each: making their classes takes time."""

MAX_FOLDERS = 2**18
"""Dicts that paths may imply: a short text can name many."""

_MAPPINGS = {"dict": dict, "ordered": collections.OrderedDict, "frozen": FrozenDict, "state": nnx.State}


def rebuild(node: Any, paths: Sequence[str], leaves: Sequence[Any]) -> PyTree:
    """The tree that `describe` described, of leaves of these paths.

    Raises:
        BTCFormatError: the node is malformed, or does not take each leaf once, in order.
    """
    rebuilding = _Rebuilding(paths, leaves)
    with refusing("the tree of the manifest"):
        tree = rebuilding.tree(node, 0)
    if rebuilding.taken < len(leaves):
        raise BTCFormatError("the tree of the manifest leaves out some of its leaves")
    return tree


class _Rebuilding:
    """One tree that is being rebuilt: how many of its leaves were taken, and the classes of its named tuples."""

    def __init__(self, paths: Sequence[str], leaves: Sequence[Any]):
        self._paths, self._leaves, self.taken = paths, leaves, 0
        self._named: dict[Any, Any] = {}
        self._folders = 0

    def tree(self, node: Any, depth: int) -> PyTree:
        if node is None:
            return None
        if type(node) is int:
            return self._leaf(node)
        if not isinstance(node, list) or not node or depth > MAX_DEPTH:
            raise BTCFormatError(f"the tree of the manifest has a malformed node, {str(node)[:60]}")
        kind, *fields = node
        return self._container(kind, fields, depth + 1)

    def _leaf(self, number: int) -> Any:
        if number != self.taken or number >= len(self._leaves):
            raise BTCFormatError(f"the tree of the manifest has leaf {str(number)[:20]} out of its turn")
        self.taken += 1
        return self._leaves[number]

    def _container(self, kind: Any, fields: list[Any], depth: int) -> PyTree:
        if kind == "paths":
            return self._by_paths(*fields)
        if kind in ("list", "tuple"):
            (nodes,) = fields
            items = self._all(nodes, depth)
            return tuple(items) if kind == "tuple" else items
        if kind in _MAPPINGS:
            return _MAPPINGS[kind](self._pairs(*fields, depth))
        if kind == "variable":
            name, inner, *metadata = fields
            (metadata,) = metadata or ({},)
            return make_variable(name, self.tree(inner, depth), metadata)
        if kind == "box":
            name, inner, names = fields
            return make_box(name, self.tree(inner, depth), names)
        name, keys, nodes = fields
        if kind not in ("object", "namedtuple") or not isinstance(name, str):
            raise BTCFormatError(f"the tree of the manifest has a node of the unknown kind {str(kind)[:40]!a}")
        pairs = self._pairs(keys, nodes, depth)
        return pairs if kind == "object" else self._named_tuple(name, tuple(keys))(*pairs.values())

    def _all(self, nodes: Any, depth: int) -> list[PyTree]:
        if not isinstance(nodes, list):
            raise BTCFormatError(f"the tree of the manifest has a malformed node, {str(nodes)[:60]}")
        return [self.tree(node, depth) for node in nodes]

    def _pairs(self, keys: Any, nodes: Any, depth: int) -> dict[Any, PyTree]:
        """The items of a container with keys, none of which may occur twice."""
        fits = isinstance(keys, list) and all(isinstance(key, str) or type(key) is int for key in keys)
        if not fits or len(set(keys)) != len(keys):
            raise BTCFormatError(f"the tree of the manifest has a node with keys that do not fit: {str(keys)[:60]}")
        return dict(zip(keys, self._all(nodes, depth), strict=True))

    def _by_paths(self, count: Any, above: Any) -> dict[str, Any]:
        """Nested dicts of the next leaves, by what their paths have after the first `above` parts."""
        last = self.taken + count if type(count) is int else 0
        if not self.taken < last <= len(self._leaves) or type(above) is not int or above < 0:
            raise BTCFormatError(f"the tree of the manifest has {str(count)[:20]} leaves by path, which are not there")
        root: dict[str, Any] = {}
        for path, leaf in zip(self._paths[self.taken : last], self._leaves[self.taken : last], strict=True):
            *folders, name = path.split("/", MAX_DEPTH + above)[above:]
            place = root
            for folder in folders:
                place = self._folder(place, folder)
            if type(place) is not dict or name in place or "/" in name:
                raise BTCFormatError(f"the tree of the manifest has no place for leaf {path[:60]!r}")
            place[name] = leaf
        self.taken = last
        return root

    def _folder(self, above: dict[str, Any], name: str) -> dict[str, Any]:
        """The dict of this name in another, made if need be."""
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
