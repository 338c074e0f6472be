"""All kernels of a network as a few long arrays, coded in the same blocks, with metrics for each layer.

XLA compiles packing for each shape, and unpacking for each number of wide blocks: two programs per layer and codec,
which would dominate a sweep over a network of 57 layers. Here each kernel, flattened in its layout, is cut at the last
multiple of 256. The long parts of all kernels are concatenated: since all block sizes in use divide 256, no block holds
weights of two layers. The remainders stay separate arrays.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax import Policy, Uniform
from btc_jax.blocks import axes, inverse
from btc_jax.coding import Error
from btc_jax.metrics import LeafMetrics, LeafRow, Measures, Storage, TreeMetrics, dict_of, tree_metrics
from btc_jax.sizes import leaf_nbytes, packed_nbytes

PyTree = Any
UNIT = 256
LONG = "long"


class Merged(NamedTuple):
    """The kernels of a tree: the long parts concatenated under `LONG`, and each remainder under its path."""

    tree: dict[str, np.ndarray]
    params: PyTree
    shapes: dict[str, tuple[int, ...]]

    def long_size(self, path: str) -> int:
        size = math.prod(self.shapes[path])
        return size - size % UNIT


def merge(params: PyTree) -> Merged:
    """The kernels of `params`, merged."""
    leaves = dict_of(params)
    kernels = {path: leaf for path, leaf in leaves.items() if path.rsplit("/", 1)[-1] == "kernel"}
    runs = {path: np.asarray(leaf).transpose(axes(leaf.ndim, "output-major")).ravel() for path, leaf in kernels.items()}
    ends = {path: len(run) - len(run) % UNIT for path, run in runs.items()}
    tree = {path: run[ends[path] :] for path, run in runs.items() if ends[path] < len(run)}
    if sum(ends.values()):
        tree[LONG] = np.concatenate([run[: ends[path]] for path, run in runs.items()])
    return Merged(tree, params, {path: tuple(leaf.shape) for path, leaf in kernels.items()})


def merged_policy(codec: Uniform) -> Policy:
    """A policy that packs all of a merged tree, with blocks that divide `UNIT`."""
    if UNIT % codec.block_size:
        raise ValueError(f"block size {codec.block_size} does not divide {UNIT}, so blocks would cross layers")
    return Policy(codec, names=("*",), min_axes=1, min_size=0, order="stored")


def restore(merged: Merged, tree: PyTree) -> PyTree:
    """The tree of parameters with the kernels of `tree`, which is merged, and quantized or not."""
    runs = _runs(merged, {name: np.asarray(leaf) for name, leaf in tree.items()})
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: _kernel(merged, runs, keys, leaf), merged.params)


def _kernel(merged: Merged, runs: dict[str, np.ndarray], keys: Any, leaf: Any) -> Any:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    if path not in runs:
        return leaf
    permutation = axes(leaf.ndim, "output-major")
    shape = [leaf.shape[axis] for axis in permutation]
    return jnp.asarray(runs[path].reshape(shape).transpose(inverse(permutation)))


def _runs(merged: Merged, arrays: dict[str, np.ndarray], unit: int = 1) -> dict[str, np.ndarray]:
    """The part of each layer, from arrays with one element per weight, or per `unit` weights."""
    runs, start = {}, 0
    for path in merged.shapes:
        end = start + merged.long_size(path) // unit
        parts = [arrays[LONG][start:end]] if end > start else []
        runs[path] = np.concatenate([*parts, *([arrays[path]] if path in arrays else [])])
        start = end
    return runs


def layer_metrics(merged: Merged, packed: PyTree, codec: Uniform) -> TreeMetrics:
    """The metrics that `btc_metrics` returns for the tree packed layer by layer, from the merged one."""
    widths = _runs(merged, {name: np.asarray(leaf.widths) for name, leaf in packed.items()}, codec.block_size)
    before = _runs(merged, merged.tree)
    after = _runs(merged, {name: np.asarray(leaf) for name, leaf in packed.items()})
    rows = []
    for path, leaf in dict_of(merged.params).items():
        storage = _storage(widths[path], leaf.size, codec) if path in widths else None
        error = _error(before[path], after[path]) if path in widths else Error()
        rows.append(_layer(path, leaf, storage, error))
    return tree_metrics(rows)


def _layer(path: str, leaf: Any, storage: Storage | None, error: Error) -> LeafRow:
    size = leaf_nbytes(leaf)
    after = storage.nbytes if storage else size
    measures = Measures.of(storage, error) if storage else None
    reason = "default" if storage else "not in names"
    return (
        LeafMetrics(path, tuple(leaf.shape), str(leaf.dtype), reason, size, after, measures),
        storage or Storage(),
        error,
    )


def _storage(widths: np.ndarray, size: int, codec: Uniform) -> Storage:
    """What the layer stores: headers and planes as the library lays them out for a leaf of that size."""
    (form,) = codec.formats
    wide, spare = int((widths >= form.wide_bits).sum()), len(widths) * form.block_size - size
    payload = int(widths.astype(int).sum()) * form.block_size - spare * int(widths[-1])
    header = 8 * sum(
        math.prod(array.shape) * array.dtype.itemsize for array in form.stored_header(len(widths)).values()
    )
    return Storage(size, len(widths), wide, payload, header, packed_nbytes(form, size, (len(widths) - wide, wide)))


def _error(before: np.ndarray, after: np.ndarray) -> Error:
    difference = before.astype(np.float64) - after
    largest = float(np.abs(difference).max(initial=0.0))
    return Error(float(np.square(before.astype(np.float64)).sum()), float(np.square(difference).sum()), largest)
