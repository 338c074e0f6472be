"""Some blocks of a leaf that speak for all of them.

The loudest blocks are all among them; of the others every k-th in the order of their energy, which tells their widths
and errors nearly. So the sum over all blocks is estimated several times better than from as many drawn at random.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from btc_jax.codecs import BlockStatistics
from btc_jax.tiles import Blocks

_LOUDEST_SHARE = 8
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


def samples_of(blocks: Blocks, statistics: BlockStatistics, counts: Sequence[int]) -> tuple[Sample, ...]:
    """Samples of at most so many blocks, or of all."""
    if blocks.count <= min(counts):
        return (_sample(blocks, statistics, np.arange(blocks.count), np.ones(blocks.count)),) * len(counts)
    rising = _rising(energies(statistics))
    return tuple(_sample(blocks, statistics, *_chosen(rising, count)) for count in counts)


def _sample(blocks: Blocks, statistics: BlockStatistics, chosen: np.ndarray, share: np.ndarray) -> Sample:
    of_chosen = BlockStatistics(*(values[chosen] for values in statistics))
    return Sample(blocks.rows(chosen), blocks.spare[chosen], share, of_chosen)


def energies(statistics: BlockStatistics) -> Any:
    """Sum of the squared weights of each block."""
    return np.square(np.maximum(statistics.high, -statistics.low)) * statistics.square * statistics.count


def _rising(energy: np.ndarray) -> np.ndarray:
    """Places of blocks by energy, to 2 digits: numbers of 16 bits are sorted ten times as fast."""
    relative = (energy / max(energy.max(), 1e-300)).astype(np.float32)
    return np.argsort((relative.view(np.uint32) >> 16).astype(np.uint16), kind="stable")


def _chosen(rising: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of blocks, and how many each stands for."""
    if len(rising) <= count:
        return rising, np.ones(len(rising))
    loud = max(count // _LOUDEST_SHARE, 1)
    others, rest = len(rising) - loud, max(count - loud, 1)
    every = others / rest
    picked = rising[((np.arange(rest) + 0.5) * every).astype(np.int64)]
    return np.concatenate([picked, rising[others:]]), np.concatenate([np.full(rest, every), np.ones(loud)])
