"""From one leaf to its packed arrays: combines blocks, codec and planes, a tile of blocks at a time.

Statistics come first, since what the blocks of a leaf have in common depends on all of them; then the codes. How many
rows a plane has is known only when the widths are. So packing reads numbers on the host in between, and cannot itself
run under `jit`; `reconstruct` can.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._errors import LeafError
from btc_jax._mesh import automatic, off_mesh
from btc_jax._typing import Array, Float, Order
from btc_jax.backends import backend_for, xla
from btc_jax.backends.xla import narrowed
from btc_jax.blocks import blocks_of, join, spare_of, tap_sizes
from btc_jax.codecs import BlockStatistics, Codec, LeafParams, LeafStatistics, Leaves
from btc_jax.codecs.statistics import on_host, statistics_of, whole
from btc_jax.formats import Format
from btc_jax.pieces import Cut, Index, cut_up, joined, parts_of
from btc_jax.planes import plane_specs
from btc_jax.processes import is_spread, together
from btc_jax.seal import SEAL
from btc_jax.sizes import packed_nbytes, padded_nbytes
from btc_jax.tiles import Blocks, blocks_in, results

_ONE = Leaves()
_CHUNK = 2**20
"""Weights that are searched at once for those that do not fit."""


class Recipe(NamedTuple):
    """How a leaf is packed.

    Attributes:
        codec: what encodes its blocks.
        form: one of the formats of the codec.
        order: its layout.
        slope: Lagrange multiplier of a rate-controlled codec, relative to the mean square of its weights.
        rms: the root of that mean square, where it was measured.
        cut: how the leaf is cut into pieces, each packed by itself; `None` for one that is whole. The slope of a piece
            is relative to the mean square of its own weights.
    """

    codec: Codec
    form: Format
    order: Order
    slope: float = 0.0
    rms: float = 0.0
    cut: Cut | None = None

    @property
    def of_piece(self) -> "Recipe":
        """How each piece is packed."""
        return self._replace(cut=None)


@dataclasses.dataclass(frozen=True)
class Error:
    """Error of reconstructed weights: sums of squares of weights and errors, and the largest error."""

    weights: float = 0.0
    errors: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Error") -> "Error":
        return Error(self.weights + other.weights, self.errors + other.errors, max(self.largest, other.largest))


class Packed(NamedTuple):
    """The packed arrays of a leaf, on the host.

    Attributes:
        planes: a matrix for each plane that has rows. A block in one plane is also in those before it, so planes
            without rows come last.
        header: what each block stores besides its codes, by name.
        error: that of the weights in their dtype; `None` where blocks hold transformed weights, since the
            error of a single weight is then unknown.
    """

    planes: tuple[np.ndarray, ...]
    header: dict[str, np.ndarray]
    error: Error | None


@off_mesh
def pack(leaf: Any, recipe: Recipe, path: str = "leaf") -> Packed:
    """Packs a leaf of any floating dtype.

    Raises:
        ValueError: if weights are NaN, infinite, or too large for the header; the message begins with `path`.
    """
    form, blocks = recipe.form, blocks_in(leaf, recipe.form.block_size, recipe.order)
    leaf_params, whole_leaf = surveyed(blocks, recipe)
    scale = np.float32(whole_leaf.rms or 1)
    dtype = jnp.dtype(jnp.float32) if _is_transformed(leaf, recipe) else jax.dtypes.canonicalize_dtype(leaf.dtype)
    tiles = encoded(blocks, recipe, leaf_params, scale, dtype, finish=functools.partial(_rows_kept, form))
    tile = jax.tree.map(lambda *arrays: np.concatenate(arrays), *tiles)
    if not recipe.codec.fits(tile.header | leaf_params):
        raise LeafError(path, what_does_not_fit(leaf, recipe.codec))
    noise = float(scale) ** 2 * float(tile.noise.sum(dtype=np.float64))
    error = Error(float(whole_leaf.rms) ** 2 * blocks.size, noise, float(tile.largest.max(initial=0)))
    header = form.pack_header(tile.widths, tile.header, leaf_params)
    planes = tuple(plane for plane in tile.rows if len(plane))
    return Packed(planes, header, None if _is_transformed(leaf, recipe) else error)


def encoded(
    blocks: Blocks, recipe: Recipe, leaf_params: LeafParams, scale: Any, dtype: Any = "float32", **finish: Any
) -> list[xla.Encoded]:
    """Every tile as it is encoded, on the host.

    Args:
        leaf_params, scale: a number for all blocks, or one for each.
        dtype: what decoded weights are rounded to.
        finish: see `results`.
    """
    codec = {"encoder": recipe.codec.encoder, "form": recipe.form, "dtype": np.dtype(dtype)}
    program = functools.partial(backend_for(recipe.form, blocks.platform).encode, **codec)
    return results(program, blocks, scale, leaf_params, **finish)


def statistics_in(blocks: Blocks) -> BlockStatistics:
    """The statistics of every block, in float64 on the host."""
    return on_host(jax.tree.map(lambda *arrays: np.concatenate(arrays), *results(xla.statistics, blocks)))


def params_of_leaf(
    recipe: Recipe, leaf: LeafStatistics, blocks: BlockStatistics, leaves: Leaves, slope: Any
) -> LeafParams:
    """The leaf parameters on the host, in float32."""
    with np.errstate(all="ignore"):  # a non-finite weight makes non-finite leaf parameters
        leaf_params = recipe.codec.leaf_params(recipe.form, leaf, blocks, leaves, slope)
        return {name: np.asarray(value, np.float32) for name, value in leaf_params.items()}


def nbytes_of(leaf: Any, recipe: Recipe) -> int:
    """Bytes of the leaf when it is packed."""
    form, cut = recipe.form, recipe.cut
    if cut is None:
        return packed_nbytes(form, math.prod(leaf.shape), count_widths(leaf, recipe))

    def here() -> dict[Index, tuple[int, ...]]:
        return {index: count_widths(part, recipe.of_piece) for index, part in parts_of(leaf, cut).items()}

    counts = together(here) if is_spread(leaf) else here()
    return cut.total * padded_nbytes(form, math.prod(cut.piece(leaf.shape)), list(counts.values()))


@off_mesh
def count_widths(leaf: Any, recipe: Recipe) -> tuple[int, ...]:
    """How many blocks have each of the widths of the format."""
    blocks = blocks_in(leaf, recipe.form.block_size, recipe.order)
    leaf_params, _ = surveyed(blocks, recipe)
    counts = np.zeros(9, np.int64)
    for tile in encoded(blocks, recipe, leaf_params, np.float32(1)):
        counts += np.bincount(np.asarray(tile.widths), minlength=9)
    return tuple(counts[list(recipe.form.widths)].tolist())


def reconstruct(leaf: Float[Array, "..."], recipe: Recipe) -> Float[Array, "..."]:
    """Fake quantization: `pack` and decode in one traced call. Its derivative is the identity (straight-through)."""
    return _compiled(leaf, *_with_slope_apart(recipe))


def _with_slope_apart(recipe: Recipe) -> tuple[Any, ...]:
    """The slope as an argument, so that a new value does not recompile, and the static rest."""
    slope, codec = recipe.slope, recipe.codec
    if codec.slope is not None:
        slope, codec = codec.slope, dataclasses.replace(codec, slope=None)  # pyright: ignore[reportArgumentType]
    return np.float32(slope), codec, recipe.form, recipe.order, recipe.cut


def has_one_width(codec: Codec) -> bool:
    """Whether all blocks have the same width, whatever their weights, so that the shapes of packed arrays are known."""
    return len(codec.formats) == 1 and len(codec.formats[0].widths) == 1


def pack_traced(leaf: Any, recipe: Recipe) -> tuple[tuple[Array, ...], dict[str, Array], Array]:
    """Planes, header and seal of a leaf that may be traced, in a format of one width. The seal is broken where weights
    do not fit. Codes may differ from those of `pack` by the rounding of the leaf's statistics, which are float32 here.
    """
    return _packed_traced(leaf, *_with_slope_apart(recipe))


@functools.partial(jax.jit, static_argnames=("codec", "form", "order", "cut"))
def _packed_traced(leaf: Array, slope: Array, codec: Codec, form: Format, order: Order, cut: Cut | None) -> Any:
    def one(leaf: Array) -> Any:
        blocks, spare, numbers, leaf_params = _prepared(codec, form, order, leaf, slope)

        def coded(blocks: Array, spare: Array, leaf_params: LeafParams) -> Any:
            widths, codes, header = codec.encode(form, blocks, spare, leaf_params)
            return xla.rows_of(form, widths, codes.astype(jnp.uint8), spare), widths, header

        count = blocks.shape[0]
        rows, widths, header = xla.in_chunks(coded, form.block_size, count, blocks, spare, leaf_params)
        seal = jnp.where(codec.fits(header | leaf_params), SEAL, jnp.float16(jnp.nan))
        return rows if count else (), form.pack_header(widths, header, numbers), seal

    for _ in cut.pieces if cut else ():
        one = jax.vmap(one)
    return one(cut_up(leaf, cut) if cut else leaf)


def _prepared(codec: Codec, form: Format, order: Order, leaf: Array, slope: Array) -> tuple[Any, Any, Any, Any]:
    """Blocks and spare places of a leaf, its parameters, and the same for each block."""
    blocks, spare = blocks_of(leaf, form.block_size, order), jnp.asarray(spare_of(leaf.size, form.block_size))
    statistics = xla.in_chunks(statistics_of, form.block_size, blocks.shape[0], blocks, spare)
    numbers = codec.leaf_params(form, whole(statistics, _ONE), statistics, _ONE, slope)
    numbers = {name: jnp.float32(value) for name, value in numbers.items()}
    return blocks, spare, numbers, {n: jnp.broadcast_to(value, blocks.shape[:1]) for n, value in numbers.items()}


@functools.partial(jax.jit, static_argnames=("codec", "form", "order", "cut"))
def _compiled(leaf: Array, slope: Array, codec: Codec, form: Format, order: Order, cut: Cut | None) -> Array:
    def one(leaf: Array) -> Array:
        return _fake_quantized(codec, form, order, leaf, slope)

    def pieces(leaf: Array) -> Array:
        assert cut is not None
        parts = one
        for _ in cut.pieces:
            parts = jax.vmap(parts)
        return joined(parts(cut_up(leaf, cut)), tuple(axis in cut.stacks for axis in range(leaf.ndim)))

    return automatic(pieces if cut else one, leaf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fake_quantized(codec: Codec, form: Format, order: Order, leaf: Array, slope: Array) -> Array:
    blocks, spare, _, leaf_params = _prepared(codec, form, order, leaf, slope)

    def decoded(blocks: Array, spare: Array, leaf_params: LeafParams) -> tuple[Array, LeafParams]:
        widths, codes, header = codec.encode(form, blocks, spare, leaf_params)
        return form.decode(codes, form.grid(widths, header | leaf_params)), header

    weights, header = xla.in_chunks(decoded, form.block_size, blocks.shape[0], blocks, spare, leaf_params)
    fits = codec.fits(header | leaf_params)
    return narrowed(join(jnp.where(fits, weights, jnp.nan), leaf.shape, order), leaf.dtype)


@_fake_quantized.defjvp
def _straight_through(codec: Codec, form: Format, order: Order, primals: Any, tangents: Any) -> Any:
    return _fake_quantized(codec, form, order, *primals), tangents[0]


def surveyed(blocks: Blocks, recipe: Recipe) -> tuple[LeafParams, LeafStatistics]:
    """The leaf parameters from the statistics of all its blocks."""
    statistics = statistics_in(blocks)
    leaf = whole(statistics, _ONE)
    return params_of_leaf(recipe, leaf, statistics, _ONE, np.float64(recipe.slope)), leaf


def _rows_kept(form: Format, tile: xla.Encoded) -> xla.Encoded:
    """A tile with only those rows of a plane whose blocks are wide enough."""
    specs = plane_specs(form.widths)
    rows = [plane[tile.widths >= spec.end] for plane, spec in zip(tile.rows, specs, strict=True)]
    return tile._replace(rows=tuple(rows))


def _is_transformed(leaf: Any, recipe: Recipe) -> bool:
    return math.prod(tap_sizes(np.shape(leaf), recipe.order)) > 1


def what_does_not_fit(leaf: Any, codec: Codec | None = None) -> str:
    """What is wrong with a leaf that cannot be packed, and the remedy."""
    flat = blocks_in(leaf, _CHUNK, "stored").flat
    chunks = (np.asarray(flat[i : i + _CHUNK], np.float32) for i in range(0, flat.size, _CHUNK))
    counts, tops = zip(*((np.sum(~np.isfinite(chunk)), np.abs(chunk).max()) for chunk in chunks), strict=True)
    if not_finite := int(sum(counts)):
        return f"{not_finite} of {flat.size} weights are NaN or infinite; fix them, or leave the leaf dense with a rule"
    largest = float(max(tops))
    if largest > 1e36 or codec is None:
        return f"weights as large as {largest:g} leave no room to calculate in float32; scale them, or leave them dense"
    size = "as large as" if largest > 1 else "no larger than"
    if getattr(codec, "header_dtype", "float32") == "float32":
        return f"weights {size} {largest:g} leave no room to calculate in float32; scale them, or leave them dense"
    return f"weights {size} {largest:g} do not fit the header; use {codec.id} with header_dtype='float32'"
