"""Statistics of blocks and of whole leaves, which encoders need before they encode.

The statistics of a block are calculated where the weights are, in float32; those of a leaf are reductions over its
blocks: in float64 by numpy on the host, where nothing is compiled for the number of blocks, or traced under `jax.jit`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from btc_jax._typing import Array, Float
from btc_jax._xla import row_sums
from btc_jax.formats.base import namespace

TINY = float(jnp.finfo(jnp.float32).tiny)
"""Subnormal numbers are 0 to XLA."""


class BlockStatistics(NamedTuple):
    """Of blocks, arrays over them; of one block, numbers.

    Attributes:
        count: number of weights.
        low, high: extremes. They may ignore a NaN.
        mean, square: mean of the weights, and of their squares, relative to the largest weight and its square. NaN if a
            weight is not finite.
    """

    count: Any
    low: Any
    high: Any
    mean: Any
    square: Any


def statistics_of(blocks: Float[Array, "blocks size"], spare: Float[Array, " blocks"]) -> BlockStatistics:
    """The statistics of each block. Its last `spare` places repeat a weight, and do not count."""
    low, high = blocks.min(1), blocks.max(1)
    peak = jnp.maximum(high, -low)
    # Numbers near 1, so that no square vanishes.
    x = blocks / jnp.where(peak < TINY, jnp.ones_like(peak), peak)[:, None]
    count = blocks.shape[1] - spare
    return BlockStatistics(count, low, high, totals(x, spare) / count, totals(jnp.square(x), spare) / count)


def totals(values: Float[Array, "blocks size"], spare: Float[Array, " blocks"]) -> Float[Array, " blocks"]:
    """The sum of each row without its last `spare` places, which repeat one value."""
    return row_sums(values) - spare * values[:, -1]


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Which of many blocks belong to one leaf, for reductions leaf by leaf.

    Attributes:
        starts: the first block of each leaf, at least one block each; or `None` if all blocks are of one leaf, and
            reductions give numbers.
    """

    starts: np.ndarray | None = None

    def sum(self, values: Any) -> Any:
        return values.sum() if self.starts is None else np.add.reduceat(values, self.starts)

    def max(self, values: Any, initial: float = -np.inf) -> Any:
        if self.starts is None:
            return values.max(initial=initial)
        return np.maximum(np.maximum.reduceat(values, self.starts), initial)

    def min(self, values: Any) -> Any:
        return -self.max(-values)

    def spread(self, numbers: Any, blocks: int) -> Any:
        """Repeats a number for each leaf over its blocks."""
        if self.starts is None:
            return numbers
        return np.repeat(numbers, np.diff(np.append(self.starts, blocks)))


class LeafStatistics(NamedTuple):
    """Of whole leaves: arrays over them, or numbers of one.

    Attributes:
        count: number of weights.
        low, high: extremes.
        mean: of the weights, over `rms`. NaN if a weight is not finite.
        rms: root mean square of the weights, whatever their scale; 0 if none is a normal float32.
    """

    count: Any
    low: Any
    high: Any
    mean: Any
    rms: Any


@np.errstate(all="ignore")  # non-finite weights show in the mean
def whole(blocks: BlockStatistics, leaves: Leaves) -> LeafStatistics:
    """The statistics of leaves, from those of all of their blocks."""
    xp, size = namespace(blocks.low), blocks.low.shape[0]
    low, high = leaves.min(blocks.low), leaves.max(blocks.high)
    peaks = xp.maximum(blocks.high, -blocks.low)
    largest = leaves.max(peaks, initial=0)
    scale = xp.where(largest < TINY, xp.ones_like(largest), largest)
    relative = peaks / leaves.spread(scale, size)
    count = leaves.sum(blocks.count)
    at_least_one = xp.maximum(count, 1)
    rms = xp.sqrt(leaves.sum(xp.square(relative) * blocks.square * blocks.count) / at_least_one)
    mean = leaves.sum(relative * blocks.mean * blocks.count) / at_least_one / xp.where(rms > 0, rms, 1)
    return LeafStatistics(count, low, high, mean, xp.where(largest < TINY, 0 * rms, rms * scale))


def on_host(blocks: BlockStatistics) -> BlockStatistics:
    """Converts to float64, so that long sums keep their precision."""
    return BlockStatistics(*(np.asarray(values, np.float64) for values in blocks))
