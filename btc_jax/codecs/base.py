"""The contract of a codec: what a user requests, and how blocks of weights are encoded into a format.

A codec is a frozen dataclass of plain numbers: hashable, static under `jax.jit`, equal after a JSON round trip, and its
repr is a constructor call. It knows nothing of trees and files.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from btc_jax._typing import Array, Float, UInt, UInt8
from btc_jax.codecs.statistics import BlockStatistics, LeafStatistics, Leaves
from btc_jax.formats import Format

LeafParams = dict[str, Any]
"""What the encoding of a block needs to know about its whole leaf: float32 numbers by name, or arrays of them over
leaves or blocks."""


class Coded(NamedTuple):
    """The codes of `n` blocks, which are the first axis of all arrays.

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
        id: the codec's name in records, and on the command line.
        block_size: weights per block.
        slope: Lagrange multiplier of the rate-distortion cost, for a codec that has one; `None` leaves it to a target.
    """

    id: ClassVar[str]
    block_size: int
    slope: float | None = None

    @property
    @abc.abstractmethod
    def formats(self) -> tuple[Format, ...]:
        """The formats that it writes. If there are several, the allocation chooses one for each leaf."""

    @property
    def rate_controlled(self) -> bool:
        """Whether a target decides the widths, not a rule of the codec's own."""
        return False

    @property
    def default_bits(self) -> float:
        """Effective bits of leaves of a rate-controlled codec if no target is given."""
        return 4.5

    @property
    def encoder(self) -> "Codec":
        """The codec without what only `leaf_params` reads, so that new values do not recompile `encode`."""
        return self

    def decided(self, form: Format, slope: float, rms: float) -> "Codec":
        """The codec that packs a leaf with this root mean square at this slope and in this format, without a target."""
        return self

    def leaf_params(
        self, form: Format, leaf: LeafStatistics, blocks: BlockStatistics, leaves: Leaves, slope: Any
    ) -> LeafParams:
        """What the encoding of a leaf's blocks has in common, in numpy on the host or traced: see `namespace`.

        Args:
            form: one of `formats`.
            leaf: statistics of the whole leaf, or of several.
            blocks: statistics of its blocks, or of a sample of them.
            leaves: which blocks belong to which leaf.
            slope: Lagrange multiplier of the rate-distortion cost: the extra squared error, relative to the leaf's mean
                square, accepted to save one bit.
        """
        return {}

    @abc.abstractmethod
    def encode(
        self, form: Format, blocks: Float[Array, "blocks size"], spare: Float[Array, " blocks"], leaf_params: LeafParams
    ) -> Coded:
        """Encode float32 blocks; pure and traceable.

        Args:
            form: one of `formats`.
            blocks: the weights; short blocks are padded with copies of their last weight.
            spare: how many places of each block are such padding, which must not count.
            leaf_params: what `leaf_params` returned, a number for each block.
        """

    @abc.abstractmethod
    def fits(self, header: Mapping[str, Any]) -> Any:
        """Whether headers and leaf parameters hold the weights of all blocks: finite, not too large, not all too small.

        On the host or traced. A non-finite weight must leave a non-finite number in one of them.
        """

    def to_json(self) -> dict[str, Any]:
        """The codec as plain JSON values; `codec_from_json` is the inverse."""
        return {"id": self.id} | dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Codec":
        """The codec with these field values; an unknown or missing field is a `TypeError`."""
        return cls(**fields)


def positive(name: str, value: Any) -> float:
    """A positive, finite number from the argument `name`, or an error that names it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it must be a number") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return number
