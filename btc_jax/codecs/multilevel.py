"""The codec with the smallest error at equal stored bits: widths 0 to 8 by rate and distortion, one byte of header.

It takes the idea of the paper, that the spread of a block decides its bits, to its end. If a bit is worth the same
everywhere, all blocks end up with nearly the same step; so a block's range tells its width, and both fit in 5 bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from btc_jax._errors import ArgumentError
from btc_jax._typing import Array, Float, UInt8
from btc_jax.codecs.base import Codec, Coded, LeafParams, positive
from btc_jax.codecs.statistics import TINY, BlockStatistics, LeafStatistics, Leaves, totals
from btc_jax.formats import Format, MultilevelFormat
from btc_jax.formats.base import integer, namespace
from btc_jax.formats.multilevel import HALVES, OCTAVE, OFFSETS, ON_A_LEVEL, SPACING, TOP, cubic, grid_of

Effort = Literal["fast", "exhaustive"]

_RATIO = 2.25
"""Smallest step over the root of the slope. For an even error it would be sqrt(6 / log(2)) = 2.9 for the middle of the
four steps, so 2.3 for the smallest; between 2.0 and 2.5 it made no difference on real networks, beyond it did."""
_LARGEST = 1e36
"""Larger weights could overflow in float32."""
SMALLEST = 1e-36
"""Unless all are equal, some weight must be at least this far from the centre, or precision is lost: XLA flushes
subnormal numbers to 0."""
_PULL = 0.25
"""A leaf is centred on its mean if that is at least this fraction of its root mean square."""
_INVERSE = (1.33066348, -0.71729421, 0.78809418, -0.59000503, 0.18875069)
"""Coefficients of `y`, `y ** 3`, ... in a minimax approximation of the inverse of the cubic."""
_EDGE = 0.999
"""Weights beyond this fraction of the half-range are clipped to it, and so take the outermost level at any width."""
_EXHAUSTIVE = (-9, 3)
"""Ranges that are tried, as a slice of quarter octaves from the natural one, which just covers the block."""
_TRIED = {
    5: [(-2, 0), (1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1)],
    8: [(-3, -1), (1, 0), (-1, 1), (0, 0), (0, 1), (0, -1)],
    24: [(-1, 0), (1, 0), (1, 1), (0, 0), (0, 1), (0, -1)],
    TOP: [(2, 0), (3, 0), (1, 0), (1, 1), (0, 0), (0, 1)],
}
"""What "fast" tries in blocks of natural ranges up to these: ranges from the natural one, and places from the nearest
offset to the second nearest. Exchanging any one was found to cost no less, over networks and random numbers of many
kinds at 1 to 8 bits; from 3 bits on they lose a third of what 12 do, of ranges from -4 to 1 and two offsets each. In
the last, bits may be worth nothing, and wider ranges pay. Beyond `TOP - 2` the first two give way to escapes."""
_TRIED_AT_A_WIDTH = {
    TOP: [(-3, -1), (-2, -1), (-1, 0), (-1, 1), (-1, -1), (1, 0), (1, 1), (1, -1), (0, 0), (0, 1), (0, -1)]
}
"""The same for blocks of one fixed width. Escapes are always tried there, since they have a level on the centre."""


@dataclasses.dataclass(frozen=True)
class Multilevel(Codec):
    """Each block takes the width, range and offset that minimize `error + slope * bits`.

    The levels of a block are denser in the middle, where the weights are, and its one-byte header gives range, offset
    and width: see `MultilevelFormat`.

    Args:
        block_size: weights per block, 32 or 64; 16 to 256 work.
        width: one width, 0 to 8 bits, for all blocks of a leaf, so that codes lie at a constant stride; `"leaf"` lets
            the target choose one for each leaf. By default each block has its own.
        effort: `"fast"` tries the ranges and offsets near those that a block's extremes suggest, `"exhaustive"` all
            that could be better; the format is the same.
        slope: Lagrange multiplier of the rate-distortion cost: the extra squared error, relative to the leaf's mean
            square, accepted to save one bit. By default the target sets it.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if a number is not whole.

    Examples:
        >>> Multilevel().formats, len(Multilevel(width="leaf").formats)
        ((MultilevelFormat(block_size=32, width=None),), 9)
    """

    id: ClassVar[str] = "multilevel"

    block_size: int = 32
    width: int | Literal["leaf"] | None = None
    effort: Effort = "fast"
    slope: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", integer("block_size", self.block_size))
        if not 16 <= self.block_size <= 256:
            raise ArgumentError("block_size", f"is {self.block_size}; it can be 16 to 256, and is best at 32 or 64")
        if self.width not in (None, "leaf"):
            object.__setattr__(self, "width", integer("width", self.width))
            if not 0 <= self.width <= 8:
                raise ArgumentError("width", f"is {self.width}; it can be 0 to 8 bits, or 'leaf'")
        if self.effort not in ("fast", "exhaustive"):
            raise ArgumentError("effort", f"is {self.effort!r}; it can be 'fast' or 'exhaustive'")
        if self.slope is not None:
            if self.width is not None:
                raise ArgumentError(
                    "slope", f"is {self.slope!r} and width {self.width!r}; one decides the other: give one"
                )
            object.__setattr__(self, "slope", positive("slope", self.slope))
            if not 1e-30 <= self.slope <= 1e30:
                raise ArgumentError("slope", f"is {self.slope!r}; it can be 1e-30 to 1e30")

    @property
    def formats(self) -> tuple[MultilevelFormat, ...]:
        widths = range(9) if self.width == "leaf" else (self.width,)
        return tuple(MultilevelFormat(self.block_size, width) for width in widths)

    @property
    def rate_controlled(self) -> bool:
        return self.slope is None and not isinstance(self.width, int)

    @property
    def encoder(self) -> "Multilevel":
        return Multilevel(self.block_size, effort=self.effort)

    def decided(self, form: Format, slope: float, rms: float) -> "Multilevel":
        assert isinstance(form, MultilevelFormat)
        if form.width is not None:
            return dataclasses.replace(self, width=form.width)
        return dataclasses.replace(self, slope=slope) if self.rate_controlled else self

    def to_json(self) -> dict[str, Any]:
        # What only encoding needs is left out if it has its default.
        usual = {"effort": "fast", "slope": None}
        return {name: value for name, value in super().to_json().items() if name not in usual or value != usual[name]}

    def leaf_params(
        self, form: Format, leaf: LeafStatistics, blocks: BlockStatistics, leaves: Leaves, slope: Any
    ) -> LeafParams:
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
        self, form: Format, blocks: Float[Array, "blocks size"], spare: Float[Array, " blocks"], leaf_params: LeafParams
    ) -> Coded:
        assert isinstance(form, MultilevelFormat)
        header = self._headers(form, blocks, spare, leaf_params)
        widths = form.widths_of(header)
        grid = lax.optimization_barrier(grid_of(header, widths, leaf_params["step"]))
        return Coded(widths, jax.vmap(_nearest)(blocks - leaf_params["centre"][:, None], *grid), {"header": header})

    def fits(self, header: Mapping[str, Any]) -> Any:
        xp = namespace(header["step"])
        return xp.isfinite(header["step"]).all() & xp.isfinite(header["centre"]).all()

    def _headers(
        self,
        form: MultilevelFormat,
        blocks: Float[Array, "blocks size"],
        spare: Float[Array, " blocks"],
        leaf_params: LeafParams,
    ) -> UInt8[Array, " blocks"]:
        """The cheapest header for each block, among those that its extremes suggest."""
        x = (blocks - leaf_params["centre"][:, None]) * (1 / leaf_params["step"])[:, None]
        slope = leaf_params["slope"] * jnp.square(leaf_params["unit"] / leaf_params["step"])
        tried = self._candidates(form, *_suggested(x))

        def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            header = tried[i]
            cost = _cost(form, x, spare, header, slope)
            return jnp.minimum(best[0], cost), jnp.where(cost < best[0], header, best[1])

        nothing = totals(jnp.square(x), spare), jnp.zeros_like(tried[0])
        return lax.fori_loop(0, tried.shape[0], body, nothing)[1]

    def _candidates(
        self, form: MultilevelFormat, natural: Array, middle: Array, escape: Array
    ) -> UInt8[Array, "tried blocks"]:
        """The headers to try for blocks with these suggestions; 0, for no payload, is always tried."""
        natural, middle, escape = natural[None], middle[None], escape[None]
        if self.effort == "exhaustive":
            ranges, offsets = np.mgrid[slice(*_EXHAUSTIVE), :OFFSETS].astype(np.int32).reshape(2, -1, 1)
            regular = jnp.clip(natural + ranges, 1, TOP) * OFFSETS + offsets
            escapes = jnp.arange(1, OFFSETS, dtype=jnp.int32)[:, None]
            return jnp.concatenate([regular, jnp.broadcast_to(escapes, (OFFSETS - 1, natural.size))]).astype(jnp.uint8)
        tried = _TRIED if form.width is None else _TRIED_AT_A_WIDTH
        beyond, side = jnp.asarray(tried[TOP], jnp.int32).T[..., None]
        for most in sorted(tried, reverse=True)[1:]:
            own = jnp.asarray(tried[most], jnp.int32).T[..., None]
            beyond, side = jnp.where(natural <= most, own, jnp.stack((beyond, side)))
        r = jnp.clip(natural + beyond, 1, TOP)
        place = middle * jnp.exp2(-r.astype(jnp.float32) / OCTAVE) * (1 / SPACING) + (OFFSETS - 1) / 2
        near = jnp.round(place)
        offset = near.astype(jnp.int32) + jnp.where(place < near, -side, side)
        regular = r * OFFSETS + jnp.clip(offset, 0, OFFSETS - 1)
        escapes = jnp.maximum(escape - jnp.arange(2, dtype=jnp.int32)[:, None], 1)
        if form.width is not None:
            return jnp.concatenate([regular, escapes]).astype(jnp.uint8)
        return regular.at[:2].set(jnp.where(natural > TOP - 2, escapes, regular[:2])).astype(jnp.uint8)


def _cost(
    form: MultilevelFormat,
    x: Float[Array, "blocks size"],
    spare: Float[Array, " blocks"],
    header: UInt8[Array, " blocks"],
    slope: Float[Array, " blocks"],
) -> Float[Array, " blocks"]:
    """Squared error plus slope times bits, in squares of the step. Arithmetic is faster here than lookup tables."""
    r, offset = (part.astype(jnp.int32) for part in (header // OFFSETS, header % OFFSETS))
    half = jnp.exp2(jnp.where(r > 0, r, 8 * OCTAVE + offset * (offset - 1)).astype(jnp.float32) / OCTAVE)
    width = jnp.where(r > 0, r // OCTAVE + 1, 8) if form.width is None else jnp.full_like(r, form.width)
    on_a_level = float(ON_A_LEVEL[form.widths[-1]])
    middle = jnp.where(r > 0, (offset.astype(jnp.float32) - (OFFSETS - 1) / 2) * SPACING, on_a_level)
    n = (1 << width).astype(jnp.float32)
    inverse, middle, n, step, shift = (a[:, None] for a in (1 / half, middle, n, 2 / n, (1 - n) / n))
    y = x * inverse - middle
    q = jnp.round(_inverse(jnp.clip(y, -_EDGE, _EDGE)) * (n / 2) + (n - 1) / 2)
    error = totals(jnp.square(y - cubic(q * step + shift)), spare)
    return jnp.square(half) * error + slope * (form.block_size * width.astype(jnp.float32))


def _suggested(x: Float[Array, "blocks size"]) -> tuple[Array, Array, Array]:
    """What the extremes of blocks suggest: the range that just covers each, its middle, and the header of its
    escape."""
    low, high = x.min(1), x.max(1)
    half, middle = (high - low) / 2, (high + low) / 2
    reach = half + jnp.abs(middle)
    holds = jnp.maximum(half, reach / (1 + (OFFSETS - 1) / 2 * SPACING))
    natural = jnp.ceil(OCTAVE * jnp.log2(jnp.maximum(holds, TINY)))
    beyond = jnp.maximum(jnp.log2(jnp.maximum(reach, 1)) - 8, 0)
    escape = jnp.clip(jnp.ceil((1 + jnp.sqrt(1 + 16 * beyond)) / 2), 1, OFFSETS - 1)
    return natural.astype(jnp.int32), middle, escape.astype(jnp.int32)


def _centre(leaf: LeafStatistics) -> Any:
    """The mean of a leaf whose weights lie well to one side of zero, otherwise 0; for equal weights, exactly their
    value."""
    xp = namespace(leaf.rms)
    aside = xp.where(abs(leaf.mean) >= _PULL, leaf.mean * leaf.rms, 0 * leaf.rms)
    # A NaN always shows in the mean; XLA's minimum and maximum may ignore it.
    return xp.where(xp.isnan(leaf.mean), xp.nan, xp.where(leaf.low == leaf.high, leaf.low, aside))


def _inverse(y: Array) -> Array:
    """The `u` whose cubic is `y`, for `y` from -1 to 1, with an error of at most 0.0002."""
    u = jnp.float32(_INVERSE[-1])
    for coefficient in _INVERSE[-2::-1]:
        u = u * (y * y) + coefficient
    return y * u


def _nearest(block: Float[Array, " size"], half: Array, middle: Array, n: Array) -> UInt8[Array, " size"]:
    """The codes of the nearest of `n` levels; the lower of two that are equally near."""
    y = jnp.where(half > 0, block * (1 / jnp.where(half > 0, half, 1)) - middle, -1)
    y = jnp.clip(y, -1, 1)
    # Levels lie at odd multiples of `1 / n`; their middles, before the cubic, at even ones.
    between = jnp.round(_inverse(y) * (n / 2))
    u = between * (2 / n)
    above = y > u * ((0.75 + 0.75 / (n * n)) + 0.25 * (u * u))
    return (between + (n / 2 - 1) + above.astype(jnp.float32)).astype(jnp.uint8)
