"""The slope, common to all leaves, that meets a target."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from btc_jax.allocate.leaves import FINE, LeafSet
from btc_jax.allocate.sharing import Sharing
from btc_jax.allocate.survey import Item
from btc_jax.allocate.target import Target, default_target
from btc_jax.allocate.weights import octaves_of_weights
from btc_jax.coding import Recipe

_LOWEST, _HIGHEST = -26.0, 6.0
"""Range of slopes as powers of two: at the lowest every block has all its bits, at the highest none is worth a bit."""
_SHARES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
"""Where between those the best and the worst error are searched for."""
_MAX_SLOPE_RATIO_OCTAVES = 3.0
"""Octaves by which a leaf's slope may exceed that of equal weighting: 9 dB, or 1.5 bits, whatever the scales."""
_TOLERANCE = 0.003
"""Fraction of a target that may be left unused."""
_SURE = 5.0
"""Safety margin, in standard deviations of the estimate from sampled blocks, so that a target is met."""


def allocate(items: Sequence[Item], sharing: Sharing, *, other_nbytes: int = 0) -> list[Recipe]:
    """A recipe for every item, such that together they meet the target with the least error.

    Args:
        items: all leaves to be packed; those whose codec is not rate-controlled contribute a constant cost.
        sharing: the target, and how much errors of each leaf count.
        other_nbytes: bytes of leaves that stay dense, for the target `size`.

    Raises:
        ValueError: if the target is unattainable (the message gives the attainable range), or the sensitivities are of
            another tree.
    """
    target = sharing.target or default_target([item.codec for item in items])
    target.refuse_fixed(item.codec for item in items)
    sensitivities = sharing.sensitivities(item.path for item in items)
    leaves = LeafSet(items, taps=sharing.taps)
    equal = _Problem(leaves, target, np.zeros(len(items)), math.inf, other_nbytes)
    if target.named:
        equal.refuse_unreachable()
    limit = equal.solve(0) + _MAX_SLOPE_RATIO_OCTAVES
    weights = octaves_of_weights(leaves, sensitivities, sharing.sensitivity == "shape")
    problem = _Problem(leaves, target, _slope_offsets(leaves, weights), limit, other_nbytes)
    octave = problem.solve(FINE, near=problem.solve(0))
    if target.named and problem.excess(octave, FINE) > 1e-9:
        target.refuse(*problem.attainable(FINE))
    return leaves.recipes(problem.octaves(octave), FINE)


def _slope_offsets(leaves: LeafSet, weights: np.ndarray) -> np.ndarray:
    """Octaves by which the slope of each leaf, relative to its squared scale, exceeds the common one."""
    scaled = leaves.scale > 0
    logs = np.log2(np.where(scaled, leaves.scale, 1)) + weights / 2
    middle = (leaves.size * logs)[scaled].sum() / max(leaves.size[scaled].sum(), 1)
    return leaves.of_leaves(np.where(scaled, -2 * (logs - middle), 0.0))


