"""Other quantizers to compare with, measured in the same units. They are decoded at once, never packed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from btc_jax._ties import once
from btc_jax._typing import Array, ArrayLike, Float, Order, PyTree
from btc_jax._xla import rounded
from btc_jax.blocks import blocks_of, join, without_taps
from btc_jax.metrics import LeafRow, Storage, TreeMetrics, measure_leaf, tied_row, tree_metrics
from btc_jax.policy import Decision, Policy
from btc_jax.tree import decide, refuse_nothing_to_do, refuse_without_values

Blocks = Float[Array, "blocks size"]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A quantizer with one width and a header of fixed size for each of its groups of weights.

    Attributes:
        name: what tables call it.
        bits: bits of each code.
        header_bits: bits stored besides the codes of a group.
        group_size: weights per group; 0 for the whole tensor, -1 for an output channel (last axis in Flax's layout, the
            first one in PyTorch's, `order="stored"`).
        reconstruct: groups -> the groups that their codes stand for.
    """

    name: str
    bits: int
    header_bits: int
    group_size: int
    reconstruct: Callable[[Blocks], Blocks]


def uniform8() -> Baseline:
    """Uniform 8 bits between the extremes of the whole tensor (paper, section 2.3); float32 extremes.

    Returns:
        The quantizer, for `apply_baseline`.

    Examples:
        >>> uniform8().header_bits
        64
    """
    return Baseline("uniform8", 8, 64, 0, _min_max)


def percentile8(percentile: float = 99.9) -> Baseline:
    """Uniform 8 bits per output channel, clipped at percentiles (paper, section 3); float32 limits.

    Args:
        percentile: weights above this percentile of their channel, and below 100 minus it, are clipped; in (50, 100].

    Returns:
        The quantizer, for `apply_baseline`.

    Raises:
        ValueError: if the percentile is out of range.

    Examples:
        >>> percentile8().name
        'percentile8 (99.9 %)'
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it must be above 50 and at most 100")
    return Baseline(f"percentile8 ({percentile:g} %)", 8, 64, -1, functools.partial(_percentile, percentile))


def absmax4(group_size: int = 32) -> Baseline:
    """Symmetric 4 bits, -7 to 7, scaled by the largest magnitude of each group; float16 scale.

    Args:
        group_size: weights per group, 1 or more.

    Returns:
        The quantizer, for `apply_baseline`.

    Raises:
        ValueError: if the group size is below 1.

    Examples:
        >>> absmax4(64).bits, absmax4(64).group_size
        (4, 64)
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; it must be 1 or more")
    return Baseline(f"absmax4 (groups of {group_size})", 4, 16, group_size, _absmax)


def apply_baseline(params: PyTree, baseline: Baseline, *, policy: Policy | None = None) -> tuple[PyTree, TreeMetrics]:
    """Fake-quantize the leaves that `policy` packs (its codec is not used).

    Args:
        params: a pytree of jax or numpy arrays.
        baseline: the quantizer.
        policy: which leaves are quantized.

    Raises:
        BTCPolicyError: if a rule fits no leaf, or no leaf is packed.
        ValueError: if weights are NaN, infinite, or too large for the header; the message names the leaf.
        TypeError: if a leaf has no values.

    Returns:
        The tree with dense, quantized weights, and its figures; bytes are those that a packed form would take.

    Examples:
        >>> import jax.numpy as jnp
        >>> _, metrics = apply_baseline({"kernel": jnp.ones((64, 64))}, absmax4())
        >>> metrics.total.effective_bits
        4.5
    """
    leaves, decisions, treedef = decide(params, policy or Policy())
    refuse_without_values(leaves, decisions)
    refuse_nothing_to_do(leaves, decisions)
    pairs = once(lambda how, leaf: _quantized(how, leaf, baseline), decisions, leaves)
    rows = [
        tied_row(how.path, leaf, how.tied_to) if how.tied_to else measure_leaf(how.path, leaf, *pair, how.reason)
        for how, leaf, pair in zip(decisions, leaves, pairs, strict=True)
    ]
    return treedef.unflatten([result for result, _ in pairs]), tree_metrics(rows)


