"""One pass over a leaf: its statistics, and a sample of its blocks for the search of a slope."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from btc_jax import coding
from btc_jax._errors import LeafError
from btc_jax._mesh import off_mesh
from btc_jax._typing import Order
from btc_jax.allocate.sample import Sample, energies, samples_of
from btc_jax.blocks import with_taps
from btc_jax.codecs import BlockStatistics, Codec, LeafStatistics, Leaves
from btc_jax.codecs.statistics import whole
from btc_jax.large import LargeLeaf
from btc_jax.processes import together
from btc_jax.tiles import blocks_in

LEVELS = (2**14, 2**16)
"""Sampled blocks of all leaves in total: first to find the slope roughly, then to confirm it."""
_LEAST = (64, 256)
"""Minimum number of blocks of each leaf."""
_OUTLYING = 64
"""Cap on a block's energy in the scale of its leaf, as a multiple of the median, so that an outlier does not set it."""


class Item(NamedTuple):
    """A leaf that is to be packed.

    Attributes:
        path: its name in error messages.
        read: returns its values; called once, so that they need not stay in memory.
        shape: its shape.
        codec: how its blocks are coded.
        order: its layout.
        allow_transform: whether the allocator may switch to the layout with transformed taps.
        weight: factor of its squared error in the total.
        matrix: number of weights of the matrix that it is part of; 0 for its own.
        here: of a piece of a leaf that lies in several processes, whether this one has it; `None` for any other.
    """

    path: str
    read: Callable[[], Any]
    shape: tuple[int, ...]
    codec: Codec
    order: Order
    allow_transform: bool = False
    weight: float = 1.0
    matrix: int = 0
    here: bool | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.size // self.codec.block_size)


class Survey(NamedTuple):
    """What is known of a leaf in a layout.

    Attributes:
        order: the order.
        whole: statistics of all weights.
        scale: root mean square of the weights, with the energy of outlier blocks capped.
        samples: sampled blocks, for each of `LEVELS`.
    """

    order: Order
    whole: LeafStatistics
    scale: float
    samples: tuple[Sample, ...]


@off_mesh
def surveys(item: Item, total: int, taps: bool = True) -> list[Survey]:
    """Surveys in the layout of the item and, if allowed, in the one with transformed taps.

    Args:
        total: blocks of all leaves.
        taps: whether any leaf may have the latter.

    Raises:
        ValueError: if a weight is NaN, infinite, or too large to calculate with.
    """
    leaf = item.read()
    leaf = leaf if isinstance(leaf, jax.Array | LargeLeaf) else np.asarray(leaf)  # read once, for both orders
    # The transform mixes all taps, which need not be in one panel.
    free = taps and item.allow_transform and item.codec.rate_controlled and not isinstance(leaf, LargeLeaf)
    transformed = with_taps(item.shape, item.order) if free else None
    orders: list[Order] = [item.order] if transformed is None else [item.order, transformed]
    return [_survey(item, leaf, order, total) for order in orders]


def surveys_of_all(items: Sequence[Item], taps: bool) -> list[list[Survey]]:
    """The surveys of all items, each made by a process that has it."""
    total = sum(item.blocks for item in items)

    def here() -> dict[int, list[Survey]]:
        return {i: surveys(item, total, taps) for i, item in enumerate(items) if item.here is not False}

    found = here() if all(item.here is None for item in items) else together(here)
    return [found[i] for i in range(len(items))]


def _survey(item: Item, leaf: Any, order: Order, total: int) -> Survey:
    blocks = blocks_in(leaf, item.codec.block_size, order)
    statistics = coding.statistics_in(blocks)
    found = whole(statistics, Leaves())
    if math.isnan(found.mean) or max(found.high, -found.low) > 1e36:
        raise LeafError(item.path, coding.what_does_not_fit(leaf))
    counts = [
        max(least, math.ceil(level * blocks.count / max(total, 1))) for level, least in zip(LEVELS, _LEAST, strict=True)
    ]
    samples = samples_of(blocks, statistics, counts)
    return Survey(order, found, _scale(statistics, float(found.rms)), samples)


def _scale(statistics: BlockStatistics, rms: float) -> float:
    if not rms:
        return 0.0
    squares = energies(statistics) / statistics.count / rms**2
    squares = np.minimum(squares, _OUTLYING * np.median(squares)) if np.median(squares) else squares
    return min(rms * math.sqrt(np.mean(squares)), rms)


def stacked(found: Sequence[LeafStatistics]) -> LeafStatistics:
    """The statistics of several leaves, as arrays over them."""
    return LeafStatistics(*(np.array(values, np.float64) for values in zip(*found, strict=True)))