class _Problem:
    """Total bits or error as a function of one slope, and the target for it.

    Attributes:
        offsets: octaves by which the slope of each leaf exceeds the common one.
        limit: the largest slope of any leaf, before the weights of rules.
    """

    def __init__(self, leaves: LeafSet, target: Target, offsets: np.ndarray, limit: float, other_nbytes: int):
        self.leaves, self.target, self.offsets, self.limit = leaves, target, offsets, limit
        self.other_nbytes = other_nbytes
        self.weights = max(int(leaves.size.sum()), 1)
        self.signal = math.fsum(leaves.size * leaves.rms**2)
        farthest = offsets - leaves.asked
        self.lowest, self.highest = _LOWEST - float(farthest.max()), _HIGHEST - float(farthest.min())

    def octaves(self, octave: float) -> np.ndarray:
        """The slope of each leaf, relative to its squared scale, as a power of two."""
        return np.minimum(octave + self.offsets, self.limit) - self.leaves.asked

    def value(self, octave: float, level: int) -> float:
        """The quantity that the target constrains, at this slope."""
        return self._value(*self._sums(octave, level)[0])

    def _sums(self, octave: float, level: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Total bytes and squared error of all leaves, and the standard deviations of both."""
        costs = self.leaves.costs(self.octaves(octave), level)
        squares = self.leaves.size * self.leaves.rms**2
        sums = math.fsum(costs.nbytes), math.fsum(costs.error * squares)
        variances = math.fsum(costs.nbytes_variance), math.fsum(costs.error_variance * squares**2)
        return sums, (math.sqrt(variances[0]), math.sqrt(variances[1]))

    def _value(self, nbytes: float, squares: float) -> float:
        if self.target.kind == "bits":
            return 8 * nbytes / self.weights
        if self.target.kind == "size":
            return nbytes + self.other_nbytes
        if self.target.kind == "rmse":
            return math.sqrt(squares / self.weights)
        return 10 * math.log10(self.signal / squares) if squares else math.inf

    def excess(self, octave: float, level: int) -> float:
        """How far the target is missed, in octaves of error or as a fraction of the bits; below 0 it is met with
        certainty."""
        (nbytes, squares), (more_bytes, more_squares) = self._sums(octave, level)
        sure = _SURE if level == FINE else 0
        value, wanted = self._value(nbytes + sure * more_bytes, squares + sure * more_squares), self.target.value
        if self.target.kind == "rmse":
            return math.log2(max(value, 1e-300) / wanted)
        return (wanted - value) / 6 if self.target.kind == "sqnr_db" else value / wanted - 1

    def refuse_unreachable(self) -> None:
        """Raise if the target is unattainable. A bound that already holds is fine; asking for more bits than the codecs
        provide is not."""
        kind, wanted, _ = self.target
        low, high = self.attainable(0)
        too_little = kind != "sqnr_db" and wanted < low * (1 - 1e-9)
        if too_little or (kind in ("bits", "sqnr_db") and wanted > high * (1 + 1e-9)):
            self.target.refuse(low, high)

    def attainable(self, level: int) -> tuple[float, float]:
        """Smallest and largest attainable value. With escaped outlier blocks, more bits can be worse."""
        if self.target.kind in ("bits", "size"):
            nbytes = int(self.leaves.max_nbytes.sum())
            most = 8 * nbytes / self.weights if self.target.kind == "bits" else nbytes + self.other_nbytes
            return self.value(self.highest, level), most
        values = [self.value(self.lowest + share * (self.highest - self.lowest), level) for share in _SHARES]
        return min(values), max(values)

    def solve(self, level: int, near: float | None = None) -> float:
        """The slope, as a power of two, that meets the target and leaves little of it unused. Bits fall and errors rise
        with the slope. Regula falsi, safeguarded by bisection.
        """
        excess = functools.lru_cache(None)(lambda octave: self.excess(octave, level))
        if near is not None:
            guess = near
            for _ in range(3):  # evaluating many blocks is expensive
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
            return missed  # the target holds even there
        if excess(met) > 0:
            return met  # unattainable, but nobody asked for it
        for i in range(40):
            room = _TOLERANCE if level else 0.8 * _TOLERANCE  # a sample is not exact
            if -room <= excess(met) <= room - _TOLERANCE or abs(met - missed) < 1e-5:
                break
            share = (excess(met) + _TOLERANCE / 2) / (excess(met) - excess(missed))
            share = 0.5 if i % 3 == 2 or not 0.01 < share < 0.99 else share
            middle = met + share * (missed - met)
            met, missed = (middle, missed) if excess(middle) <= 0 else (met, middle)
        return met

    def _rate(self) -> float:
        """Change of the excess per octave of slope: half a bit less, or half an octave more error."""
        bits = self.target.value * (8 / self.weights if self.target.kind == "size" else 1)
        return 0.5 if self.target.kind in ("rmse", "sqnr_db") else -0.5 / bits

    def _inside(self, octave: float) -> float:
        return min(max(octave, self.lowest), self.highest)
