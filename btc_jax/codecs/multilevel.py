"""The codec with the smallest error at equal stored bits: widths 0 to 8 by rate and distortion, one byte of header.

It takes the idea of the paper, that the spread of a block decides its bits, to its end. If a bit is worth the same
everywhere, all blocks end up with nearly the same step; so a block's range tells its width, and both fit in 5 bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from btc_jax._typing import Array, Float, UInt, UInt8
from btc_jax._xla import divide
from btc_jax.codecs.base import Codec, Coded, Setting, positive
from btc_jax.codecs.statistics import TINY, BlockStatistics, LeafStatistics, Leaves, total
from btc_jax.formats import Format, MultilevelFormat
from btc_jax.formats.base import integer, namespace
from btc_jax.formats.multilevel import HALVES, OCTAVE, OFFSETS, SPACING, TOP, cubic, grid_of, take

Effort = Literal["fast", "exhaustive"]

_RATIO = 2.25
"""Smallest step over the root of the slope. For an even error it would be sqrt(6 / log(2)) = 2.9 for the middle of the
four steps, so 2.3 for the smallest; between 2.0 and 2.5 it made no difference on real networks, beyond it did."""
_LARGEST = 1e36
"""Weights beyond this leave no room to calculate in float32."""
SMALLEST = 1e-36
"""Unless all are equal, a weight must be as far from the centre, or digits get lost. Subnormal numbers are 0 to XLA."""
_PULL = 0.25
"""A leaf is centred on its mean where that is at least this part of its root mean square."""
_WINDOW = {"fast": (-4, 1), "exhaustive": (-9, 2)}
"""The ranges that are tried, in quarter octaves from the one that just holds the block."""


@dataclasses.dataclass(frozen=True)
class Multilevel(Codec):
    """Each block takes the width, range and offset with the least error plus slope times bits.

    The levels of a block lie closer in the middle, where the weights are, and its header is one byte that tells range,
    place and width: see `MultilevelFormat`.

    Args:
        block_size: weights per block, 32 or 64; 16 to 256 work.
        width: one width, 0 to 8 bits, for every block of a leaf, so that the codes lie at even distances; `"leaf"` lets
            the target of `btc_quantize` choose it for each leaf, `None` a width for each block.
        effort: `"fast"` tries the ranges and offsets near those of a block's extremes, `"exhaustive"` all that could
            be better; the format is the same.
        slope: the squared error that saves a bit, over the mean square of the leaf's weights; `None` leaves it to the
            target of `btc_quantize`, such as `bits=4.5`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a number is not whole.

    Example:
        >>> Multilevel().formats, len(Multilevel(width="leaf").formats)
        ((MultilevelFormat(block_size=32, width=None),), 9)
    """

    id: ClassVar[str] = "multilevel"

    block_size: int = 32
    width: int | Literal["leaf"] | None = None
    effort: Effort = "fast"
    slope: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "block_size", integer("block_size", self.block_size))
        if not 16 <= self.block_size <= 256:
            raise ValueError(f"block_size is {self.block_size}; it can be 16 to 256, and is best at 32 or 64")
        if self.width not in (None, "leaf"):
            object.__setattr__(self, "width", integer("width", self.width))
            if not 0 <= self.width <= 8:
                raise ValueError(
                    f"width is {self.width}; it can be 0 to 8 bits, 'leaf', or None for each block its own"
                )
        if self.effort not in _WINDOW:
            raise ValueError(f"effort is {self.effort!r}; it can be 'fast' or 'exhaustive'")
        if self.slope is not None:
            if self.width is not None:
                raise ValueError(f"slope is {self.slope!r} and width {self.width!r}; one decides the other: give one")
            object.__setattr__(self, "slope", positive("slope", self.slope))
            if not 1e-30 <= self.slope <= 1e30:
                raise ValueError(f"slope is {self.slope!r}; it can be 1e-30 to 1e30")

    @property
    def formats(self) -> tuple[MultilevelFormat, ...]:
        widths = range(9) if self.width == "leaf" else (self.width,)
        return tuple(MultilevelFormat(self.block_size, width) for width in widths)

    @property
    def adaptive(self) -> bool:
        return self.slope is None and not isinstance(self.width, int)

    @property
    def encoder(self) -> "Multilevel":
        return Multilevel(self.block_size, effort=self.effort)

    def decided(self, form: Format, slope: float, rms: float) -> "Multilevel":
        assert isinstance(form, MultilevelFormat)
        if form.width is not None:
            return dataclasses.replace(self, width=form.width)
        return dataclasses.replace(self, slope=slope) if self.adaptive else self

    def to_json(self) -> dict[str, Any]:
        # What only encoding needs is left out where it is as usual.
        usual = {"effort": "fast", "slope": None}
        return {name: value for name, value in super().to_json().items() if name not in usual or value != usual[name]}

    def tune(self, form: Format, leaf: LeafStatistics, blocks: BlockStatistics, leaves: Leaves, slope: Any) -> Setting:
        assert isinstance(form, MultilevelFormat)
        xp, size = namespace(leaf.rms), blocks.low.shape[0]
        unit = xp.where(leaf.rms > 0, leaf.rms, 1)
        centre = _centre(leaf)
        lowest = _RATIO * xp.sqrt(slope + 0 * unit) if form.width is None else 0 * unit
        middle_of = leaves.spread(centre, size)
        peaks = xp.maximum(blocks.high - middle_of, middle_of - blocks.low) / leaves.spread(unit, size)
        # Blocks below the step become zero anyway, and must not pull the mean down.
        logs = xp.log2(xp.maximum(peaks, leaves.spread(xp.maximum(lowest, 2.0**-20), size)))
        middle = leaves.sum(logs) / xp.maximum(leaves.sum(xp.ones_like(logs)), 1)
        # The widths end at 8: ranges are moved up until most blocks find theirs, and the last escape holds the rest.
        loudest = xp.maximum(xp.maximum(leaf.high - centre, centre - leaf.low) / unit, 0)
        step = xp.maximum(lowest, xp.exp2(middle + (0.5 if form.width is None else 3) - TOP / OCTAVE))
        step = xp.maximum(step, loudest / float(HALVES[OFFSETS - 1]))
        largest = xp.maximum(leaf.high, -leaf.low)
        fits = (largest <= _LARGEST) & ((loudest * unit < TINY) | (loudest * unit >= SMALLEST))
        step = xp.where(fits, xp.maximum(step * unit, TINY), xp.nan)
        return {"centre": centre, "step": step, "unit": unit, "slope": slope + 0 * unit}

    def encode(
        self, form: Format, blocks: Float[Array, "blocks size"], spare: Float[Array, " blocks"], setting: Setting
    ) -> Coded:
        assert isinstance(form, MultilevelFormat)
        header = self._headers(form, blocks, spare, setting)
        widths = form.widths_of(header)
        grid = lax.optimization_barrier(grid_of(header, widths, setting["step"]))
        return Coded(widths, jax.vmap(_nearest)(blocks - setting["centre"][:, None], *grid), {"header": header})

    def fits(self, header: Mapping[str, Any]) -> Any:
        xp = namespace(header["step"])
        return xp.isfinite(header["step"]).all() & xp.isfinite(header["centre"]).all()

    def _headers(
        self,
        form: MultilevelFormat,
        blocks: Float[Array, "blocks size"],
        spare: Float[Array, " blocks"],
        setting: Setting,
    ) -> UInt8[Array, " blocks"]:
        """The header of least cost for each block, among the candidates that its extremes suggest."""
        unit, step = setting["unit"], setting["step"] / setting["unit"]
        first, last = _WINDOW[self.effort]
        tried = OFFSETS if self.effort == "exhaustive" else 2
        regular, escapes = (last + 1 - first) * tried, OFFSETS - 1 if self.effort == "exhaustive" else 2
        x = (blocks - setting["centre"][:, None]) / unit[:, None]
        natural, middle, escape = _suggested(x, step)

        def candidate(i: Array) -> Array:
            r = jnp.clip(natural + (first + i // tried), 1, TOP) * OFFSETS
            near = middle / (step * take(HALVES, r) * SPACING) + (OFFSETS - 1) / 2
            offset = (jnp.floor(near).astype(jnp.int32) if tried < OFFSETS else 0) + i % tried
            beyond = jnp.maximum(escape - (i - regular), 1) if escapes == 2 else i - regular + 1
            return jnp.where(i < regular, r + jnp.clip(offset, 0, OFFSETS - 1), beyond).astype(jnp.uint8)

        def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            header = candidate(i)
            cost = _cost(form, x, spare, header, step, setting["slope"])
            better = cost < best[0]
            return jnp.where(better, cost, best[0]), jnp.where(better, header, best[1])

        nothing = total(jnp.square(x), spare), jnp.zeros(x.shape[:1], jnp.uint8)
        return lax.fori_loop(0, regular + escapes, body, nothing)[1]


def _cost(
    form: MultilevelFormat, x: Array, spare: Array, header: UInt8[Array, " blocks"], step: Array, slope: Array
) -> Float[Array, " blocks"]:
    """Squared error plus slope times bits, in mean squares of the leaf."""
    widths = form.widths_of(header)
    half, middle, n = (a[:, None] for a in grid_of(header, widths, step))
    y = x * (1 / half) - middle
    q = jnp.clip(jnp.round((_inverse(y) * n + (n - 1)) / 2), 0, n - 1)
    error = total(jnp.square(y - cubic((2 * q + (1 - n)) / n)), spare)
    return jnp.square(half[:, 0]) * error + slope * (form.block_size * widths.astype(jnp.float32))


def _suggested(x: Float[Array, "blocks size"], step: Array) -> tuple[Array, Array, Array]:
    """What the extremes of blocks suggest: the range that just holds each, its middle, and the header of its escape."""
    low, high = x.min(1), x.max(1)
    half, middle = (high - low) / 2, (high + low) / 2
    reach = half + jnp.abs(middle)
    holds = jnp.maximum(half, reach / (1 + (OFFSETS - 1) / 2 * SPACING))
    natural = jnp.ceil(OCTAVE * jnp.log2(jnp.maximum(holds, TINY) / step))
    beyond = jnp.maximum(jnp.log2(jnp.maximum(reach / step, 1)) - 8, 0)
    escape = jnp.clip(jnp.ceil((1 + jnp.sqrt(1 + 16 * beyond)) / 2), 1, OFFSETS - 1)
    return natural.astype(jnp.int32), middle, escape.astype(jnp.int32)


def _centre(leaf: LeafStatistics) -> Any:
    """The mean of a leaf whose weights lie well to one side of zero, else 0; of equal weights their value, exactly."""
    xp = namespace(leaf.rms)
    aside = xp.where(abs(leaf.mean) >= _PULL, leaf.mean * leaf.rms, 0 * leaf.rms)
    # A NaN always shows in the mean; XLA's extremes may pass it by.
    return xp.where(xp.isnan(leaf.mean), xp.nan, xp.where(leaf.low == leaf.high, leaf.low, aside))


def _inverse(y: Array) -> Array:
    """The `u` of which `y` is the cubic, for levels within the range; off by 0.0003 at most. One step of Newton's."""
    y = jnp.clip(y, -1.25, 1.25)
    u = y * (1.326 - 0.326 * (y * y))
    return (2 * u * (u * u) + 4 * y) / (3 * (u * u) + 3)


def _nearest(block: Float[Array, " size"], half: Array, middle: Array, n: Array) -> UInt[Array, " size"]:
    """The codes of the nearest of `n` levels; of two as near, the lower."""
    y = jnp.where(half > 0, divide(block, jnp.where(half > 0, half, 1)) - middle, -2)
    below = jnp.clip(jnp.floor((_inverse(y) * n + (n - 1)) / 2), 0, n - 1)
    above = jnp.minimum(below + 1, n - 1)
    distances = [jnp.abs(y - cubic((2 * q + (1 - n)) / n)) for q in (below, above)]
    return jnp.where(distances[1] < distances[0], above, below).astype(jnp.uint32)
