"""Leaves that hold many matrices of one shape: layers stacked for a scan, and experts.

Their matrices count one by one where an error is weighed by the size of its matrix.
"""

from collections import defaultdict
from collections.abc import Sequence

from btc_jax.policy.kinds import kind_of, snake, split_path

_EXPERTS = frozenset(("expert", "experts"))
_VECTORS = frozenset(("bias", "norm", "scale"))
"""Kinds of leaves that have one axis in a layer of their own."""


def stacks(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """How many matrices each leaf holds, 1 for most.

    Experts are known by their name. Layers that are stacked show it by a bias, or the scale of a norm, that has an axis
    more: then all leaves of the part of the tree that have its first axis are stacked.

    Example:
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
