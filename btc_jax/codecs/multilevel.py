"""The codec with the smallest error at equal stored bits: widths 0 to 8 by rate and distortion, one byte of header.

It takes the idea of the paper, that the spread of a block decides its bits, to its end. If a bit is worth the same
everywhere, all blocks end up with nearly the same step; so a block's range tells its width, and both fit in 5 bits.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from btc_jax._typing import Array, ArrayLike, Float, UInt, UInt8
from btc_jax._xla import divide, in_chunks
from btc_jax.codecs.base import Codec, Coded, Setting, integer, positive, root_mean_square

Effort = Literal["fast", "exhaustive"]

OCTAVE = 4
"""Ranges between one and its double: the grid of ranges is one of quarter octaves."""
TOP = 8 * OCTAVE - 1
"""The largest of the ranges that imply a width."""
OFFSETS = 8
"""Places of the middle of a block's grid."""
_SPACING = 5 / 64
"""Distance of neighbouring offsets, over the half-range: 0.1 dB better than 0.1, and exact in binary."""

# What each of the 256 headers means: tables, so that every device decodes alike.
_RANGE, _OFFSET = np.divmod(np.arange(256), OFFSETS)
_ESCAPE = 8 + _OFFSET * (_OFFSET - 1) / 4
_WIDTHS = np.where(_RANGE > 0, _RANGE // OCTAVE + 1, np.where(_OFFSET > 0, 8, 0)).astype(np.uint8)
_HALVES = np.where(_WIDTHS > 0, 2.0 ** np.where(_RANGE > 0, _RANGE / OCTAVE, _ESCAPE), 0).astype(np.float32)
"""Half-range, over the step of the leaf."""
_MIDDLES = np.where(_RANGE > 0, (_OFFSET - (OFFSETS - 1) / 2) * _SPACING, 0).astype(np.float32)
"""Middle, over the half-range."""
_LEVELS = (2.0 ** np.arange(9)).astype(np.float32)
_ON_A_LEVEL = np.where(_LEVELS > 1, -(0.75 / _LEVELS + 0.25 / _LEVELS**3), 0).astype(np.float32)
"""Middle of an escaped block by its width: a level lies on the centre, for the weights that are no outliers."""

_RATIO = 2.25
"""Smallest step over the root of the slope. For an even error it would be sqrt(6 / log(2)) = 2.9 for the middle of the
four steps, so 2.3 for the smallest; between 2.0 and 2.5 it made no difference on real networks, beyond it did."""
_LARGEST = 1e36
"""Weights beyond this leave no room to calculate in float32."""
SMALLEST = 1e-36
"""Unless all are equal, a weight must be as far from the centre, or digits get lost. Subnormal numbers are 0 to XLA."""
_TINY = float(jnp.finfo(jnp.float32).tiny)
_PULL = 0.25
"""A leaf is centred on its mean where that is at least this part of its root mean square."""
_WINDOW = {"fast": (-4, 1), "exhaustive": (-9, 2)}
"""The ranges that are tried, in quarter octaves from the one that just holds the block."""


@dataclasses.dataclass(frozen=True)
class Multilevel(Codec):
    """Each block takes the width, range and offset with the least error plus slope times bits.

    The header of a block is one byte, a range of 5 bits and an offset of 3. A range `r` from 1 to 31 is a half-range of
    `step * 2 ** (r / 4)` and implies the width `r // 4 + 1`; so the grid of every block has one of four steps. Range 0
    is a block without payload if its offset is 0. Otherwise the offset `e` tells how far beyond the others the range
    is: `step * 2 ** (8 + e * (e - 1) / 4)`, with 8 bits and a level on the centre, for the rare outlier. `step` and
    `centre` are two numbers a leaf.

    With `n = 2 ** width`, code `q` is the level `u = (2 * q + 1 - n) / n`, from -1 to 1, and the weight
    `centre + half_range * (0.75 * u + 0.25 * u ** 3 + (2 * offset - 7) * 5 / 128)`. The cubic sets levels closer in the
    middle, where the weights are, by the same proportion at any width: worth 0.3 dB over even levels, as much as tables
    of levels trained for each width, and no table has to be looked up.

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
        >>> Multilevel().widths, Multilevel(width=4).widths
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), (4,))
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
    def widths(self) -> tuple[int, ...]:
        return (self.width,) if isinstance(self.width, int) else tuple(range(9))

    @property
    def adaptive(self) -> bool:
        return self.slope is None and not isinstance(self.width, int)

    def fixed(self, slope: float, rms: float) -> "Multilevel":
        return self if isinstance(self.width, int) else dataclasses.replace(self, slope=slope)

    def traced(self, slope: ArrayLike) -> tuple[Codec, ArrayLike]:
        return (self, slope) if self.slope is None else (dataclasses.replace(self, slope=None), self.slope)

    def to_json(self) -> dict[str, Any]:
        # What only encoding needs is left out where it is as usual, and so out of files.
        usual = {"effort": "fast", "slope": None}
        return {name: value for name, value in super().to_json().items() if name not in usual or value != usual[name]}

    @property
    def stored(self) -> "Multilevel":
        return dataclasses.replace(self, effort="fast", slope=None)

    @property
    def candidates(self) -> tuple[Codec, ...]:
        if self.width != "leaf":
            return (self,)
        return tuple(dataclasses.replace(self, width=width) for width in range(9))

    def stored_header(self, blocks: int) -> dict[str, jax.ShapeDtypeStruct]:
        number = jax.ShapeDtypeStruct((1,), jnp.dtype(jnp.float32))
        return {"centre": number, "header": jax.ShapeDtypeStruct((blocks,), jnp.dtype(jnp.uint8)), "step": number}

    def tune(self, parts: Sequence[Float[Array, "_ _"]], slope: ArrayLike) -> Setting:
        slope = jnp.asarray(slope if self.slope is None else self.slope, jnp.float32)
        rms = root_mean_square(parts)
        unit = jnp.where(rms > 0, rms, 1)
        centre = _centre(parts, unit)
        lowest = jnp.float32(0) if self.width is not None else _RATIO * jnp.sqrt(slope)
        # Blocks below the step become zero anyway, and must not pull the mean down.
        logs = [jnp.log2(jnp.maximum(_largest(part - centre) / unit, jnp.maximum(lowest, 2.0**-20))) for part in parts]
        middle = functools.reduce(jnp.add, [log.sum() for log in logs]) / max(sum(log.size for log in logs), 1)
        # The widths end at 8: ranges are moved up until most blocks find theirs, and the last escape holds the rest.
        loudest = functools.reduce(jnp.maximum, [_largest(part - centre).max(initial=0) for part in parts]) / unit
        step = jnp.maximum(lowest, jnp.exp2(middle + (0.5 if self.width is None else 3) - TOP / OCTAVE))
        step = jnp.maximum(step, loudest / float(_HALVES[OFFSETS - 1]))
        largest = functools.reduce(jnp.maximum, [jnp.abs(part).max(initial=0) for part in parts])
        fits = (largest <= _LARGEST) & ((loudest * unit < _TINY) | (loudest * unit >= SMALLEST))
        step = jnp.where(fits, jnp.maximum(step * unit, _TINY), jnp.nan)
        return {"centre": centre, "step": step, "unit": unit, "slope": slope}

    def encode(self, blocks: Float[Array, "blocks size"], setting: Setting) -> Coded:
        header = self._headers(blocks, setting)
        widths = self._widths(header)
        grid = lax.optimization_barrier(_grid(header, widths, setting["step"]))
        return Coded(widths, jax.vmap(_nearest)(blocks - setting["centre"], *grid), {"header": header})

    def grid(self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array]) -> tuple[Array, ...]:
        """Per block: what makes a code a level, and a level a weight."""
        half, middle, n = _grid(header["header"], widths, header["step"])
        return 2 / n, (1 - n) / n, 0.75 * half, 0.25 * half, header["centre"] + half * middle

    def decode(self, codes: UInt[Array, "blocks *shape"], grid: tuple[Array, ...]) -> Float[Array, "blocks *shape"]:
        return jax.vmap(_dequantize)(codes, *grid)

    def pack_header(
        self, widths: UInt8[Array, " blocks"], header: Mapping[str, Array], setting: Setting
    ) -> dict[str, Array]:
        return {**header, **{name: setting[name].reshape(1) for name in ("centre", "step")}}

    def unpack_header(self, stored: Mapping[str, Array], blocks: int) -> tuple[Array, dict[str, Array]]:
        numbers = {name: stored[name].reshape(()) for name in ("centre", "step")}
        return self._widths(stored["header"]), {"header": stored["header"], **numbers}

    def read_widths(self, stored: Mapping[str, np.ndarray], blocks: int) -> np.ndarray:
        if isinstance(self.width, int):
            return np.full(blocks, self.width, np.uint8)
        return _WIDTHS[stored["header"]]

    def _headers(self, blocks: Float[Array, "blocks size"], setting: Setting) -> UInt8[Array, " blocks"]:
        """The header of least cost for each block, among the candidates that its extremes suggest."""
        unit, step = setting["unit"], setting["step"] / setting["unit"]
        first, last = _WINDOW[self.effort]
        tried = OFFSETS if self.effort == "exhaustive" else 2
        regular, escapes = (last + 1 - first) * tried, OFFSETS - 1 if self.effort == "exhaustive" else 2

        def search(blocks: Array) -> Array:
            x = (blocks - setting["centre"]) / unit
            natural, middle, escape = _suggested(x, step)

            def candidate(i: Array) -> Array:
                r = jnp.clip(natural + (first + i // tried), 1, TOP) * OFFSETS
                near = middle / (step * _take(_HALVES, r) * _SPACING) + (OFFSETS - 1) / 2
                offset = (jnp.floor(near).astype(jnp.int32) if tried < OFFSETS else 0) + i % tried
                beyond = jnp.maximum(escape - (i - regular), 1) if escapes == 2 else i - regular + 1
                return jnp.where(i < regular, r + jnp.clip(offset, 0, OFFSETS - 1), beyond).astype(jnp.uint8)

            def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
                header = candidate(i)
                cost = self._cost(x, header, step, setting["slope"])
                better = cost < best[0]
                return jnp.where(better, cost, best[0]), jnp.where(better, header, best[1])

            nothing = jnp.square(x).sum(1), jnp.zeros(x.shape[:1], jnp.uint8)
            return lax.fori_loop(0, regular + escapes, body, nothing)[1]

        return in_chunks(search, blocks)

    def _cost(self, x: Array, header: UInt8[Array, " blocks"], step: Array, slope: Array) -> Float[Array, " blocks"]:
        """Squared error plus slope times bits, in mean squares of the leaf."""
        half, middle, n = (a[:, None] for a in _grid(header, self._widths(header), step))
        y = x * (1 / half) - middle
        q = jnp.clip(jnp.round((_inverse(y) * n + (n - 1)) / 2), 0, n - 1)
        error = y - _cubic((2 * q + (1 - n)) / n)
        bits = self.block_size * self._widths(header).astype(jnp.float32)
        return jnp.square(half[:, 0]) * jnp.square(error).sum(1) + slope * bits

    def _widths(self, header: UInt8[Array, " blocks"]) -> UInt8[Array, " blocks"]:
        if isinstance(self.width, int):
            return jnp.full(header.shape, self.width, jnp.uint8)
        return _take(_WIDTHS, header)


def _take(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def _grid(header: UInt8[Array, " blocks"], widths: UInt8[Array, " blocks"], step: Array) -> tuple[Array, Array, Array]:
    """Of each block the half-range, the middle over the half-range, and the number of levels, in float32."""
    escaped = (header > 0) & (header < OFFSETS)
    middle = jnp.where(escaped, _take(_ON_A_LEVEL, widths), _take(_MIDDLES, header))
    return step * _take(_HALVES, header), middle, _take(_LEVELS, widths)


def _suggested(x: Float[Array, "blocks size"], step: Array) -> tuple[Array, Array, Array]:
    """What the extremes of blocks suggest: the range that just holds each, its middle, and the header of its escape."""
    low, high = x.min(1), x.max(1)
    half, middle = (high - low) / 2, (high + low) / 2
    reach = half + jnp.abs(middle)
    holds = jnp.maximum(half, reach / (1 + (OFFSETS - 1) / 2 * _SPACING))
    natural = jnp.ceil(OCTAVE * jnp.log2(jnp.maximum(holds, _TINY) / step))
    beyond = jnp.maximum(jnp.log2(jnp.maximum(reach / step, 1)) - 8, 0)
    escape = jnp.clip(jnp.ceil((1 + jnp.sqrt(1 + 16 * beyond)) / 2), 1, OFFSETS - 1)
    return natural.astype(jnp.int32), middle, escape.astype(jnp.int32)


def _centre(parts: Sequence[Float[Array, "_ _"]], unit: Array) -> Float[Array, ""]:
    """The mean of a leaf whose weights lie well to one side of zero, else 0; of equal weights their value, exactly."""
    count = max(sum(part.size for part in parts), 1)
    mean = functools.reduce(jnp.add, [(part / unit).sum(1).sum() for part in parts]) / count
    low = functools.reduce(jnp.minimum, [part.min(initial=jnp.inf) for part in parts])
    high = functools.reduce(jnp.maximum, [part.max(initial=-jnp.inf) for part in parts])
    aside = jnp.where(jnp.abs(mean) >= _PULL, mean * unit, 0)
    # A NaN always shows in the mean; XLA's extremes may pass it by.
    return jnp.where(jnp.isnan(mean), jnp.nan, jnp.where(low == high, low, aside))


def _largest(block: Float[Array, "blocks size"]) -> Float[Array, " blocks"]:
    return jnp.maximum(block.max(1), -block.min(1))


def _cubic(u: Array) -> Array:
    return u * (0.75 + 0.25 * (u * u))


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
    distances = [jnp.abs(y - _cubic((2 * q + (1 - n)) / n)) for q in (below, above)]
    return jnp.where(distances[1] < distances[0], above, below).astype(jnp.uint32)


def _dequantize(codes: UInt[Array, "..."], *grid: Float[Array, ""]) -> Float[Array, "..."]:
    scale, shift, linear, cubic, middle = grid
    u = codes.astype(jnp.int32).astype(jnp.float32) * scale + shift
    return middle + u * (linear + cubic * (u * u))
