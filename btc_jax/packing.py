"""From one array to a packed leaf."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from btc_jax._mesh import like_leaf, refuse_staging, staging
from btc_jax._typing import Order
from btc_jax.allocate import Item, Sharing, allocate
from btc_jax.blocks import check_order
from btc_jax.codecs import Codec
from btc_jax.coding import Error, Packed, Recipe, pack, pack_traced
from btc_jax.pieces import Cut, Index, padded, parts_of, stacked
from btc_jax.processes import is_spread, together
from btc_jax.seal import SEAL
from btc_jax.tensor import BTCTensor, is_packed


def quantize_leaf(
    leaf: Any, codec: Codec, order: Order = "output-major", path: str = "leaf", slope: float | None = None
) -> BTCTensor:
    """Pack one floating array. A sharded one is gathered, and its packed arrays are replicated over its mesh.

    Args:
        leaf: weights of any shape and floating dtype.
        codec: how the blocks are coded.
        order: the layout, in which the weights run through the blocks.
        path: what error messages call the leaf.
        slope: Lagrange multiplier of a rate-controlled codec, relative to the mean square of the weights; by default
            the one that gives 4.5 effective bits. For a tree, `btc_quantize` allocates bits better.

    Returns:
        The packed leaf; one that is packed already is returned as it is.

    Raises:
        ValueError: if weights are NaN, infinite, or too large for the header; or the order is unknown.
        TypeError: if the array is traced, or not floating.

    Examples:
        >>> import btc_jax, jax.numpy as jnp
        >>> quantize_leaf(jnp.ones((64, 64)), btc_jax.Multilevel(width=4)).nbytes
        2188
    """
    if is_packed(leaf):
        return leaf
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{path} is traced; the widths of its blocks are read on the host. Use btc_reconstruct inside jit"
        )
    refuse_staging(path)
    check_order(order, np.shape(leaf), path)
    dtype = np.dtype(getattr(leaf, "dtype", float))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} is {dtype}; only floating arrays can be quantized")
    if slope is not None and not 0 <= slope < 1e30:
        raise ValueError(f"{path}: slope is {slope!r}; it must be a number from 0 to 1e30")
    recipe = Recipe(codec, codec.formats[0], order, codec.slope or slope or 0.0)
    if np.size(leaf) and (len(codec.formats) > 1 or (codec.rate_controlled and slope is None)):
        item = Item(path, lambda: leaf, np.shape(leaf), codec, order)
        (recipe,) = allocate([item], Sharing())
    return packed_leaf(leaf, recipe, path)[0]


def packed_leaf(leaf: Any, recipe: Recipe, path: str) -> tuple[BTCTensor, Error | None]:
    """A packed array, and the error of its weights if known: see `Packed`."""
    if isinstance(leaf, Tracer) or staging():
        return _packed_traced(leaf, recipe), None
    if recipe.cut is not None:
        return packed_pieces(leaf, recipe, recipe.cut, path)
    planes, header, error = pack(leaf, recipe, path)
    planes, header, seal = like_leaf((planes, header, SEAL), leaf)
    dtype = np.dtype(leaf.dtype)
    return BTCTensor(planes, header, np.shape(leaf), dtype, recipe.form, recipe.order, seal), error


def _packed_traced(leaf: Any, recipe: Recipe) -> BTCTensor:
    planes, header, seal = pack_traced(leaf, recipe)
    cut, shape = recipe.cut, np.shape(leaf)
    piece, stacks = (cut.piece(shape), cut.stacks) if cut else (shape, None)
    return BTCTensor(planes, header, piece, np.dtype(leaf.dtype), recipe.form, recipe.order, seal, stacks)


def packed_pieces(leaf: Any, recipe: Recipe, cut: Cut, path: str) -> tuple[BTCTensor, Error | None]:
    """A leaf that is cut into pieces, each packed where it lies."""
    found: dict[Index, Packed] = {}

    def packed_here() -> dict[Index, tuple[list[int], Error | None]]:
        found.update((index, pack(part, recipe.of_piece, path)) for index, part in parts_of(leaf, cut).items())
        return {index: ([len(plane) for plane in one.planes], one.error) for index, one in found.items()}

    told = together(packed_here) if is_spread(leaf) else packed_here()
    errors = [error for _, error in told.values()]
    error = sum((one for one in errors if one is not None), Error()) if None not in errors else None
    blocks = -(-math.prod(cut.piece(np.shape(leaf))) // recipe.form.block_size)
    rows = [count for count, _ in told.values()]
    pieces = padded({index: packed[:2] for index, packed in found.items()}, recipe.form, blocks, rows)
    planes, header, seal = placed(pieces, cut, leaf)
    piece, dtype = cut.piece(np.shape(leaf)), np.dtype(leaf.dtype)
    return BTCTensor(planes, header, piece, dtype, recipe.form, recipe.order, seal, cut.stacks), error


def placed(pieces: Mapping[Index, Any], cut: Cut, leaf: Any) -> Any:
    """The arrays of all pieces, with the axes of their grid first, on the devices that have the leaf."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated or not isinstance(leaf.sharding, NamedSharding):
        return like_leaf(stacked(pieces, cut), leaf)
    structure = jax.tree.structure(next(iter(pieces.values())))
    columns = {index: jax.tree.leaves(arrays) for index, arrays in pieces.items()}
    place = NamedSharding(leaf.sharding.mesh, PartitionSpec(*tuple(leaf.sharding.spec)[: len(cut.pieces)]))

    def column(i: int) -> jax.Array:
        shape = columns[next(iter(columns))][i].shape

        def block(where: Any) -> np.ndarray:
            inside = [range(*part.indices(count)[:2]) for part, count in zip(where, cut.pieces, strict=False)]
            arrays = [columns[index][i] for index in itertools.product(*inside)]
            return np.stack(arrays).reshape(*map(len, inside), *shape)

        return jax.make_array_from_callback((*cut.pieces, *shape), place, block)

    return structure.unflatten([column(i) for i in range(structure.num_leaves)])
