"""Which budget of bits to try next: by bisection, or where the trials so far predict the limit."""

import math
from typing import NamedTuple

PREDICTED = 5
"""Budgets tried on predictions before the rest of the range is bisected."""
_MISSES = 2
"""Wrong predictions allowed before that."""


class _Tried(NamedTuple):
    bits: float
    ok: bool
    needs: float | None


class Budgets:
    """Finds the smallest budget that keeps to the limits, within a tolerance of one that does not. Assumes that more
    bits never hurt.

    Args:
        low, high: the smallest and the largest budget.
        tolerance: the largest distance between the two, in bits.
        first: where the limit is expected; `None` if unknown.
        predictable: whether trials will tell how far they are from the limit.

    Examples:
        >>> budgets, tried = Budgets(2, 8, 0.1, first=4.4), []
        >>> while (bits := budgets.next()) is not None:
        ...     tried.append(bits)
        ...     budgets.tell(bits, ok=bits >= 4.37, needs=4.37 - bits)
        >>> [round(bits, 2) for bits in tried], budgets.lowest_ok == min(bits for bits in tried if bits >= 4.37)
        ([4.45, 4.35], True)
    """

    def __init__(
        self, low: float, high: float, tolerance: float, first: float | None = None, predictable: bool = False
    ):
        self.low, self.high, self._tolerance = low, high, tolerance
        self._tried: list[_Tried] = []
        self._expected = first if first is not None else (low + high) / 2 if predictable else None
        self._misses = 0
        self._hopes: bool | None = None  # whether the last proposed budget was expected to pass; or none

    @property
    def lowest_ok(self) -> float | None:
        """The smallest budget that kept to the limits."""
        return min((tried.bits for tried in self._tried if tried.ok), default=None)

    @property
    def highest_violating(self) -> float | None:
        """The largest budget that did not."""
        return max((tried.bits for tried in self._tried if not tried.ok), default=None)

    @property
    def most(self) -> int:
        """Trials at most."""
        halvings = math.ceil(math.log2(max((self.high - self.low) / self._tolerance, 1)))
        return 2 + halvings + (0 if self._expected is None else PREDICTED)

    def tell(self, bits: float, ok: bool, needs: float | None = None) -> None:
        """Records the outcome of a budget.

        Args:
            ok: whether it kept to the limits.
            needs: how many more bits the limits require, negative for fewer; `None` if unknown.
        """
        consistent = needs is not None and math.isfinite(needs) and (needs <= 0) == ok
        self._tried.append(_Tried(bits, ok, needs if consistent else None))
        self._misses += self._hopes is not None and self._hopes != ok
        if self._expected is not None:
            self._expected = self._crossing()

    def next(self) -> float | None:
        """The next budget to try; `None` when the search is done."""
        ok, violating = self.lowest_ok, self.highest_violating
        if ok is not None and (ok <= self.low or (violating is not None and self._is_near(ok - violating))):
            return None
        if violating is not None and violating >= self.high:
            return None
        low, high = self.low if violating is None else violating, self.high if ok is None else ok
        if self._expected is None or self._misses > _MISSES or len(self._tried) >= PREDICTED:
            self._hopes = None
            return high if ok is None else low if violating is None else (low + high) / 2
        wanted, self._hopes = self._wanted(self._expected, low, high)
        if ok is None and self._is_near(high - wanted):
            return high
        if violating is None and self._is_near(wanted - low):
            return low
        return wanted if low < wanted < high else (low + high) / 2

    def _wanted(self, expected: float, low: float, high: float) -> tuple[float, bool]:
        """A budget on one side of the expected limit, and whether it should keep to it. Once one just above the limit
        is known to, one just below must be shown not to, and vice versa. Steps grow with each wrong prediction.
        """
        step = self._tolerance * 2**self._misses
        if self.lowest_ok is not None and high - expected <= step:
            return high - step, False
        if self.highest_violating is not None and expected - low <= step:
            return low + step, True
        return expected + step / 2, True

    def _is_near(self, bits: float) -> bool:
        return bits <= self._tolerance * (1 + 1e-9)

    def _crossing(self) -> float | None:
        """Where `needs` would be zero, from the two trials nearest to that, or from one."""
        known = sorted((tried for tried in self._tried if tried.needs is not None), key=lambda t: abs(t.needs or 0))
        if not known:
            return None
        nearest = known[0]
        expected = nearest.bits + (nearest.needs or 0)
        if len(known) > 1:
            other = known[1]
            rate = ((other.needs or 0) - (nearest.needs or 0)) / (other.bits - nearest.bits)
            if -4 < rate < -0.25:  # one bit more lowers the need by about one bit
                expected = nearest.bits - (nearest.needs or 0) / rate
        return min(max(expected, self.low), self.high)
