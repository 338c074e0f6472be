"""A tree in two: what can be trained, and the packed leaves, which cannot."""

from typing import Any

import jax

from btc_jax._typing import PyTree
from btc_jax.tensor import is_packed


def btc_partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into its dense and its packed leaves, to differentiate and optimize only the first.

    Args:
        tree: what `btc_quantize` returned, or any tree that holds packed leaves.

    Returns:
        Two trees of the same containers, `None` in place of the leaves of the other: dense leaves, packed leaves. JAX
        and optax take `None` for no leaf. `btc_combine` puts them together again.

    Examples:
        >>> import btc_jax, jax, jax.numpy as jnp, optax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jnp.zeros(64)}
        >>> dense, packed = btc_partition(btc_jax.btc_quantize(params, bits=4.5))
        >>> def loss(dense):
        ...     params = btc_combine(dense, packed)
        ...     return jnp.sum((jnp.ones(64) @ params["kernel"] + params["bias"]) ** 2)
        >>> state = optax.adam(1e-3).init(dense)
        >>> {name: gradient is not None for name, gradient in jax.grad(loss)(dense).items()}
        {'bias': True, 'kernel': False}
    """
    dense = jax.tree.map(lambda leaf: None if is_packed(leaf) else leaf, tree, is_leaf=is_packed)
    packed = jax.tree.map(lambda leaf: leaf if is_packed(leaf) else None, tree, is_leaf=is_packed)
    return dense, packed


def btc_combine(dense: PyTree, packed: PyTree) -> PyTree:
    """The tree of both parts that `btc_partition` made; the dense leaves may have changed since.

    Raises:
        ValueError: if the two are not parts of one tree: containers differ, or a leaf is in both.

    Examples:
        >>> import jax.numpy as jnp
        >>> btc_combine({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
        {'a': 1.0, 'b': 2.0}
    """

    def chosen(path: Any, one: Any, other: Any) -> Any:
        if one is not None and other is not None:
            raise ValueError(f"both parts have the leaf {jax.tree_util.keystr(path)}; pass those of btc_partition")
        return other if one is None else one

    return jax.tree_util.tree_map_with_path(chosen, dense, packed, is_leaf=lambda leaf: leaf is None or is_packed(leaf))
