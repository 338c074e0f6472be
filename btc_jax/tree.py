"""The same for whole trees: every leaf that the policy takes is packed, decoded, or both."""

from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from btc_jax import coding
from btc_jax._paths import leaf_path
from btc_jax._progress import tracked
from btc_jax._typing import PyTree
from btc_jax.codecs import Codec
from btc_jax.policy import BTCPolicyError, Decision, LeafSpec, Policy
from btc_jax.tensor import is_packed, quantize_leaf


def btc_quantize(
    params: PyTree, codec: Codec | None = None, *, policy: Policy | None = None, progress: bool = False
) -> PyTree:
    """Packs the weights of a model: the same tree, with a `BTCTensor` for each leaf that the policy takes.

    Linen `params` and whole variables dicts, NNX states, nested dicts, lists, tuples and dataclasses all work.
    Unmodified models run on the result: `model.apply({"params": q}, x)`, `nnx.merge(graphdef, q)(x)`. Leaves that are
    packed already pass through untouched.

    Args:
        params: a pytree of jax or numpy arrays.
        codec: the codec of leaves taken by default; short for `policy=Policy(codec)`.
        policy: which leaves are taken, and how; `Policy()` if neither is given.
        progress: show a bar on a terminal, a step a leaf.

    Returns:
        The packed tree. `btc_plan` and `btc_metrics` say what became of each leaf.

    Raises:
        ValueError: a leaf, named by its path, holds NaN, infinity, or weights too large for the header; or the tree is
            empty.
        BTCPolicyError: a rule fits no leaf, or no leaf is taken.
        TypeError: under `jax.jit` (the widths of the blocks are read on the host), or on leaves without values.

    Example:
        >>> import btc_jax, jax.numpy as jnp
        >>> params = {"Dense_0": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
        >>> btc_jax.btc_quantize(params)["Dense_0"]["kernel"].nbytes
        2312
    """
    policy = one_policy(codec, policy)
    leaves, decisions, treedef = decide(params, policy)
    refuse_without_values(leaves, decisions)
    refuse_nothing_to_do(leaves, decisions)
    pairs = list(zip(leaves, decisions, strict=True))
    return treedef.unflatten([_quantize(leaf, how) for leaf, how in tracked(pairs, "quantizing", progress)])


def btc_dequantize(tree: PyTree, dtype: Any = None) -> PyTree:
    """Decodes every `BTCTensor` of a tree into an array; other leaves stay as they are.

    Args:
        tree: what `btc_quantize` returned, or any tree that holds packed leaves.
        dtype: dtype of the decoded leaves; their original one by default.

    Returns:
        A tree with the structure, shapes and dtypes of the one that was quantized; float64 only under jax's x64 mode.

    Example:
        >>> import btc_jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}
        >>> decoded = btc_jax.btc_dequantize(btc_jax.btc_quantize(params))
        >>> bool(jnp.allclose(decoded["kernel"], params["kernel"], atol=5e-3))
        True
    """
    return jax.tree.map(lambda x: x.dequantize(dtype) if is_packed(x) else x, tree, is_leaf=is_packed)


def btc_reconstruct(params: PyTree, codec: Codec | None = None, *, policy: Policy | None = None) -> PyTree:
    """Quantizes and decodes in one traced call: the dense weights that a packed tree would give.

    For inside `jax.jit`: sweeps over many configurations, and fine-tuning with the quantization in the loss. The
    gradient passes straight through, as if nothing had been rounded. Weights are not checked: NaN and infinity give
    NaN.

    Args, raises: as `btc_quantize`.

    Example:
        >>> import btc_jax, jax, jax.numpy as jnp
        >>> loss = lambda p: jnp.sum(btc_jax.btc_reconstruct(p)["kernel"] ** 2)
        >>> float(jax.jit(jax.grad(loss))({"kernel": jnp.full((64, 64), 0.5)})["kernel"][0, 0])
        1.0
    """
    leaves, decisions, treedef = decide(params, one_policy(codec, policy))
    refuse_nothing_to_do(leaves, decisions)
    return btc_dequantize(treedef.unflatten(map(_reconstruct, leaves, decisions)))


def flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and structure of a tree in which packed leaves count as one.

    Raises:
        ValueError: two leaves have the same path.
    """
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    paths = [leaf_path(keys) for keys, _ in with_keys]
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise ValueError(f"two leaves have the path {twice!r}; rename a key that contains '/'")
    return paths, [leaf for _, leaf in with_keys], treedef


def decide(params: PyTree, policy: Policy) -> tuple[list[Any], list[Decision], Any]:
    """Leaves of a tree, what the policy says of each, and the structure."""
    paths, leaves, treedef = flatten(params)
    return leaves, policy.decide([_spec(*pair) for pair in zip(paths, leaves, strict=True)]), treedef


def one_policy(codec: Codec | None, policy: Policy | None) -> Policy:
    """The policy that the arguments `codec` and `policy` stand for."""
    if codec is not None and policy is not None:
        raise BTCPolicyError("both codec and policy are given; put the codec into the policy: Policy(codec, ...)")
    if policy is not None:
        return policy
    return Policy() if codec is None else Policy(codec)


def _spec(path: str, leaf: Any) -> LeafSpec:
    if is_packed(leaf):
        return LeafSpec(path, leaf.shape, leaf.dtype, "already quantized")
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return LeafSpec(path, leaf.shape, leaf.dtype)
    return LeafSpec(path, (), None)


def _quantize(leaf: Any, decision: Decision) -> Any:
    if decision.codec is None:
        return leaf
    return quantize_leaf(leaf, decision.codec, decision.order, decision.path)


def _reconstruct(leaf: Any, decision: Decision) -> Any:
    return leaf if decision.codec is None else coding.reconstruct(leaf, decision.codec, decision.order)


def refuse_without_values(leaves: list[Any], decisions: list[Decision]) -> None:
    for leaf, decision in zip(leaves, decisions, strict=True):
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{decision.path} is traced by jax.jit, grad or vmap. btc_quantize reads the widths of the blocks "
                "on the host: call it outside, or use btc_reconstruct inside"
            )
        if decision.codec is not None and isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{decision.path} is a ShapeDtypeStruct, without values; btc_plan works on such trees")


def refuse_nothing_to_do(leaves: list[Any], decisions: list[Decision]) -> None:
    if not leaves:
        raise ValueError(
            "the tree is empty; pass the model's parameters, such as variables['params'] or nnx.state(model)"
        )
    if any(decision.codec is not None for decision in decisions) or any(map(is_packed, leaves)):
        return
    reasons = Counter(decision.reason for decision in decisions)
    listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
    raise BTCPolicyError(
        f"no leaf is taken: all {len(leaves)} stay dense ({listed}; {decisions[0].path!r} for one). "
        "Name the leaves in a policy, for example Policy(names=('*',), min_size=0); btc_plan shows each reason"
    )
