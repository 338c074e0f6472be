"""The paper's codec: min-max uniform quantization of each block, at one of two widths chosen by its spread.

Source: "Efficient Quantization of Pretrained Deep Networks via Adaptive Block Transform Coding", Information 2026,
17(1), 69, section 2.2, equations 1 to 5.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from btc_jax._errors import ArgumentError
from btc_jax._typing import Array, Float, UInt
from btc_jax._xla import divide, rounded
from btc_jax.codecs.base import Codec, Coded, LeafParams
from btc_jax.codecs.statistics import TINY, BlockStatistics, LeafStatistics, Leaves, totals
from btc_jax.formats import Format, UniformFormat
from btc_jax.formats.base import integer, namespace

_ROUND = 1.5 * 2**23
"""Added to a float32 in 0..2^22, leaves it rounded, half to even, in the low bits of the significand."""


_LARGEST = float(jnp.finfo(jnp.float32).max)

SMALLEST = {"float16": 2.0**-20, "float32": 1e-35}
"""Smallest magnitude, by `header_dtype`, that the largest weight of a leaf must have, unless all are zero. Below,
rounding the extremes outwards widens the range of a block by more than an eighth, and eventually steps are
subnormal."""

_SPREAD = 4.4
"""Range of a block of 32 to 64 Gaussian weights over their standard deviation."""


@dataclasses.dataclass(frozen=True)
class Uniform(Codec):
    """Each block is quantized uniformly between its extremes, with few bits if it is smooth and many if it is not.

    A block whose population standard deviation is below `threshold` takes `low_bits` per weight, any other `high_bits`
    (equations 1 to 3). Its grid runs from minimum to maximum in `2 ** bits - 1` steps (equations 4 and 5). The header
    stores both extremes and one bit for the width: 33 bits per block with `float16` extremes.

    The minimum is rounded down and the maximum up to `header_dtype`, and the grid runs between the rounded values. So
    nothing clips, and every weight comes back within half a step of its block, up to float32 rounding. (A block with a
    range below 3e-36, whose step would be subnormal in float32, decodes to its minimum.) With float16 extremes, a step
    is never finer than the float16 grid near the weights, 6e-8 around zero; so a leaf without a weight of at least
    2**-20 is refused, and needs `header_dtype="float32"`.

    Args:
        block_size: weights per block, 2 to 65536.
        low_bits: bits per weight of a smooth block, 1 to 7.
        high_bits: bits per weight of any other block, above `low_bits` and at most 8.
        threshold: standard deviation from which a block is wide, in units of the weights; 0 makes every block wide, inf
            none, and anything between must be at least 1e-18. `"auto"` lets the target set it, relative to the scale of
            each leaf.
        header_dtype: dtype of the stored extremes, `"float16"` or `"float32"`; float16 holds weights up to 65504.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if an argument is not a number.

    Examples:
        >>> Uniform(block_size=32).formats
        (UniformFormat(block_size=32, widths=(4, 8), header_dtype='float16'),)
    """

    id: ClassVar[str] = "uniform"

    block_size: int = 64
    low_bits: int = 4
    high_bits: int = 8
    threshold: float | Literal["auto"] = 0.05
    header_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        for name in ("block_size", "low_bits", "high_bits"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        if not 2 <= self.block_size <= 2**16:
            raise ArgumentError(
                "block_size", f"is {self.block_size}; a block holds at least 2 weights, and at most 65536"
            )
        if not 1 <= self.low_bits < self.high_bits <= 8:
            raise ValueError(
                f"low_bits is {self.low_bits} and high_bits is {self.high_bits}; "
                "they need 1 <= low_bits < high_bits <= 8"
            )
        if self.threshold != "auto":
            object.__setattr__(self, "threshold", _threshold(self.threshold))
        if self.header_dtype not in ("float16", "float32"):
            raise ArgumentError("header_dtype", f"is {self.header_dtype!r}; it can be 'float16' or 'float32'")

    @property
    def formats(self) -> tuple[UniformFormat]:
        widths = (self.low_bits, self.high_bits)
        widths = widths[1:] if self.threshold == 0 else widths[:1] if self.threshold == math.inf else widths
        return (UniformFormat(self.block_size, widths, self.header_dtype),)

    @property
    def rate_controlled(self) -> bool:
        return self.threshold == "auto"

    @property
    def encoder(self) -> "Uniform":
        return self if self.threshold in (0, math.inf) else dataclasses.replace(self, threshold="auto")

    @property
    def default_bits(self) -> float:
        # A quarter of the blocks wide.
        header = 16 * jnp.dtype(self.header_dtype).itemsize + 1
        return self.low_bits + (self.high_bits - self.low_bits) / 4 + header / self.block_size

    def decided(self, form: Format, slope: float, rms: float) -> "Uniform":
        threshold = max(rms * math.sqrt(slope * self._worth), TINY)
        return dataclasses.replace(self, threshold=threshold) if self.rate_controlled else self

    @property
    def _worth(self) -> float:
        """The variance of a block, relative to the slope, at which wide codes save as much error as their bits cost."""
        saved = _SPREAD**2 / 12 * ((2**self.low_bits - 1) ** -2 - (2**self.high_bits - 1) ** -2)
        return (self.high_bits - self.low_bits) / saved

    def leaf_params(
        self, form: Format, leaf: LeafStatistics, blocks: BlockStatistics, leaves: Leaves, slope: Any
    ) -> LeafParams:
        """The threshold; an automatic one is where wide codes save as much error as their bits cost."""
        xp = namespace(leaf.rms)
        if self.threshold != "auto":
            return {"threshold": xp.full_like(leaf.rms, self.threshold)}
        return {"threshold": xp.maximum(xp.sqrt(slope * self._worth) * leaf.rms, TINY)}  # zeros are not wide

    def encode(
        self, form: Format, blocks: Float[Array, "blocks size"], spare: Float[Array, " blocks"], leaf_params: LeafParams
    ) -> Coded:
        assert isinstance(form, UniformFormat)
        # The barrier keeps XLA:GPU from using the extremes as they were before rounding.
        wide, minimum, maximum = jax.lax.optimization_barrier(
            _statistics(form, blocks, spare, leaf_params["threshold"])
        )
        widths, header = form.chosen(wide), {"minimum": minimum, "maximum": maximum}
        # The barrier keeps XLA from computing the grid again for every weight.
        low, step = jax.lax.optimization_barrier(form.grid(widths, header))
        return Coded(widths, jax.vmap(_quantize)(blocks, low, step), header)

    def fits(self, header: Mapping[str, Any]) -> Any:
        xp = namespace(header["minimum"])
        extremes = [abs(header[name].astype(xp.float32)) for name in ("minimum", "maximum")]
        largest = xp.maximum(*(extreme.max(initial=0) for extreme in extremes))
        finite = xp.logical_and(*(xp.isfinite(extreme).all() for extreme in extremes))
        return finite & ((largest == 0) | (largest >= SMALLEST[self.header_dtype]))

    def to_json(self) -> dict[str, Any]:
        # JSON has no infinity; from_json reads the string back.
        infinite = {"threshold": "inf"} if self.threshold == math.inf else {}
        return super().to_json() | infinite

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Uniform":
        threshold = fields.get("threshold", cls.threshold)
        return cls(**{**fields, "threshold": threshold if threshold == "auto" else float(threshold)})


def _statistics(
    form: UniformFormat,
    blocks: Float[Array, "blocks size"],
    spare: Float[Array, " blocks"],
    threshold: Float[Array, " blocks"],
) -> tuple[Array, Array, Array]:
    """Equations 1 to 3: whether each block is wide, and its extremes rounded outwards."""
    dtype = jnp.dtype(form.header_dtype)
    minimum = _round_down(blocks.min(1), dtype)
    maximum = -_round_down(-blocks.max(1), dtype)
    count = blocks.shape[1] - spare
    mean = totals(blocks, spare) / count
    # A NaN always shows in the mean; XLA's minimum and maximum may ignore it.
    in_range = jnp.isfinite(maximum.astype(jnp.float32) - minimum.astype(jnp.float32)) & ~jnp.isnan(mean)
    minimum = jnp.where(in_range, minimum, jnp.full_like(minimum, jnp.nan))
    if len(form.widths) == 1:
        return jnp.ones_like(in_range), minimum, maximum
    variance = totals(jnp.square(blocks - mean[:, None]), spare) / count
    return ~(jnp.sqrt(jnp.maximum(variance, 0)) < threshold), minimum, maximum


def _quantize(block: Float[Array, " size"], low: Float[Array, ""], step: Float[Array, ""]) -> UInt[Array, " size"]:
    """Equation 5 of one block, forward. A constant block has step 0 and codes 0."""
    scaled = divide(block - low, jnp.where(step > 0, step, jnp.inf))
    return jax.lax.bitcast_convert_type(scaled + _ROUND, jnp.uint32) & 0xFF


def _round_down(x: Float[Array, " blocks"], dtype: jnp.dtype) -> Float[Array, " blocks"]:
    """The largest numbers of `dtype` that do not exceed `x`. Zero becomes -0.0, so that no header is all zero bits."""
    y = rounded(x, dtype)
    y = jnp.where(y.astype(x.dtype) > x, jnp.nextafter(y, jnp.full_like(y, -jnp.inf)), y)
    return jnp.where(y == 0, jnp.full_like(y, -0.0), y)


def _threshold(value: Any) -> float:
    try:
        threshold = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"threshold is {value!r}; it must be a number, or 'auto'") from None
    if math.isfinite(threshold) and threshold > _LARGEST:
        raise ValueError(f"threshold is {threshold}, beyond float32; give inf for never wide")
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it is a standard deviation: 0 or more, inf for never wide")
    return threshold
