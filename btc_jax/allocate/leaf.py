"""One leaf: how it may be packed, and what that costs at a slope."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from btc_jax import coding
from btc_jax._errors import LeafError
from btc_jax._mesh import gathered, off_mesh
from btc_jax._typing import Array, Order
from btc_jax.blocks import with_taps
from btc_jax.codecs import Codec
from btc_jax.codecs.base import root_mean_square

_SAMPLE = 2**16
"""Weights of a leaf that are looked at while the slope is searched for; all of them only to make sure at the end."""
_GRAIN = 4096
"""Slopes in an octave, 0.0001 bits apart, so that roundings of the weights, as by scaling them, do not move one."""
_LIKE = 0.05
"""Part by which the root mean square of those may differ from that of all."""
_LOUD = 64
"""Times the median block that a block counts at most in the scale of its leaf, so that an outlier does not set it."""
_PAYS = 0.98
"""What the transformed taps must cost at most, over the plain ones: they take some time to decode."""


class Item(NamedTuple):
    """A leaf that is to be packed.

    Attributes:
        path: what errors call it.
        read: gives its values; called a few times, so that they need not stay in memory.
        shape: its shape.
        codec: how its blocks are coded.
        order: how its weights run through the blocks.
        free: whether the order may be the one that transforms the taps, if that pays.
        weight: how much its squared error counts beside that of others.
    """

    path: str
    read: Callable[[], Any]
    shape: tuple[int, ...]
    codec: Codec
    order: Order
    free: bool = False
    weight: float = 1.0


class Choice(NamedTuple):
    """How a leaf is packed.

    Attributes:
        codec: its codec.
        order: how its weights run through the blocks.
        slope: for an adaptive codec, the squared error that saves a bit, over the mean square of its weights.
        rms: the root of that mean square.
    """

    codec: Codec
    order: Order
    slope: float = 0.0
    rms: float = 0.0


class Cost(NamedTuple):
    """What a choice costs: bytes, and the squared error over the square of the weights."""

    nbytes: float
    error: float


class Leaf:
    """An item, some of its blocks, and what it costs at the slopes that were tried."""

    def __init__(self, item: Item):
        self.item = item
        self.adaptive = item.codec.adaptive
        self.weights = math.prod(item.shape)
        values = gathered(jnp.asarray(item.read()))
        self.rms = _finite_rms(values, item.path)
        self.order: Order = item.order
        self._samples = {item.order: self._sample(values, item.order)}
        taps = with_taps(item.shape, item.order) if item.free and self.adaptive else None
        if taps:
            self._samples[taps] = self._sample(values, taps)
            self.order = self._better(item.order, taps)
        self._samples = {self.order: self._samples[self.order]}
        self.scale = self._scale()
        self._known: dict[tuple[Codec, float, bool], Cost] = {}

    @property
    def most(self) -> int:
        """Bytes if every block were as wide as can be."""
        codec = self.item.codec.candidates[-1]
        blocks = -(-self.weights // codec.block_size)
        return coding.packed_nbytes(codec, self.weights, (*(0,) * (len(codec.widths) - 1), blocks))

    def choice(self, octave: float) -> Choice:
        """The candidate codec of least error plus slope times bits, at a power of two of the square of the scale."""
        octave += 2 * math.log2(self.scale / self.rms) if self.scale else 0.0
        slope = 2.0 ** (round(octave * _GRAIN) / _GRAIN)
        codecs = self.item.codec.candidates
        if len(codecs) == 1:
            return Choice(codecs[0], self.order, slope, self.rms)

        def lagrangian(codec: Codec) -> float:
            cost = self._cost(codec, 0.0, whole=False)
            return cost.error * self.weights + slope * 8 * cost.nbytes

        return Choice(min(codecs, key=lagrangian), self.order, 0.0, self.rms)

    def cost(self, octave: float, whole: bool) -> Cost:
        choice = self.choice(octave)
        return self._cost(choice.codec, choice.slope if self.adaptive else 0.0, whole)

    def _cost(self, codec: Codec, slope: float, whole: bool) -> Cost:
        sampled = self._samples[self.order]
        whole = whole and sum(part.size for part in sampled) < self.weights
        if (codec, slope, whole) not in self._known:
            parts = coding.blocks_of(gathered(jnp.asarray(self.item.read())), codec, self.order) if whole else sampled
            self._known[codec, slope, whole] = _measured(parts, codec, slope, self.weights)
        return self._known[codec, slope, whole]

    def _scale(self) -> float:
        """Root mean square of the weights, without what single loud blocks have beyond the others."""
        squares = np.concatenate([np.asarray(s) for s in coding.mean_squares(self._samples[self.order])])
        squares = np.minimum(squares, _LOUD * np.median(squares)) if squares.any() and np.median(squares) else squares
        whole = float(np.mean(squares, dtype=np.float64)) if squares.size else 0.0
        return min(self.rms * math.sqrt(whole), self.rms)

    @off_mesh
    def _sample(self, values: Array, order: Order) -> list[Array]:
        parts = coding.blocks_of(values, self.item.codec, order)
        rows = _SAMPLE // self.item.codec.block_size
        if parts[0].shape[0] <= 2 * rows:
            return parts
        chosen = np.sort(np.random.default_rng(0).choice(parts[0].shape[0], rows, replace=False))
        sample = [parts[0][chosen]]
        rms = float(root_mean_square(sample))
        # Where a few loud blocks make the error, some blocks do not speak for all.
        return sample if abs(rms - self.rms) <= _LIKE * self.rms else parts

    def _better(self, plain: Order, taps: Order) -> Order:
        """The order of less cost where it has about 4 bits."""
        slope = 2.0**-8
        codec = next((c for c in self.item.codec.candidates if c.widths == (4,)), self.item.codec.candidates[0])
        costs = [_measured(self._samples[order], codec, slope, self.weights) for order in (plain, taps)]
        values = [cost.error * self.weights + slope * 8 * cost.nbytes for cost in costs]
        return taps if values[1] < _PAYS * values[0] else plain


def _measured(parts: list[Array], codec: Codec, slope: float, weights: int) -> Cost:
    """The cost of a leaf from all of its blocks, or from some."""
    counts, error = coding.measure(parts, slope, codec)
    counts, sampled = tuple(np.asarray(counts).tolist()), sum(part.size for part in parts)
    nbytes = coding.packed_nbytes(codec, sampled, counts)
    if sampled < weights:
        header = coding.packed_nbytes(codec, weights, (0,) * len(counts))
        payload = nbytes - coding.packed_nbytes(codec, sampled, (0,) * len(counts))
        nbytes = header + payload * weights / sampled
    return Cost(nbytes, float(error))


@off_mesh
def _finite_rms(values: Array, path: str) -> float:
    """Root mean square, in float64 whatever the scale.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    values = jnp.atleast_1d(values)
    largest = float(jnp.abs(values).max(initial=0).astype(jnp.float32))
    if largest > 1e36 or not jnp.isfinite(values).all():
        raise LeafError(path, coding.what_does_not_fit(values))
    if largest < float(jnp.finfo(jnp.float32).tiny):
        return 0.0
    rows = coding.square_sums(values, largest)
    return largest * math.sqrt(np.asarray(rows, np.float64).sum() / max(values.size, 1))
