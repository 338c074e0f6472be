"""What quantization cost and saved: bits, bytes and error, for each leaf and for the tree.

Bits are counted honestly: *payload* bits are those of the codes of real weights, *header* bits all that is stored
for blocks next to them, and *effective* bits everything stored, over the number of weights: the padding of the last
block and the seal of each leaf included.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from btc_jax._mesh import refuse_staging
from btc_jax._refuse import refuse_other_paths, refuse_other_trees
from btc_jax._ties import first_paths
from btc_jax._typing import PyTree
from btc_jax.codecs import Codec
from btc_jax.coding import Error
from btc_jax.policy import BTCPolicyError, Decision, Policy
from btc_jax.sizes import leaf_nbytes
from btc_jax.tensor import BTCTensor, is_packed
from btc_jax.tree import decide, flatten, one_policy

_CACHEFUL = 2**16
"""Weights compared at once."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """What is stored for one leaf, or for several.

    Attributes:
        weights: number of weights.
        blocks, wide_blocks: number of blocks, and of those the wide ones.
        payload_bits: bits of the codes of real weights, in all.
        header_bits: bits of all headers.
        nbytes: bytes of everything stored.
    """

    weights: int = 0
    blocks: int = 0
    wide_blocks: int = 0
    payload_bits: int = 0
    header_bits: int = 0
    nbytes: int = 0

    def __add__(self, other: "Storage") -> "Storage":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Storage(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Measures:
    """The figures of one leaf, or of all quantized leaves together.

    Attributes:
        weights: number of weights.
        wide_share: share of blocks with the wide width, 0 to 1.
        payload_bits, header_bits, effective_bits: per weight.
        rmse: root of the mean squared error, in units of the weights.
        relative_rmse: `rmse` over the root mean square of the weights.
        sqnr_db: signal to quantization noise, `10 log10(sum w^2 / sum e^2)`, in dB; infinite without error.
        largest_error: largest absolute error of a weight.
    """

    weights: int
    wide_share: float
    payload_bits: float
    header_bits: float
    effective_bits: float
    rmse: float
    relative_rmse: float
    sqnr_db: float
    largest_error: float

    @classmethod
    def of(cls, storage: Storage, error: Error) -> "Measures":
        n = max(storage.weights, 1)
        relative = math.sqrt(error.errors / error.weights) if error.weights else math.inf if error.errors else 0.0
        return cls(
            weights=storage.weights,
            wide_share=storage.wide_blocks / max(storage.blocks, 1),
            payload_bits=storage.payload_bits / n,
            header_bits=storage.header_bits / n,
            effective_bits=8 * storage.nbytes / n,
            rmse=math.sqrt(error.errors / n),
            relative_rmse=relative,
            sqnr_db=-20 * math.log10(relative) if relative else math.inf,
            largest_error=error.largest,
        )


@dataclasses.dataclass(frozen=True)
class LeafMetrics:
    """One leaf.

    Attributes:
        path, shape, dtype: the leaf.
        reason: why it is packed, or is not.
        bytes_before, bytes_after: its bytes; 0 where it is the same array as one before it.
        measures: its figures, if it is packed and not tied to another.
        tied_to: path of the leaf that is the same array, or empty.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    reason: str
    bytes_before: int
    bytes_after: int
    measures: Measures | None
    tied_to: str = ""


@dataclasses.dataclass(frozen=True)
class TreeMetrics:
    """The figures of a packed tree.

    Attributes:
        leaves: every leaf, in the order of the tree.
        total: the figures over all weights of quantized leaves.
        bytes_before, bytes_after: bytes of the whole tree, dense leaves included.
    """

    leaves: tuple[LeafMetrics, ...]
    total: Measures
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; what is infinite becomes `None`."""
        return jsonable(self)


def btc_metrics(
    params: PyTree, quantized: PyTree, codec: Codec | None = None, *, policy: Policy | None = None
) -> TreeMetrics:
    """Compares a packed tree with the one it came from.

    Args:
        params: the tree that was quantized.
        quantized: what `btc_quantize` made of it.
        codec, policy: those given to `btc_quantize`; they tell the reasons of dense leaves.

    Raises:
        ValueError: the trees differ in paths or shapes, or have changed places, or nothing was quantized.

    Example:
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
    return measure_leaf(path, original, decoded, storage, _reason(decision, storage), error)


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
        ValueError: the two arrays differ in shape.
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
    """What a packed leaf stores."""
    widths = np.asarray(tensor.widths, np.int64)
    last = widths.reshape(math.prod(tensor.pieces), -1)[:, -1:]  # the last block of each piece may be short
    spare = (tensor.num_blocks * tensor.format.block_size - tensor.size) // math.prod(tensor.pieces)
    payload = int(widths.sum()) * tensor.format.block_size - spare * int(last.sum())
    header = 8 * sum(array.nbytes for array in tensor.header.values())
    wide = int((widths >= tensor.format.wide_bits).sum())
    return Storage(tensor.size, widths.size, wide, payload, header, tensor.nbytes)


def error_of(original: Any, decoded: Any) -> Error:
    """Error of `decoded` against `original`, summed in float64 whatever the scale of the weights."""
    pair = (np.asarray(array).reshape(-1) for array in (original, decoded))
    parts = zip(*(_cachefuls(array) for array in pair), strict=True)
    return sum(itertools.starmap(_error_of, parts), Error())


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


def _reason(decision: Decision, storage: Storage | None) -> str:
    """The reason of the policy, unless the leaf was packed with another."""
    if (decision.codec is None) == (storage is None) and not decision.tied_to:
        return decision.reason
    return "left dense" if storage is None else "packed"


def _decisions(params: PyTree, policy: Policy) -> dict[str, Decision]:
    try:
        return {decision.path: decision for decision in decide(params, policy)[1]}
    except BTCPolicyError as error:
        raise BTCPolicyError(f"{error}. Metrics need the policy that the tree was quantized with") from error


def jsonable(value: Any) -> Any:
    """Records as plain JSON values; JSON has no infinity, so what is infinite or NaN becomes `None`."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
