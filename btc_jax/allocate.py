"""Bits shared out over the leaves of a tree, so that all of them together meet a target with the least error.

Every block of an adaptive codec takes the width with the least error plus slope times bits. With one slope for all, no
bit could save more error anywhere else (the condition of Lagrange); so one number is searched for, whatever the target.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from btc_jax import coding
from btc_jax._typing import Array, Order
from btc_jax.blocks import with_taps
from btc_jax.codecs import Codec

_SAMPLE = 2**16
"""Weights of a leaf that are looked at while the slope is searched for; all of them only to make sure at the end."""
_LOWEST, _HIGHEST = -26.0, 6.0
"""Powers of two of all slopes: at the lowest every block has all its bits, at the highest none is worth a bit."""
_STARVED = 3.0
"""Octaves by which a leaf's slope may exceed that of an equal share: 9 dB, or 1.5 bits, whatever the scales."""
_LOUD = 64
"""Times the median block that a block counts at most in the scale of its leaf, so that an outlier does not set it."""
_TOLERANCE = 0.003
"""Part of a target that may be left unused."""
_PAYS = 0.98
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Target(NamedTuple):
    """What a tree is to come to: `bits` (effective, over the quantized leaves), `size` (bytes of the whole tree, dense
    leaves included), `rmse` (in units of the weights) or `sqnr_db`, over the quantized weights."""

    kind: Literal["bits", "size", "rmse", "sqnr_db"]
    value: float
    named: bool = True
    """Somebody asked for it. If not, the nearest that can be reached will do."""


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


def target_of(
    bits: float | None = None, size: float | str | None = None, rmse: float | None = None, sqnr_db: float | None = None
) -> Target | None:
    """The one target that is given, or `None`.

    Raises:
        ValueError: several are given, or one is not a positive number.

    Example:
        >>> target_of(size="25MB")
        Target(kind='size', value=25000000.0, named=True)
    """
    given = {"bits": bits, "size": size, "rmse": rmse, "sqnr_db": sqnr_db}
    given = {kind: value for kind, value in given.items() if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{kind}={value!r}" for kind, value in given.items())
        raise ValueError(f"{listed} are given; one target decides the others: give one")
    for kind, value in given.items():
        number = nbytes_of(value) if kind == "size" else _number(kind, value)
        if not 0 < number < math.inf:
            raise ValueError(f"{kind} is {value!r}; it must be a positive number")
        return Target(kind, number)  # pyright: ignore[reportArgumentType]
    return None


def usual_target(codecs: Sequence[Codec]) -> Target:
    """The target of leaves with these adaptive codecs where none is given."""
    return Target("bits", max(codec.usual_bits for codec in codecs), named=False)


def nbytes_of(size: Any) -> float:
    """Bytes in a size such as `"25MB"`, `"1.5 GiB"` or a number.

    Raises:
        ValueError: it is no size of 1 byte or more.

    Example:
        >>> nbytes_of("1.5KiB")
        1536.0
    """
    match = re.fullmatch(r"(\d{1,15}\.?\d{0,6}) ?([A-Za-z]*)", size, re.ASCII) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper(), 0) if match else 0
    number = float(match[1]) * unit if match else _number("size", size) if not isinstance(size, str) else 0.0
    if not number >= 1:
        raise ValueError(f"size is {size!r}; it must be 1 byte or more, such as '500MB', '2GiB' or 1000000")
    return number


def allocate(
    items: Sequence[Item], target: Target, *, balance: float, nbytes_beside: int = 0
) -> tuple[list[Choice], list[Cost]]:
    """A choice for every item such that all together meet the target from below, with the least error.

    Args:
        items: all leaves to be packed; those of codecs that are not adaptive cost what they cost.
        target: what all together come to.
        balance: the squared error of a leaf counts `rms ** -balance`: 0 for the least total error, 2 for the least
            error of each leaf relative to its size.
        nbytes_beside: bytes of leaves that stay dense, for the target `size`.

    Raises:
        ValueError: the target cannot be reached; the message says what can.
    """
    leaves = [_Leaf(item) for item in items]
    if not any(leaf.adaptive for leaf in leaves):
        raise ValueError(
            f"{target.kind}={target.value:g} is asked for, but no leaf has a codec that adapts to a target; use "
            "Multilevel(), or Uniform(threshold='auto')"
        )
    equal = _Problem(leaves, target, [0.0] * len(leaves), math.inf, nbytes_beside)
    if target.named:
        equal.refuse_unreachable()
    limit = equal.solve(whole=False) + _STARVED
    problem = _Problem(leaves, target, _own_octaves(leaves, balance), limit, nbytes_beside)
    octave = problem.solve(whole=True, near=problem.solve(whole=False))
    return problem.choices(octave), problem.costs(octave, whole=True)


