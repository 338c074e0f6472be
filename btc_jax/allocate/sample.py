"""Some blocks of a leaf that speak for all of them.

The loudest blocks are all among them; of the others every k-th in the order of their energy, which tells their widths
and errors nearly. So the sum over all blocks is estimated several times better than from as many drawn at random.
"""

from typing import Any, NamedTuple

import numpy as np

from btc_jax.codecs import BlockStatistics
from btc_jax.tiles import Blocks

_LOUD = 8
"""One in so many of the sampled blocks is one of the loudest."""


class Sample(NamedTuple):
    """Blocks of a leaf, by rising energy where they stand for others.

    Attributes:
        rows: their weights, `f32[blocks, block_size]`; a short one is filled up with its last weight.
        spare: how many places of each are filled up.
        share: how many blocks of the leaf each stands for, itself included.
        statistics: theirs.
    """

    rows: np.ndarray
    spare: np.ndarray
    share: np.ndarray
    statistics: BlockStatistics


def sample_of(blocks: Blocks, statistics: BlockStatistics, count: int) -> Sample:
    """At most so many blocks, or all."""
    chosen, share = _chosen(energies(statistics), count)
    of_chosen = BlockStatistics(*(values[chosen] for values in statistics))
    return Sample(blocks.rows(chosen), blocks.spare[chosen], share, of_chosen)


def energies(statistics: BlockStatistics) -> Any:
    """Sum of the squared weights of each block."""
    return np.square(np.maximum(statistics.high, -statistics.low)) * statistics.square * statistics.count


def _chosen(energy: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of blocks, and how many each stands for."""
    if len(energy) <= count:
        return np.arange(len(energy)), np.ones(len(energy))
    rising, loud = np.argsort(energy, kind="stable"), max(count // _LOUD, 1)
    others, rest = len(energy) - loud, max(count - loud, 1)
    every = others / rest
    picked = rising[((np.arange(rest) + 0.5) * every).astype(np.int64)]
    return np.concatenate([picked, rising[others:]]), np.concatenate([np.full(rest, every), np.ones(loud)])
