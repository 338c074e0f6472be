"""The path of a leaf: its keys joined by `/`, the same name in policy, report and file."""

from typing import Any

from jax.tree_util import GetAttrKey, keystr


def leaf_path(keys: tuple[Any, ...]) -> str:
    """Path of a leaf from the keys of `jax.tree_util.tree_flatten_with_path`.

    An NNX variable holds its array in an attribute `value`; that last key is left out, so that Linen and NNX
    name the same layer the same way.

    Examples:
        >>> import jax
        >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"Dense_0": {"kernel": 1.0}, "scales": [2.0]})
        >>> [leaf_path(keys) for keys, _ in leaves]
        ['Dense_0/kernel', 'scales/0']
    """
    if keys and keys[-1] == GetAttrKey("value"):
        keys = keys[:-1]
    return keystr(keys, simple=True, separator="/")
