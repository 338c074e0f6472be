"""Quantize, dequantize and fake-quantize whole parameter trees."""

import dataclasses
import re
from collections import Counter
from typing import Any, Unpack

import jax
import numpy as np
from jax.core import Tracer

from btc_jax import coding
from btc_jax._mesh import staging
from btc_jax._paths import leaf_path
from btc_jax._progress import tracked
from btc_jax._refuse import refuse_beside_like, refuse_mixed_widths_under_jit, refuse_other_paths
from btc_jax._refuse import refuse_nothing_to_do as refuse_nothing_to_do
from btc_jax._refuse import refuse_without_values as refuse_without_values
from btc_jax._ties import once, tie
from btc_jax._typing import PyTree
from btc_jax.allocate import Goal, Sharing, sharing_of
from btc_jax.choices import choose
from btc_jax.codecs import Codec
from btc_jax.coding import Error, Recipe
from btc_jax.fit import check_room, leaves_like, with_room
from btc_jax.leafspec import LeafSpec
from btc_jax.packing import packed_leaf
from btc_jax.pieces import Cut
from btc_jax.policy import BTCPolicyError, Decision, Policy, Rule, implied_codec
from btc_jax.policy.stacks import named_in_boxes
from btc_jax.policy.training import by_container
from btc_jax.tensor import is_packed


def btc_quantize(
    params: PyTree,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    like: PyTree | None = None,
    room: float = 0.0,
    progress: bool = False,
    **goal: Unpack[Goal],
) -> PyTree:
    """Pack the weights of a model: return the same tree with a `BTCTensor` for each leaf that the policy selects.

    Linen `params` and whole variables dicts, NNX states, nested dicts, lists, tuples and dataclasses all work.
    Unmodified models run on the result: `model.apply({"params": q}, x)`, `nnx.merge(graphdef, q)(x)`. Leaves that are
    already packed pass through untouched, and so do optimizer states and moving averages, as in a whole `TrainState`.
    An array at two paths (tied weights) is packed once, and the packed leaf is one object at both.

    With a target, bits are allocated over the whole tree: for `bits` and `size` so that the answers of the model move
    least, as estimated from the shapes of the leaves or from the sensitivities that `btc_sensitivity` measured. Without
    one, rate-controlled codecs have a default: 4.5 bits for `Multilevel`, and 5.5 for `Uniform(threshold="auto")` with
    blocks of 64.

    Args:
        params: a pytree of jax or numpy arrays.
        codec: the codec of leaves packed by default; short for `policy=Policy(codec)`.
        policy: which leaves are packed, and how. If neither names a codec, it is `Multilevel()` with a target, and
            `Uniform()` without.
        like: a packed tree of the same model, instead of a codec, policy or target: each leaf is packed as it is there,
            with as many bits as fit into its arrays. Both then have equal shapes, and a function compiled for one
            accepts the other.
        room: spare rows in the arrays of each leaf, at most this fraction of its bytes, so that others can be packed
            like it: 0.01 suffices for checkpoints of one model. They count as bytes in memory, beyond the target, and
            are not saved.
        progress: show a bar on a terminal, with a step for each leaf.
        bits: effective bits per weight over the leaves that are packed, at most; everything stored counts.
        size: bytes of the whole tree at most, dense leaves included: a number, or `"25MB"`. A file adds its header.
        rmse: root mean squared error over the packed weights at most, in their units, before they are rounded to the
            dtype of their leaf.
        sqnr_db: signal to quantization noise over the packed weights at least, in dB.
        sensitivity: for `bits` and `size`, how much errors of each leaf move the answers: a tree like `params` of one
            number for each leaf, from `btc_sensitivity`; `"shape"`, the default, estimates it from shapes and scales;
            `"equal"` gives the least error of the weights, whatever the answers.
        taps: whether convolution kernels may be transformed over their taps where that lowers the cost; the default.

    Returns:
        The packed tree. `btc_plan` and `btc_metrics` show what became of each leaf.

    Raises:
        ValueError: if a leaf, named by its path, holds NaN, infinity, or weights too large for the header; if the tree
            is empty; if the target is unattainable (the message gives the attainable range); if the sensitivities are
            of another tree; or if a leaf does not fit that of `like`.
        BTCPolicyError: if a rule fits no leaf, or no leaf is packed.
        TypeError: if called under `jax.jit` (the widths of the blocks are read on the host), or on leaves without
            values.

    Examples:
        >>> import btc_jax, jax.numpy as jnp
        >>> params = {"Dense_0": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
        >>> btc_jax.btc_quantize(params)["Dense_0"]["kernel"].nbytes
        2316
        >>> btc_jax.btc_quantize(params, bits=4.5)["Dense_0"]["kernel"].dequantize()[0, 0]
        Array(1., dtype=float32)
    """
    sharing = sharing_of(**goal)
    if like is not None:
        refuse_beside_like(codec, policy, goal, room)
        return _quantized_like(params, like, progress)
    check_room(room)
    packed = quantized(params, one_policy(codec, policy, sharing), sharing, progress)[0]
    return _with_room(packed, room) if room else packed


