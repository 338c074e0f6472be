"""The contract of a codec: blocks of float32 weights <-> codes of a few bits and a header.

A codec is a frozen dataclass of plain numbers: hashable, static under `jax.jit`, equal after a JSON round trip, and its
repr is a constructor call. It knows nothing of trees and files. Two codecs may share an `id` only if each decodes what
the other encodes.
"""

import abc
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import Array, ArrayLike, Bool, Float, PyTree, UInt, UInt8

Setting = dict[str, Array]
"""What the coding of a block needs to know of its whole leaf: float32 numbers by name."""


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
        id: the codec's name in the manifest of a file; see `register_codec`.
        block_size: weights per block.
    """

    id: ClassVar[str]
    block_size: int

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, ...]:
        """All widths a block of this codec can have, in bits, ascending."""

    @property
    @abc.abstractmethod
    def adaptive(self) -> bool:
        """Whether the widths are chosen by what a bit is worth (the slope), and not by a rule of the codec's own."""

    @property
    def usual_bits(self) -> float:
        """Effective bits that leaves of an adaptive codec come to where no target is given."""
        return 4.5

    @property
    def candidates(self) -> "tuple[Codec, ...]":
        """The codecs of which the allocation chooses one for a leaf; each decodes only its own."""
        return (self,)

    def fixed(self, slope: float, rms: float) -> "Codec":
        """The codec with its rule fixed at a slope, for a leaf of this root mean square: no longer adaptive."""
        return self

    def traced(self, slope: ArrayLike) -> "tuple[Codec, ArrayLike]":
        """The codec without a slope of its own, and that or the given one: another number is not another program."""
        return self, slope

    @property
    def stored(self) -> "Codec":
        """The codec without what only encoding needs: packed leaves that decode alike have equal ones."""
        return self

    @abc.abstractmethod
    def stored_header(self, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of what `pack_header` makes of so many blocks."""

    @property
    def wide_bits(self) -> int:
        """The width from which reports call a block wide."""
        return self.widths[-1]

    def tune(self, parts: Sequence[Float[Array, "_ _"]], slope: ArrayLike) -> Setting:
        """What the coding of a leaf's blocks has in common.

        Args:
            parts: all blocks of the leaf, those of one size in one matrix.
            slope: the squared error that saves a bit, over the mean square of the leaf's weights.
        """
        return {}

    @abc.abstractmethod
    def encode(self, blocks: Float[Array, "blocks size"], setting: Setting) -> Coded:
        """Codes float32 blocks, of any size up to `block_size`; pure and jit-able.

        A weight that is not finite, or too large, must leave a floating value that is not finite in the stored header.
        """

    @abc.abstractmethod
    def grid(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> PyTree:
        """What decoding needs to know of each block, from its width and header: arrays over the blocks."""

    @abc.abstractmethod
    def decode(self, codes: UInt[Array, "blocks *shape"], grid: PyTree) -> Float[Array, "blocks *shape"]:
        """The float32 weights that codes stand for; pure, jit-able, and element by element, in any shape of a block."""

    @abc.abstractmethod
    def pack_header(
        self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array], setting: Setting
    ) -> dict[str, Array]:
        """Widths, header and what is needed of the setting as they are stored, without a spare bit in the last byte."""

    @abc.abstractmethod
    def unpack_header(self, stored: Mapping[str, Array], blocks: int) -> tuple[Array, dict[str, Array]]:
        """Inverse of `pack_header`: the widths, `u8[blocks]`, and header and setting as `grid` takes them."""

    def fits(self, stored: Mapping[str, Array]) -> Bool[Array, ""]:
        """Whether a stored header holds the weights of its leaf: finite, not too large, and not all too small."""
        floating = [array for array in stored.values() if jnp.issubdtype(array.dtype, jnp.floating)]
        return functools.reduce(jnp.logical_and, [jnp.isfinite(array).all() for array in floating], jnp.array(True))

    def read_widths(self, stored: Mapping[str, np.ndarray], blocks: int) -> np.ndarray:
        """The widths alone, `u8[blocks]`, of a header that is on the host; codecs in numpy need not compile for it."""
        with jax.ensure_compile_time_eval():  # also asked for while a model is traced
            return np.asarray(self.unpack_header(jax.tree.map(jnp.asarray, dict(stored)), blocks)[0])

    def to_json(self) -> dict[str, Any]:
        """The codec as plain JSON values; `codec_from_json` is the inverse."""
        return {"id": self.id} | dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Codec":
        """The codec with these field values; an unknown or missing field is a `TypeError`."""
        return cls(**fields)


def integer(name: str, value: Any) -> int:
    """A whole number from the argument `name`, or a `TypeError` that names it."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number") from None


def positive(name: str, value: Any) -> float:
    """A positive, finite number from the argument `name`, or an error that names it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it must be a number") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return number


def root_mean_square(parts: Sequence[Float[Array, "_ _"]]) -> Float[Array, ""]:
    """Of all weights of a leaf, whatever their scale; 0 if none is a normal float32."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(part).max(initial=0) for part in parts])
    scale = jnp.where(largest < jnp.finfo(jnp.float32).tiny, 1, largest)
    # Row by row, so that long sums keep their digits, and of numbers near 1, so that no square vanishes.
    squares = functools.reduce(jnp.add, [jnp.square(part / scale).sum(1).sum() for part in parts])
    return jnp.sqrt(squares / max(sum(part.size for part in parts), 1)) * scale
