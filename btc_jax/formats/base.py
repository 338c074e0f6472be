"""The contract of a format: what the stored arrays of a packed leaf mean.

A format is a frozen dataclass of plain numbers: hashable, static under `jax.jit`, equal after a JSON round trip, and
its repr is a constructor call. It holds nothing about how a leaf was encoded: no thresholds, slopes or efforts. So
leaves of one format share a decoding program, and trees of them have equal structures. It knows nothing about trees,
files or encoders. Two formats may share an `id` only if each decodes what is stored in the other.
"""

import abc
import dataclasses
import operator
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import Array, Float, PyTree, UInt, UInt8


class Format(abc.ABC):
    """Base of all formats.

    Attributes:
        id: the format's name in the manifest of a file; see `register_format`.
        block_size: weights per block.
    """

    id: ClassVar[str]
    block_size: int

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, ...]:
        """All widths a block can have, in bits, ascending."""

    @property
    def wide_bits(self) -> int:
        """The width from which reports count a block as wide."""
        return self.widths[-1]

    @abc.abstractmethod
    def stored_header(self, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of what `pack_header` returns for this many blocks."""

    @abc.abstractmethod
    def pack_header(self, widths: Any, header: Mapping[str, Any], leaf_params: Mapping[str, Any]) -> dict[str, Any]:
        """The header as it is stored, without a spare bit in its last byte: on the host, or traceable for one width.

        Args:
            widths: bits per weight of each block, `u8[blocks]`.
            header: what each block has besides its codes and its width, by name: arrays over the blocks.
            leaf_params: what the blocks of the leaf have in common, by name: float32 numbers.
        """

    @abc.abstractmethod
    def unpack_header(self, stored: Mapping[str, Any], blocks: int) -> tuple[Any, dict[str, Any]]:
        """Inverse of `pack_header`: the widths, `u8[blocks]`, and header and leaf parameters as arrays over the blocks.

        In numpy for arrays on the host, so that nothing is compiled for their shapes; otherwise traceable.
        """

    @abc.abstractmethod
    def grid(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> PyTree:
        """What decoding needs to know of each block, from its width and header: arrays over the blocks; traceable."""

    @abc.abstractmethod
    def decode(self, codes: UInt[Array, "blocks *shape"], grid: PyTree) -> Float[Array, "blocks *shape"]:
        """The float32 weights that codes stand for; pure, and traceable.

        The codes of a block lie in order, flat or in a shape of several axes, and may be followed by some that are
        padding. The weights come in the same shape. If each depends only on its own code, any shape will do; if
        neighbours matter, `codes.reshape(len(codes), -1)` has the block along one axis.
        """

    def to_json(self) -> dict[str, Any]:
        """The format as plain JSON values; `format_from_json` is the inverse."""
        return {"id": self.id} | dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Format":
        """The format with these field values; an unknown or missing field is a `TypeError`."""
        return cls(**fields)


def namespace(array: Any) -> ModuleType:
    """`numpy` for arrays on the host, `jax.numpy` for those that may be traced."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def integer(name: str, value: Any) -> int:
    """A whole number from the argument `name`, or a `TypeError` that names it."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number") from None
