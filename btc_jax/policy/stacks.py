"""Leaves that hold many matrices of one shape: layers stacked for a scan, and experts. Each matrix counts by itself
when errors are weighted by the size of their matrix.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from btc_jax._paths import leaf_path
from btc_jax._typing import PyTree
from btc_jax.policy.kinds import kind_of, snake, split_path

_EXPERTS = frozenset(("expert", "experts"))
_NAMES = frozenset(("layer", "layers", "stack", "stacks", "block", "blocks", *_EXPERTS))
"""Names of axes along which a leaf is a stack of matrices."""
_VECTORS = frozenset(("bias", "norm", "scale"))
"""Kinds of leaves that have one axis in an unstacked layer."""


def stacks(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """How many matrices each leaf holds, 1 for most.

    Experts are recognised by name. Stacked layers are recognised by a bias, or the scale of a norm, with an extra axis:
    then all leaves of that part of the tree with the same first axis are stacked.

    Examples:
        >>> stacks(["layers/norm/scale", "layers/mlp/kernel", "head/kernel"], [(12, 64), (12, 64, 256), (64, 100)])
        [12, 12, 1]
        >>> stacks(["moe/experts/kernel"], [(8, 64, 256)])
        [8]
    """
    layers = _stacked_layers(paths, shapes)
    return [
        layers.get(path, 1) * _experts(path, shape[1:] if path in layers else shape)
        for path, shape in zip(paths, shapes, strict=True)
    ]


def _experts(path: str, shape: tuple[int, ...]) -> int:
    named = not _EXPERTS.isdisjoint(snake(part) for part in split_path(path)[:-1])
    return max(shape[0], 1) if named and len(shape) >= 3 else 1


def _stacked_layers(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The first axis of every leaf in a part of the tree of stacked layers."""
    parts: dict[str, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        if shapes[i]:
            for end in (j for j, letter in enumerate(path) if letter == "/"):
                parts[path[:end]].append(i)
    found: dict[str, int] = {}
    for members in parts.values():
        firsts = {shapes[i][0] for i in members}
        stacked = len(firsts) == 1 and any(len(shapes[i]) > 1 and kind_of(paths[i]) in _VECTORS for i in members)
        if stacked and len(members) > 1 and min(firsts) > 1:
            found |= {paths[i]: shapes[i][0] for i in members}
    return found


def named_in_boxes(tree: PyTree, is_leaf: Callable[[Any], bool]) -> dict[str, tuple[int, ...]]:
    """The axes that boxes of Linen and variables of NNX name as those of layers or experts, by path of the leaf.

    A tree of plain arrays has no boxes, and none is found.
    """
    boxes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: is_leaf(node) or _names_of(node) != ())[0]
    found = {leaf_path(keys): _stacks(_names_of(node)) for keys, node in boxes if not is_leaf(node)}
    return {path: stacks for path, stacks in found.items() if stacks}


def _names_of(node: Any) -> tuple[Any, ...]:
    """Names of the axes of the array in a box, without importing what makes such boxes."""
    kind = type(node).__module__
    if not kind.startswith("flax."):
        return ()
    names = getattr(node, "names", None)
    if names is None and hasattr(node, "get_metadata"):
        metadata = node.get_metadata()
        names = metadata.get("out_sharding") or metadata.get("sharding_names")
    return tuple(names) if isinstance(names, tuple | list | PartitionSpec) else ()


def _stacks(names: Sequence[Any]) -> tuple[int, ...]:
    return tuple(axis for axis, name in enumerate(names) if isinstance(name, str) and name in _NAMES)
