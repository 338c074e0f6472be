"""What leaves cost at given slopes, in bytes and error. The blocks of all leaves form one matrix, with a slope for
each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from btc_jax import coding
from btc_jax._mesh import off_mesh
from btc_jax.allocate.sample import Sample
from btc_jax.allocate.survey import Survey, stacked
from btc_jax.codecs import BlockStatistics, Codec, Leaves
from btc_jax.coding import Recipe
from btc_jax.formats import Format
from btc_jax.planes import plane_specs, row_layout
from btc_jax.sizes import header_nbytes, nbytes_by_width
from btc_jax.tiles import Blocks


class Costs(NamedTuple):
    """Costs of leaves, as arrays over them.

    Attributes:
        nbytes: bytes of everything stored.
        error: the squared error over the square of the weights.
        nbytes_variance, error_variance: the variance of both estimates; 0 where every block was sampled.
    """

    nbytes: np.ndarray
    error: np.ndarray
    nbytes_variance: np.ndarray
    error_variance: np.ndarray


class Matrix:
    """Sampled blocks of several leaves that one codec encodes into one format.

    Args:
        owners: for each item, the number of the leaf that it is, or is a piece of.
    """

    def __init__(
        self, codec: Codec, form: Format, surveys: Sequence[Survey], level: int, owners: np.ndarray | None = None
    ):
        self._owners = owners if owners is not None and len(np.unique(owners)) < len(owners) else None
        samples = [survey.samples[level] for survey in surveys]
        self._recipe = Recipe(codec, form, "stored")
        self._whole = stacked([survey.whole for survey in surveys])
        self._leaves = Leaves(np.cumsum([0, *(len(sample.rows) for sample in samples[:-1])]))
        self._statistics = BlockStatistics(*map(np.concatenate, zip(*(s.statistics for s in samples), strict=True)))
        self._share = np.concatenate([sample.share for sample in samples])
        rows = np.concatenate([sample.rows for sample in samples])
        self._blocks = Blocks(rows.reshape(-1), np.concatenate([s.spare for s in samples]), form.block_size)
        self._header = np.array([header_nbytes(form, int(count)) for count in self._whole.count])
        self._scale = self._spread(np.where(self._whole.rms > 0, self._whole.rms, 1))
        self._pairs = _neighbours(samples)
        self._known: dict[bytes, Costs] = {}

    def costs(self, slopes: np.ndarray) -> Costs:
        """At a slope for each leaf."""
        if (key := slopes.tobytes()) not in self._known:
            self._known[key] = self._costs(slopes)
        return self._known[key]

    @off_mesh
    def _costs(self, slopes: np.ndarray) -> Costs:
        leaf_params = coding.params_of_leaf(self._recipe, self._whole, self._statistics, self._leaves, slopes)
        leaf_params = {name: self._spread(numbers) for name, numbers in leaf_params.items()}
        tiles = coding.encoded(self._blocks, self._recipe, leaf_params, self._scale)
        widths = np.concatenate([tile.widths for tile in tiles])
        noise = np.concatenate([tile.noise for tile in tiles]).astype(np.float64)
        nbytes, error = np.array(nbytes_by_width(self._recipe.form), np.float64)[widths], noise
        weights = np.maximum(self._whole.count, 1)
        return Costs(
            self._header + self._leaves.sum(self._share * nbytes) + self._padding(widths),
            self._leaves.sum(self._share * error) / weights,
            self._leaves.sum(self._variance(nbytes)),
            self._leaves.sum(self._variance(error)) / weights**2,
        )

    def _padding(self, widths: np.ndarray) -> np.ndarray | float:
        """Bytes of the zeros that pad the planes of each piece to the length of the longest."""
        if self._owners is None:
            return 0.0
        form, padding = self._recipe.form, np.zeros(len(self._owners))
        for spec in plane_specs(form.widths):
            rows = self._leaves.sum(self._share * (widths >= spec.end))
            most = np.zeros(int(self._owners.max()) + 1)
            np.maximum.at(most, self._owners, rows)
            padding += (most[self._owners] - rows) * row_layout(form.block_size, spec.bits).nbytes
        return padding

    def _spread(self, numbers: np.ndarray) -> np.ndarray:
        return self._leaves.spread(numbers, len(self._share))

    def _variance(self, values: np.ndarray) -> np.ndarray:
        """Variance of each block's estimate for the blocks it represents: that between blocks of similar energy."""
        differences = np.zeros_like(values)
        differences[self._pairs] = np.square(values[self._pairs + 1] - values[self._pairs]) / 2
        return self._share * (self._share - 1) * differences


def _neighbours(samples: Sequence[Sample]) -> np.ndarray:
    """The blocks that represent others and are followed by another such block of the same leaf."""
    share = np.concatenate([sample.share for sample in samples])
    leaf = np.repeat(np.arange(len(samples)), [len(sample.share) for sample in samples])
    return np.flatnonzero((share[:-1] > 1) & (share[1:] > 1) & (leaf[:-1] == leaf[1:]))