def _own_octaves(leaves: Sequence["_Leaf"], balance: float) -> list[float]:
    """How far the slope of each leaf, over the square of its scale, lies above the common one, in powers of two."""
    scaled = [leaf for leaf in leaves if leaf.scale > 0]
    logs = math.fsum(leaf.weights * math.log2(leaf.scale) for leaf in scaled)
    middle = logs / max(sum(leaf.weights for leaf in scaled), 1)
    return [
        (balance - 2) * (math.log2(leaf.scale) - middle) - math.log2(leaf.item.weight) if leaf.scale > 0 else 0.0
        for leaf in leaves
    ]


class _Leaf:
    """An item, some of its blocks, and what it costs at the slopes that were tried."""

    def __init__(self, item: Item):
        self.item = item
        self.adaptive = item.codec.adaptive
        self.weights = math.prod(item.shape)
        values = jnp.asarray(item.read())
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
        slope = 2.0**octave * ((self.scale / self.rms) ** 2 if self.rms else 1.0)
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
            parts = coding.blocks_of(jnp.asarray(self.item.read()), codec, self.order) if whole else sampled
            self._known[codec, slope, whole] = _measured(parts, codec, slope, self.weights)
        return self._known[codec, slope, whole]

    def _scale(self) -> float:
        """Root mean square of the weights, without what single loud blocks have beyond the others."""
        squares = np.concatenate([np.asarray(s) for s in coding.mean_squares(self._samples[self.order])])
        squares = np.minimum(squares, _LOUD * np.median(squares)) if squares.any() and np.median(squares) else squares
        whole = float(np.mean(squares, dtype=np.float64)) if squares.size else 0.0
        return min(self.rms * math.sqrt(whole), self.rms)

    def _sample(self, values: Array, order: Order) -> list[Array]:
        parts = coding.blocks_of(values, self.item.codec, order)
        rows = _SAMPLE // self.item.codec.block_size
        if parts[0].shape[0] <= 2 * rows:
            return parts
        chosen = np.sort(np.random.default_rng(0).choice(parts[0].shape[0], rows, replace=False))
        return [parts[0][chosen]]

    def _better(self, plain: Order, taps: Order) -> Order:
        """The order of less cost where it has about 4 bits."""
        slope = 2.0**-8
        codec = next((c for c in self.item.codec.candidates if c.widths == (4,)), self.item.codec.candidates[0])
        costs = [_measured(self._samples[order], codec, slope, self.weights) for order in (plain, taps)]
        values = [cost.error * self.weights + slope * 8 * cost.nbytes for cost in costs]
        return taps if values[1] < _PAYS * values[0] else plain


