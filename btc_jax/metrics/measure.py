"""Measures the bits, bytes and error of a packed tree."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from btc_jax._mesh import refuse_staging
from btc_jax._refuse import refuse_other_paths, refuse_other_trees
from btc_jax._ties import first_paths
from btc_jax._typing import PyTree
from btc_jax.codecs import Codec
from btc_jax.coding import Error
from btc_jax.metrics.records import LeafMetrics, Measures, Storage, TreeMetrics
from btc_jax.policy import BTCPolicyError, Decision, Policy
from btc_jax.processes import is_spread, together
from btc_jax.sizes import leaf_nbytes
from btc_jax.tensor import BTCTensor, is_packed
from btc_jax.tree import decide, flatten, one_policy

_CACHEFUL = 2**16
"""Weights compared at once."""


def btc_metrics(
    params: PyTree, quantized: PyTree, codec: Codec | None = None, *, policy: Policy | None = None
) -> TreeMetrics:
    """Compare a packed tree with its original.

    Args:
        params: the tree that was quantized.
        quantized: what `btc_quantize` made of it.
        codec, policy: those given to `btc_quantize`; they tell the reasons of dense leaves.

    Returns:
        The figures of every leaf, and of all packed leaves together. It prints as a table.

    Raises:
        ValueError: if the trees differ in paths or shapes, are swapped, or nothing was quantized.

    Examples:
        >>> import btc_jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.linspace(-0.1, 0.1, 4096).reshape(64, 64), "bias": jnp.zeros(64)}
        >>> metrics = btc_jax.btc_metrics(params, btc_jax.btc_quantize(params))
        >>> metrics.bytes_before, metrics.bytes_after, [leaf.reason for leaf in metrics.leaves]
        (16640, 4620, ['bias', 'default'])
    """
    return metrics_of(params, quantized, one_policy(codec, policy), {})


def metrics_of(params: PyTree, quantized: PyTree, policy: Policy, errors: Mapping[str, Error]) -> TreeMetrics:
    """As `btc_metrics`, with errors by path that are known already."""
    refuse_staging("the tree")
    before, after = dict_of(params), dict_of(quantized)
    refuse_other_paths(before, after)
    decisions = _decisions(params, policy)
    origins, twins = first_paths(before), first_paths(after)
    rows = []
    for path, leaf in after.items():
        tied = origins[path] == twins[path] != path
        row = (
            tied_row(path, leaf, twins[path])
            if tied
            else _row(path, before[path], leaf, decisions[path], errors.get(path))
        )
        rows.append(_counted_once(row, origins[path] == path, twins[path] == path))
    refuse_other_trees(before, after)
    return tree_metrics(rows)


def _row(path: str, original: Any, leaf: Any, decision: Decision, error: Error | None) -> "LeafRow":
    storage = storage_of(leaf) if is_packed(leaf) and not is_packed(original) else None
    decoded = leaf.dequantize() if storage and error is None else leaf
    return measure_leaf(path, original, decoded, storage, reason_of(decision, storage), error)


def _counted_once(row: "LeafRow", before: bool, after: bool) -> "LeafRow":
    """The row without the bytes of arrays that an earlier row has, where only one of the trees ties them."""
    leaf, storage, error = row
    kept = {"bytes_before": before * leaf.bytes_before, "bytes_after": after * leaf.bytes_after}
    return dataclasses.replace(leaf, **kept), storage if after else Storage(), error if after else Error()


LeafRow = tuple[LeafMetrics, Storage, Error]
"""A leaf's metrics with the sums that the totals are made of."""


