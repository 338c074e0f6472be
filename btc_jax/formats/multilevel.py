"""The format of the multilevel codec: widths 0 to 8, one byte of header, levels closer in the middle."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import Array, Float, UInt, UInt8
from btc_jax.formats.base import Format, integer, namespace

OCTAVE = 4
"""Ranges between one and its double: the grid of ranges is one of quarter octaves."""
TOP = 8 * OCTAVE - 1
"""The largest of the ranges that imply a width."""
OFFSETS = 8
"""Places of the middle of a block's grid."""
SPACING = 5 / 64
"""Distance of neighbouring offsets, over the half-range: 0.1 dB better than 0.1, and exact in binary."""

# The meaning of each of the 256 headers, as tables, so that every device decodes alike.
_RANGE, _OFFSET = np.divmod(np.arange(256), OFFSETS)
_ESCAPE = 8 + _OFFSET * (_OFFSET - 1) / 4
WIDTHS = np.where(_RANGE > 0, _RANGE // OCTAVE + 1, np.where(_OFFSET > 0, 8, 0)).astype(np.uint8)
HALVES = np.where(WIDTHS > 0, 2.0 ** np.where(_RANGE > 0, _RANGE / OCTAVE, _ESCAPE), 0).astype(np.float32)
"""Half-range, relative to the step of the leaf."""
MIDDLES = np.where(_RANGE > 0, (_OFFSET - (OFFSETS - 1) / 2) * SPACING, 0).astype(np.float32)
"""Middle, relative to the half-range."""
_LEVELS = (2.0 ** np.arange(9)).astype(np.float32)
ON_A_LEVEL = np.where(_LEVELS > 1, -(0.75 / _LEVELS + 0.25 / _LEVELS**3), 0).astype(np.float32)
"""Middle of an escaped block by its width: one level lies on the centre, for the weights that are not outliers."""


@dataclasses.dataclass(frozen=True)
class MultilevelFormat(Format):
    """Blocks whose one-byte header gives their range, offset and width.

    A range `r` from 1 to 31, 5 bits, is a half-range of `step * 2 ** (r / 4)` and implies the width `r // 4 + 1`; so
    the grid of every block has one of four steps. The other 3 bits are an offset. Range 0 is a block without payload if
    its offset is 0. Otherwise the offset `e` tells how far beyond the others the range is: `step * 2 ** (8 + e * (e -
    1) / 4)`, with 8 bits and a level on the centre, for the rare outlier. `step` and `centre` are two numbers per leaf.

    With `n = 2 ** width`, code `q` is the level `u = (2 * q + 1 - n) / n`, from -1 to 1, and the weight
    `centre + half_range * (0.75 * u + 0.25 * u ** 3 + (2 * offset - 7) * 5 / 128)`. The cubic sets levels closer in the
    middle, where the weights are, by the same proportion at any width: 0.3 dB better than even levels, and as good as
    level tables trained for each width, without lookups.

    Args:
        block_size: weights per block, 16 to 256.
        width: one width, 0 to 8 bits, for all blocks, so that codes lie at a constant stride; or `None` for a width of
            each block's own.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if a number is not whole.

    Examples:
        >>> MultilevelFormat().widths, MultilevelFormat(width=4).widths
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), (4,))
    """

    id: ClassVar[str] = "multilevel"

    block_size: int = 32
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", integer("block_size", self.block_size))
        if not 16 <= self.block_size <= 256:
            raise ValueError(f"block_size is {self.block_size}; it can be 16 to 256, and is best at 32 or 64")
        if self.width is not None:
            object.__setattr__(self, "width", integer("width", self.width))
            if not 0 <= self.width <= 8:
                raise ValueError(f"width is {self.width}; it can be 0 to 8 bits, or None for each block its own")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(range(9)) if self.width is None else (self.width,)

    def stored_header(self, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
        number = jax.ShapeDtypeStruct((1,), jnp.dtype(jnp.float32))
        return {"centre": number, "header": jax.ShapeDtypeStruct((blocks,), jnp.dtype(jnp.uint8)), "step": number}

    def pack_header(self, widths: Any, header: Mapping[str, Any], leaf_params: Mapping[str, Any]) -> dict[str, Any]:
        return {**header, **{name: np.reshape(leaf_params[name], 1).astype(np.float32) for name in ("centre", "step")}}

    def unpack_header(self, stored: Mapping[str, Any], blocks: int) -> tuple[Any, dict[str, Any]]:
        xp, header = namespace(stored["header"]), stored["header"]
        numbers = {name: xp.broadcast_to(stored[name], (blocks,)) for name in ("centre", "step")}
        return self.widths_of(header), {"header": header, **numbers}

    def widths_of(self, header: Any) -> Any:
        """The widths of blocks with these headers, `u8[blocks]`."""
        if self.width is not None:
            return namespace(header).full(header.shape, self.width, np.uint8)
        return WIDTHS[header] if isinstance(header, np.ndarray) else take(WIDTHS, header)

    def grid(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> tuple[Array, ...]:
        """Per block: what makes a code a level, and a level a weight."""
        half, middle, n = grid_of(header["header"], widths, header["step"])
        return 2 / n, (1 - n) / n, 0.75 * half, 0.25 * half, header["centre"] + half * middle

    def decode(self, codes: UInt[Array, "blocks *shape"], grid: tuple[Array, ...]) -> Float[Array, "blocks *shape"]:
        return jax.vmap(_dequantize)(codes, *grid)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "block_size": self.block_size, "width": self.width}


def take(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def grid_of(
    header: UInt8[Array, " blocks"], widths: UInt8[Array, " blocks"], step: Array
) -> tuple[Array, Array, Array]:
    """For each block: the half-range, the middle relative to it, and the number of levels, in float32."""
    escaped = (header > 0) & (header < OFFSETS)
    middle = jnp.where(escaped, take(ON_A_LEVEL, widths), take(MIDDLES, header))
    return step * take(HALVES, header), middle, take(_LEVELS, widths)


def cubic(u: Array) -> Array:
    """The position of a level relative to the half-range."""
    return u * (0.75 + 0.25 * (u * u))


def _dequantize(codes: UInt[Array, "..."], *grid: Float[Array, ""]) -> Float[Array, "..."]:
    scale, shift, linear, cubic, middle = grid
    u = codes.astype(jnp.int32).astype(jnp.float32) * scale + shift
    return middle + u * (linear + cubic * (u * u))