class _Problem:
    """Total bits or error as a function of one slope, and the target for it.

    Attributes:
        own: how far the slope of each leaf lies above the common one, in powers of two.
        limit: the largest slope of any leaf.
    """

    def __init__(self, leaves: Sequence[_Leaf], target: Target, own: Sequence[float], limit: float, nbytes_beside: int):
        self.leaves, self.target, self.own, self.limit = leaves, target, own, limit
        self.nbytes_beside = nbytes_beside
        self.weights = max(sum(leaf.weights for leaf in leaves), 1)
        self.signal = math.fsum(leaf.weights * leaf.rms**2 for leaf in leaves)
        self.lowest, self.highest = _LOWEST - max(own), _HIGHEST - min(own)

    def choices(self, octave: float) -> list[Choice]:
        return [leaf.choice(min(octave + own, self.limit)) for leaf, own in zip(self.leaves, self.own, strict=True)]

    def costs(self, octave: float, whole: bool) -> list[Cost]:
        pairs = zip(self.leaves, self.own, strict=True)
        return [leaf.cost(min(octave + own, self.limit), whole) for leaf, own in pairs]

    def value(self, octave: float, whole: bool) -> float:
        """What the target is about, at this slope."""
        costs = self.costs(octave, whole)
        nbytes = math.fsum(cost.nbytes for cost in costs)
        if self.target.kind == "bits":
            return 8 * nbytes / self.weights
        if self.target.kind == "size":
            return nbytes + self.nbytes_beside
        squares = math.fsum(c.error * le.weights * le.rms**2 for c, le in zip(costs, self.leaves, strict=True))
        if self.target.kind == "rmse":
            return math.sqrt(squares / self.weights)
        return 10 * math.log10(self.signal / squares) if squares else math.inf

    def excess(self, octave: float, whole: bool) -> float:
        """How far the target is missed, in octaves of error or as a part of the bits; it is met below 0."""
        value, wanted = self.value(octave, whole), self.target.value
        if self.target.kind == "rmse":
            return math.log2(max(value, 1e-300) / wanted)
        return (wanted - value) / 6 if self.target.kind == "sqnr_db" else value / wanted - 1

    def refuse_unreachable(self) -> None:
        """A bound that is met with room to spare is no reason, unless it asks for more bits than the codecs have."""
        kind, wanted, _ = self.target
        best, least = (self.value(octave, whole=False) for octave in (self.lowest, self.highest))
        low, high = min(best, least), max(best, least)
        if kind in ("bits", "size"):
            nbytes = sum(leaf.most for leaf in self.leaves)
            high = 8 * nbytes / self.weights if kind == "bits" else nbytes + self.nbytes_beside
        too_little = kind != "sqnr_db" and wanted < low * (1 - 1e-9)
        if too_little or (kind in ("bits", "sqnr_db") and wanted > high * (1 + 1e-9)):
            form = ",.0f" if kind == "size" else ".4g"
            raise ValueError(
                f"{kind} of {wanted:{form}} cannot be reached: these leaves and codecs reach from {low:{form}} to "
                f"{high:{form}}"
            )

    def solve(self, whole: bool, near: float | None = None) -> float:
        """The power of two of a slope that meets the target and leaves as little of it unused as can be.

        Bits fall as the slope rises, and errors rise. Regula falsi, made sure by halving.
        """
        excess = functools.lru_cache(None)(lambda octave: self.excess(octave, whole))
        start = (self.lowest, self.highest) if near is None else (near - 0.25, near + 0.25)
        met, missed = start if self.target.kind in ("rmse", "sqnr_db") else start[::-1]
        step = missed - met
        while excess(met) > 0 and self.lowest < met < self.highest:
            met, missed, step = self._inside(met - step), met, 2 * step
        while excess(missed) <= 0 and self.lowest < missed < self.highest:
            met, missed, step = missed, self._inside(missed + step), 2 * step
        if excess(missed) <= 0:
            return missed  # more than enough even there
        for i in range(40):
            if -_TOLERANCE <= excess(met) <= 0 or abs(met - missed) < 1e-5:
                break
            share = (excess(met) + _TOLERANCE / 2) / (excess(met) - excess(missed))
            share = 0.5 if i % 3 == 2 or not 0.01 < share < 0.99 else share
            middle = met + share * (missed - met)
            met, missed = (middle, missed) if excess(middle) <= 0 else (met, middle)
        return met

    def _inside(self, octave: float) -> float:
        return min(max(octave, self.lowest), self.highest)


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


def _finite_rms(values: Array, path: str) -> float:
    """Root mean square, in float64 whatever the scale.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    values = jnp.atleast_1d(values)
    largest = float(jnp.abs(values).max(initial=0).astype(jnp.float32))
    if largest > 1e36 or not jnp.isfinite(values).all():
        raise ValueError(f"{path}: {coding.what_does_not_fit(values)}")
    if largest < float(jnp.finfo(jnp.float32).tiny):
        return 0.0
    rows = coding.square_sums(values, largest)
    return largest * math.sqrt(np.asarray(rows, np.float64).sum() / max(values.size, 1))


def _number(kind: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{kind} is {value!r}; it must be a number") from None