def measure_baseline(path: str, leaf: ArrayLike, baseline: Baseline, order: Order) -> LeafRow:
    """The figures of one leaf; a layout with transformed taps is replaced by the one without.

    Raises:
        ValueError: if weights are NaN, infinite, or too large for the header; the message names the leaf.
    """
    return measure_leaf(path, leaf, *_decoded(path, leaf, baseline, without_taps(order)), baseline.name)


def _quantized(how: Decision, leaf: Any, baseline: Baseline) -> tuple[Any, Storage | None]:
    """A leaf after quantization, and what a packed form would store; or a dense leaf as it is."""
    return (leaf, None) if how.codec is None else _decoded(how.path, leaf, baseline, how.order)


def _decoded(path: str, leaf: Any, baseline: Baseline, order: Order) -> tuple[Array, Storage]:
    group = _group(leaf.shape, baseline.group_size, order)
    result = _reconstruct(leaf, baseline, group, order)
    _refuse_not_finite(path, leaf, result, baseline)
    return result, _storage(leaf.size, baseline, group)


def _refuse_not_finite(path: str, leaf: ArrayLike, result: Array, baseline: Baseline) -> None:
    leaf = jnp.asarray(leaf)
    if not_finite := int(jnp.sum(~jnp.isfinite(leaf))):
        raise ValueError(f"{path}: {not_finite} of {leaf.size} weights are NaN or infinite")
    if not jnp.isfinite(result).all():
        largest = float(jnp.abs(leaf.astype(jnp.float32)).max())
        raise ValueError(f"{path}: weights as large as {largest:g} do not fit the header of {baseline.name}")


def _group(shape: tuple[int, ...], group_size: int, order: Order) -> int:
    size = functools.reduce(int.__mul__, shape, 1)
    if group_size > 0:
        return group_size
    channels = (shape[0] if order == "stored" else shape[-1]) if group_size < 0 and shape else 1
    return max(size // max(channels, 1), 1)


def _storage(weights: int, baseline: Baseline, group: int) -> Storage:
    groups = -(-weights // group)
    payload, header = weights * baseline.bits, groups * baseline.header_bits
    return Storage(weights, groups, 0, payload, header, -(-(payload + header) // 8))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _reconstruct(leaf: Array, baseline: Baseline, group: int, order: Order) -> Array:
    blocks, tail = blocks_of(leaf, group, order), leaf.size % group
    if not tail:
        blocks = baseline.reconstruct(blocks)
    else:
        last = baseline.reconstruct(blocks[-1:, :tail])
        parts = [baseline.reconstruct(blocks[:-1])] * (len(blocks) > 1)
        blocks = jnp.concatenate([*parts, jnp.pad(last, ((0, 0), (0, group - tail)))])
    return join(blocks, leaf.shape, order).astype(leaf.dtype)


def _between(low: Array, high: Array, groups: Array) -> Array:
    step = (high - low) / 255
    codes = jnp.clip(jnp.round((groups - low) / jnp.where(step > 0, step, 1.0)), 0, 255)
    return low + codes * step


def _min_max(groups: Array) -> Array:
    return _between(groups.min(1, keepdims=True), groups.max(1, keepdims=True), groups)


def _percentile(percentile: float, groups: Array) -> Array:
    low, high = (jnp.percentile(groups, p, axis=1, keepdims=True) for p in (100 - percentile, percentile))
    return _between(low, high, groups)


def _absmax(groups: Array) -> Array:
    scale = rounded(jnp.abs(groups).max(1, keepdims=True) / 7, jnp.float16).astype(jnp.float32)
    return jnp.clip(jnp.round(groups / jnp.where(scale > 0, scale, 1.0)), -7, 7) * scale
