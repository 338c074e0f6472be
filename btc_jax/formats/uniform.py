"""The format of the paper's codec: even levels between the extremes of each block, of one of two widths.

Source: "Efficient Quantization of Pretrained Deep Networks via Adaptive Block Transform Coding", Information 2026,
17(1), 69, section 2.2, equations 4 and 5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import Array, Bool, Float, UInt, UInt8
from btc_jax._xla import divide
from btc_jax.formats.base import Format, integer, namespace


@dataclasses.dataclass(frozen=True)
class UniformFormat(Format):
    """Blocks between a stored minimum and maximum, in `2 ** width - 1` even steps.

    Stored are both extremes of each block in `header_dtype`, and, where there are two widths, a bit that tells which:
    33 bits per block with `float16` extremes.

    Args:
        block_size: weights per block, 2 to 65536.
        widths: one width or two, in bits, ascending, 1 to 8.
        header_dtype: `"float16"` or `"float32"`.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if a number is not whole.

    Examples:
        >>> UniformFormat(block_size=32).widths
        (4, 8)
    """

    id: ClassVar[str] = "uniform"

    block_size: int = 64
    widths: tuple[int, ...] = (4, 8)  # pyright: ignore[reportIncompatibleMethodOverride]
    header_dtype: str = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", integer("block_size", self.block_size))
        object.__setattr__(self, "widths", tuple(integer("widths", width) for width in self.widths))
        if not 2 <= self.block_size <= 2**16:
            raise ValueError(f"block_size is {self.block_size}; a block holds at least 2 weights, and at most 65536")
        ascending = sorted({*self.widths} & {*range(1, 9)})
        if not (1 <= len(self.widths) <= 2 and list(self.widths) == ascending):
            raise ValueError(f"widths are {self.widths}; they can be one or two of 1 to 8, ascending")
        if self.header_dtype not in ("float16", "float32"):
            raise ValueError(f"header_dtype is {self.header_dtype!r}; it can be 'float16' or 'float32'")

    def stored_header(self, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
        extreme = jax.ShapeDtypeStruct((blocks,), jnp.dtype(self.header_dtype))
        extremes = {"maximum": extreme, "minimum": extreme}
        if len(self.widths) == 1:
            return extremes
        return extremes | {"wide": jax.ShapeDtypeStruct((-(-blocks // 8),), jnp.dtype(jnp.uint8))}

    def pack_header(self, widths: Any, header: Mapping[str, Any], leaf_params: Mapping[str, Any]) -> dict[str, Any]:
        if len(self.widths) == 1:
            return dict(header)
        return {**header, "wide": np.packbits(widths == self.widths[-1], bitorder="little")}

    def unpack_header(self, stored: Mapping[str, Any], blocks: int) -> tuple[Any, dict[str, Any]]:
        header, xp = dict(stored), namespace(stored["minimum"])
        if len(self.widths) == 1:
            return xp.full(blocks, self.widths[0], xp.uint8), header
        wide = xp.unpackbits(header.pop("wide"), count=blocks, bitorder="little")
        return xp.where(wide > 0, xp.uint8(self.widths[1]), xp.uint8(self.widths[0])), header

    def chosen(self, wide: Bool[Array, " blocks"]) -> UInt8[Array, " blocks"]:
        """The widths of blocks that are wide, or are not."""
        return jnp.where(wide, jnp.uint8(self.widths[-1]), jnp.uint8(self.widths[0]))

    def grid(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> tuple[Array, Array]:
        """The lowest level and the step of each block, in float32."""
        return jax.vmap(self._grid)(widths == self.widths[-1], header["minimum"], header["maximum"])

    def decode(self, codes: UInt[Array, "blocks *shape"], grid: tuple[Array, Array]) -> Float[Array, "blocks *shape"]:
        return jax.vmap(_dequantize)(codes, *grid)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"widths": list(self.widths)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UniformFormat":
        return cls(**{**fields, "widths": tuple(fields.get("widths", cls.widths))})

    def _grid(self, wide: Bool[Array, ""], minimum: Float[Array, ""], maximum: Float[Array, ""]) -> tuple[Array, Array]:
        """Equation 4 of one block, between the extremes of the header, so that encoder and decoder agree."""
        low, high = minimum.astype(jnp.float32), maximum.astype(jnp.float32)
        levels = jnp.where(wide, 2.0 ** self.widths[-1] - 1, 2.0 ** self.widths[0] - 1)
        step = divide(high - low, levels)
        # Some devices flush subnormal steps to zero and some do not; here all do.
        return low, jnp.where(step < jnp.finfo(jnp.float32).tiny, jnp.zeros_like(step), step)


def _dequantize(codes: UInt[Array, "..."], low: Float[Array, ""], step: Float[Array, ""]) -> Float[Array, "..."]:
    """Equation 5 of one block, inverted."""
    return low + codes.astype(jnp.int32).astype(jnp.float32) * step