def measure_leaf(
    path: str, original: Any, decoded: Any, storage: Storage | None, reason: str, error: Error | None = None
) -> LeafRow:
    """The metrics of one leaf; `storage` is `None` for a dense one, and `error` where it is still to be measured.

    Raises:
        ValueError: if the two arrays differ in shape.
    """
    shape, before = tuple(getattr(original, "shape", ())), leaf_nbytes(original)
    dtype = str(getattr(original, "dtype", type(original).__name__))
    if shape != (other := tuple(getattr(decoded, "shape", ()))):
        raise ValueError(f"{path} has shape {shape} in one tree and {other} in the other")
    if storage is None:
        return LeafMetrics(path, shape, dtype, reason, before, before, None), Storage(), Error()
    error = error or error_of(original, decoded)
    measures = Measures.of(storage, error)
    return LeafMetrics(path, shape, dtype, reason, before, storage.nbytes, measures), storage, error


def tied_row(path: str, leaf: Any, origin: str) -> LeafRow:
    """The metrics of a leaf that is the same array as the one at `origin`, which is counted there."""
    dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
    row = LeafMetrics(path, tuple(np.shape(leaf)), dtype, f"tied to {origin}", 0, 0, None, origin)
    return row, Storage(), Error()


def tree_metrics(rows: Iterable[LeafRow]) -> TreeMetrics:
    """Leaves and totals."""
    rows = list(rows)
    leaves = tuple(leaf for leaf, _, _ in rows)
    storage = sum((s for _, s, _ in rows), Storage())
    error = sum((e for _, _, e in rows), Error())
    sums = [sum(getattr(leaf, name) for leaf in leaves) for name in ("bytes_before", "bytes_after")]
    return TreeMetrics(leaves, Measures.of(storage, error), *sums)


def storage_of(tensor: BTCTensor) -> Storage:
    """What is stored for a packed leaf."""
    widths = np.asarray(tensor.widths, np.int64)
    last = widths.reshape(math.prod(tensor.pieces), -1)[:, -1:]  # the last block of each piece may be short
    spare = (tensor.num_blocks * tensor.format.block_size - tensor.size) // math.prod(tensor.pieces)
    payload = int(widths.sum()) * tensor.format.block_size - spare * int(last.sum())
    header = 8 * sum(array.nbytes for array in tensor.header.values())
    wide = int((widths >= tensor.format.wide_bits).sum())
    return Storage(tensor.size, widths.size, wide, payload, header, tensor.nbytes)


def error_of(original: Any, decoded: Any) -> Error:
    """Error of `decoded` against `original`, summed in float64 whatever the scale of the weights."""
    if is_spread(original):
        return sum(together(lambda: _errors_of_shards(original, decoded)).values(), Error())
    pair = (np.asarray(array).reshape(-1) for array in (original, decoded))
    parts = zip(*(_cachefuls(array) for array in pair), strict=True)
    return sum(itertools.starmap(_error_of, parts), Error())


def _errors_of_shards(original: jax.Array, decoded: jax.Array) -> dict[str, Error]:
    """The error of each part of an array that this process has, by its place; copies of a part count once."""
    others = {str(shard.index): shard.data for shard in decoded.addressable_shards}
    return {str(s.index): error_of(s.data, others[str(s.index)]) for s in original.addressable_shards}


def _cachefuls(array: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(0, array.size, _CACHEFUL):
        yield array[i : i + _CACHEFUL].astype(np.float64)


def _error_of(original: np.ndarray, decoded: np.ndarray) -> Error:
    errors = decoded - original
    return Error(float(original @ original), float(errors @ errors), float(np.abs(errors).max()))


def dict_of(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path."""
    paths, leaves, _ = flatten(tree)
    return dict(zip(paths, leaves, strict=True))


def reason_of(decision: Decision, storage: Storage | None) -> str:
    """The reason of the policy, unless the leaf was packed with another."""
    if (decision.codec is None) == (storage is None) and not decision.tied_to:
        return decision.reason
    return "left dense" if storage is None else "packed"


def _decisions(params: PyTree, policy: Policy) -> dict[str, Decision]:
    try:
        return {decision.path: decision for decision in decide(params, policy)[1]}
    except BTCPolicyError as error:
        raise BTCPolicyError(f"{error}. Metrics need the policy that the tree was quantized with") from error