def quantized(
    params: PyTree, policy: Policy, sharing: Sharing, progress: bool = False
) -> tuple[PyTree, dict[str, Error]]:
    """The packed tree and, by path, the errors of its leaves, as far as the encoder computed them."""
    leaves, decisions, treedef = decide(params, policy)
    refuse_mixed_widths_under_jit(leaves, decisions)
    refuse_nothing_to_do(leaves, decisions)
    recipes = choose(leaves, decisions, sharing)
    packed = once(_quantize, decisions, tracked(leaves, "quantizing", progress), recipes)
    errors = {how.path: error for how, (_, error) in zip(decisions, packed, strict=True) if error}
    return treedef.unflatten([leaf for leaf, _ in packed]), errors


def _with_room(tree: PyTree, room: float) -> PyTree:
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(leaf)}
    roomy = {key: with_room(leaf, room) for key, leaf in leaves.items()}
    return jax.tree.map(lambda leaf: roomy.get(id(leaf), leaf), tree, is_leaf=is_packed)


def _quantized_like(params: PyTree, like: PyTree, progress: bool) -> PyTree:
    paths, leaves, treedef = flatten(params)
    models = dict(zip(*flatten(like)[:2], strict=True))
    refuse_other_paths(dict.fromkeys(paths), models)
    one_by_one = zip(paths, tracked(leaves, "quantizing", progress), strict=True)
    return treedef.unflatten(leaves_like(one_by_one, models))


def btc_dequantize(tree: PyTree, dtype: Any = None) -> PyTree:
    """Decode every `BTCTensor` of a tree into an array; other leaves stay as they are.

    Args:
        tree: what `btc_quantize` returned, or any tree that holds packed leaves.
        dtype: dtype of the decoded leaves; their original one by default.

    Returns:
        A tree with the structure, shapes and dtypes of the one that was quantized; float64 only under jax's x64 mode.
        A packed leaf at two paths is decoded once.

    Raises:
        TypeError: if the arrays of a packed leaf were changed, or do not fit each other.

    Examples:
        >>> import btc_jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}
        >>> decoded = btc_jax.btc_dequantize(btc_jax.btc_quantize(params))
        >>> bool(jnp.allclose(decoded["kernel"], params["kernel"], atol=5e-3))
        True
    """
    packed = {id(leaf): leaf for leaf in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(leaf)}
    decoded = {key: leaf.dequantize(dtype) for key, leaf in packed.items()}
    return jax.tree.map(lambda x: decoded[id(x)] if is_packed(x) else x, tree, is_leaf=is_packed)


def btc_allocate(
    params: PyTree,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    **goal: Unpack[Goal],
) -> Policy:
    """Allocate bits as `btc_quantize` does for a target, and return them as a policy with a rule for each leaf.

    With that policy, `btc_quantize` packs the same tree the same way and other trees with the same paths alike, and
    `btc_reconstruct` can run inside `jax.jit`.

    Args:
        params, codec, policy: as for `btc_quantize`.
        bits, size, rmse, sqnr_db, sensitivity, taps: as for `btc_quantize`.

    Returns:
        The policy; it is data, and packs nothing by itself.

    Raises:
        ValueError, TypeError: as for `btc_quantize`.

    Examples:
        >>> import btc_jax, jax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> [(rule.pattern, rule.order) for rule in btc_jax.btc_allocate(params, bits=4).rules]
        [('re:kernel', 'output-major')]
    """
    sharing = sharing_of(**goal)
    policy = one_policy(codec, policy, sharing)
    leaves, decisions, _ = decide(params, policy)
    refuse_without_values(leaves, decisions)
    refuse_nothing_to_do(leaves, decisions)
    choices = choose(leaves, decisions, sharing)
    rules = [_rule(how, choice) for how, choice in zip(decisions, choices, strict=True) if choice]
    return dataclasses.replace(policy, rules=tuple(rules), names=())


