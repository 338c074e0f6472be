"""The contract of a codec: blocks of float32 weights <-> codes of a few bits and a header.

A codec is a frozen dataclass of plain numbers: hashable, static under `jax.jit`, equal after a JSON round trip, and its
repr is a constructor call. It knows nothing of trees and files. Two codecs may share an `id` only if each decodes what
the other encodes.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from btc_jax._typing import Array, Float, PyTree, UInt, UInt8


class Coded(NamedTuple):
    """What a codec makes of `n` blocks: all arrays run over the blocks along their first axis.

    Attributes:
        widths: bits per weight of each block.
        codes: the quantization indices, each below `2 ** width` of its block.
        header: what a block stores besides its codes and its width, by name.
    """

    widths: UInt8[Array, " blocks"]
    codes: UInt[Array, "blocks size"]
    header: dict[str, Array]


class Codec(abc.ABC):
    """Base of all codecs.

    Attributes:
        id: the codec's name in the manifest of a file.
        witness: name of a stored header array whose first element never has all bits zero. It tells packed weights from
            arrays of zeros in their place (`jax.tree.map(jnp.zeros_like, tree)` in an optimizer's `init`).
        block_size: weights per block.
    """

    id: ClassVar[str]
    witness: ClassVar[str]
    block_size: int

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, ...]:
        """All widths a block of this codec can have, in bits, ascending."""

    @abc.abstractmethod
    def stored_header(self, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of what `pack_header` makes of so many blocks."""

    @property
    def wide_bits(self) -> int:
        """The width from which reports call a block wide."""
        return self.widths[-1]

    @abc.abstractmethod
    def encode(self, blocks: Float[Array, "blocks size"]) -> Coded:
        """Codes float32 blocks, of any size up to `block_size`; pure and jit-able.

        A weight that is not finite, or not representable, must leave a floating header value that is not finite.
        """

    @abc.abstractmethod
    def grid(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> PyTree:
        """What decoding needs to know of each block, from its width and header: arrays over the blocks."""

    @abc.abstractmethod
    def decode(self, codes: UInt[Array, "blocks *shape"], grid: PyTree) -> Float[Array, "blocks *shape"]:
        """The float32 weights that codes stand for; pure, jit-able, and element by element, in any shape of a block."""

    @abc.abstractmethod
    def pack_header(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> dict[str, Array]:
        """Widths and header as they are stored, without a spare bit beyond the last byte."""

    @abc.abstractmethod
    def unpack_header(self, stored: Mapping[str, Array], blocks: int) -> tuple[Array, dict[str, Array]]:
        """Inverse of `pack_header`: the widths, `u8[blocks]`, and the header."""

    def to_json(self) -> dict[str, Any]:
        """The codec as plain JSON values; `codec_from_json` is the inverse."""
        return {"id": self.id} | dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Codec":
        """The codec with these field values; an unknown or missing field is a `TypeError`."""
        return cls(**fields)
