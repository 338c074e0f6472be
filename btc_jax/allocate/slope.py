"""The one slope for all leaves that meets a target."""

import functools
import math
from collections.abc import Sequence

from btc_jax.allocate.leaf import Choice, Cost, Item, Leaf
from btc_jax.allocate.target import Target

_LOWEST, _HIGHEST = -26.0, 6.0
"""Powers of two of all slopes: at the lowest every block has all its bits, at the highest none is worth a bit."""
_SHARES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
"""Where between those the best and the worst error are looked for."""
_STARVED = 3.0
"""Octaves by which a leaf's slope may exceed that of an equal share: 9 dB, or 1.5 bits, whatever the scales."""
_TOLERANCE = 0.003
"""Part of a target that may be left unused."""


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
    leaves = [Leaf(item) for item in items]
    target.refuse_fixed(item.codec for item in items)
    equal = _Problem(leaves, target, [0.0] * len(leaves), math.inf, nbytes_beside)
    if target.named:
        equal.refuse_unreachable()
    limit = equal.solve(whole=False) + _STARVED
    problem = _Problem(leaves, target, _own_octaves(leaves, balance), limit, nbytes_beside)
    octave = problem.solve(whole=True, near=problem.solve(whole=False))
    if target.named and problem.excess(octave, whole=True) > 1e-9:
        target.refuse(*problem.reach(whole=True))
    return problem.choices(octave), problem.costs(octave, whole=True)


def _own_octaves(leaves: Sequence[Leaf], balance: float) -> list[float]:
    """How far the slope of each leaf, over the square of its scale, lies above the common one, in powers of two."""
    scaled = [leaf for leaf in leaves if leaf.scale > 0]
    logs = math.fsum(leaf.weights * math.log2(leaf.scale) for leaf in scaled)
    middle = logs / max(sum(leaf.weights for leaf in scaled), 1)
    return [
        (balance - 2) * (math.log2(leaf.scale) - middle) - math.log2(leaf.item.weight) if leaf.scale > 0 else 0.0
        for leaf in leaves
    ]


class _Problem:
    """Total bits or error as a function of one slope, and the target for it.

    Attributes:
        own: how far the slope of each leaf lies above the common one, in powers of two.
        limit: the largest slope of any leaf.
    """

    def __init__(self, leaves: Sequence[Leaf], target: Target, own: Sequence[float], limit: float, nbytes_beside: int):
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
        low, high = self.reach(whole=False)
        too_little = kind != "sqnr_db" and wanted < low * (1 - 1e-9)
        if too_little or (kind in ("bits", "sqnr_db") and wanted > high * (1 + 1e-9)):
            self.target.refuse(low, high)

    def reach(self, whole: bool) -> tuple[float, float]:
        """The least and the largest that the target can be about. Where loud blocks escape, more bits can be worse."""
        if self.target.kind in ("bits", "size"):
            nbytes = sum(leaf.most for leaf in self.leaves)
            most = 8 * nbytes / self.weights if self.target.kind == "bits" else nbytes + self.nbytes_beside
            return self.value(self.highest, whole), most
        values = [self.value(self.lowest + share * (self.highest - self.lowest), whole) for share in _SHARES]
        return min(values), max(values)

    def solve(self, whole: bool, near: float | None = None) -> float:
        """The power of two of a slope that meets the target and leaves as little of it unused as can be.

        Bits fall as the slope rises, and errors rise. Regula falsi, made sure by halving.
        """
        excess = functools.lru_cache(None)(lambda octave: self.excess(octave, whole))
        if near is not None:
            guess = near
            for _ in range(3):  # each look at all of the weights is dear
                if -_TOLERANCE <= excess(guess) <= 0:
                    return guess
                guess = self._inside(guess - (excess(guess) + _TOLERANCE / 2) / self._rate())
        start = (self.lowest, self.highest) if near is None else (near - 0.25, near + 0.25)
        met, missed = start if self.target.kind in ("rmse", "sqnr_db") else start[::-1]
        step = missed - met
        while excess(met) > 0 and self.lowest < met < self.highest:
            met, missed, step = self._inside(met - step), met, 2 * step
        while excess(missed) <= 0 and self.lowest < missed < self.highest:
            met, missed, step = missed, self._inside(missed + step), 2 * step
        if excess(missed) <= 0:
            return missed  # more than enough even there
        if excess(met) > 0:
            return met  # out of reach, and nobody asked for it
        for i in range(40):
            room = _TOLERANCE if whole else 0.8 * _TOLERANCE  # some blocks speak for all but for a little
            if -room <= excess(met) <= room - _TOLERANCE or abs(met - missed) < 1e-5:
                break
            share = (excess(met) + _TOLERANCE / 2) / (excess(met) - excess(missed))
            share = 0.5 if i % 3 == 2 or not 0.01 < share < 0.99 else share
            middle = met + share * (missed - met)
            met, missed = (middle, missed) if excess(middle) <= 0 else (met, middle)
        return met

    def _rate(self) -> float:
        """What an octave of slope adds to the excess: half a bit less, and half an octave more of error."""
        bits = self.target.value * (8 / self.weights if self.target.kind == "size" else 1)
        return 0.5 if self.target.kind in ("rmse", "sqnr_db") else -0.5 / bits

    def _inside(self, octave: float) -> float:
        return min(max(octave, self.lowest), self.highest)