def btc_reconstruct(params: PyTree, codec: Codec | None = None, *, policy: Policy | None = None) -> PyTree:
    """Fake quantization in one traced call: return the dense weights that a packed tree would decode to.

    For inside `jax.jit`: sweeps over many configurations, and fine-tuning with the quantization in the loss. The
    gradient passes straight through, as if nothing had been rounded. Weights are not checked: NaN and infinity give
    NaN. Rate-controlled codecs need a policy from `btc_allocate` there.

    Args:
        params: the float tree; it may be traced.
        codec, policy: as for `btc_quantize`.

    Returns:
        The tree with the dense weights that the packed tree would decode to.

    Raises:
        BTCPolicyError: if a rule fits no leaf, or no leaf is packed.
        TypeError: if a leaf is traced and its codec is rate-controlled.

    Examples:
        >>> import btc_jax, jax, jax.numpy as jnp
        >>> loss = lambda p: jnp.sum(btc_jax.btc_reconstruct(p)["kernel"] ** 2)
        >>> float(jax.jit(jax.grad(loss))({"kernel": jnp.full((64, 64), 0.5)})["kernel"][0, 0])
        1.0
    """
    policy = one_policy(codec, policy)
    leaves, decisions, treedef = decide(params, policy)
    refuse_nothing_to_do(leaves, decisions)
    for leaf, how in zip(leaves, decisions, strict=True):
        if how.codec is not None and how.codec.rate_controlled and (isinstance(leaf, Tracer) or staging()):
            raise TypeError(
                f"{how.path} is traced, and {how.codec!r} is rate-controlled; allocate the bits outside, and pass the "
                "result: policy=btc_allocate(params, bits=4.5)"
            )
    choices = choose(leaves, decisions, Sharing())
    return btc_dequantize(treedef.unflatten(once(_reconstruct, decisions, leaves, choices)))


def flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves and structure of a tree in which packed leaves count as one.

    Raises:
        ValueError: if two leaves have the same path.
    """
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    paths = [leaf_path(keys) for keys, _ in with_keys]
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise ValueError(f"two leaves have the path {twice!r}; rename a key that contains '/'")
    return paths, [leaf for _, leaf in with_keys], treedef


def decide(params: PyTree, policy: Policy) -> tuple[list[Any], list[Decision], Any]:
    """Leaves of a tree, the policy's decision about each, and the structure."""
    paths, leaves, treedef = flatten(params)
    training = by_container(params, is_packed)
    named = named_in_boxes(params, is_packed)
    specs = (_spec(*triple) for triple in zip(paths, leaves, training, strict=True))
    decisions = policy.decide([dataclasses.replace(spec, stacks=named.get(spec.path, ())) for spec in specs])
    return leaves, tie(leaves, decisions), treedef


def one_policy(codec: Codec | None, policy: Policy | None, sharing: Sharing | None = None) -> Policy:
    """The policy, with a codec, that the arguments `codec`, `policy` and the target imply."""
    if codec is not None and policy is not None:
        raise BTCPolicyError("both codec and policy are given; put the codec into the policy: Policy(codec, ...)")
    policy = policy or Policy(codec)
    return (
        policy if policy.codec else dataclasses.replace(policy, codec=implied_codec(bool(sharing and sharing.target)))
    )


def _spec(path: str, leaf: Any, training: str) -> LeafSpec:
    if is_packed(leaf):
        return LeafSpec(path, leaf.shape, leaf.dtype, note="already quantized", training=training)
    if isinstance(leaf, LeafSpec):
        return dataclasses.replace(leaf, path=path, training=training)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        return LeafSpec(path, tuple(leaf.shape), leaf.dtype, sharding, training=training)
    return LeafSpec(path, (), None, training=training)


def _quantize(how: Decision, leaf: Any, recipe: Recipe | None) -> tuple[Any, Error | None]:
    return (leaf, None) if recipe is None else packed_leaf(leaf, recipe, how.path)


def _reconstruct(how: Decision, leaf: Any, recipe: Recipe | None) -> Any:
    return leaf if recipe is None else coding.reconstruct(leaf, recipe)


def _rule(how: Decision, recipe: Recipe) -> Rule:
    codec = recipe.codec.decided(recipe.form, recipe.slope, recipe.rms)
    cut = recipe.cut or Cut(())
    return Rule(f"re:{re.escape(how.path)}", codec, recipe.order, how.weight, cut.stacks, cut.pieces or None)
