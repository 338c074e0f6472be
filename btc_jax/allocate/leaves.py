"""All leaves that share one target: how each may be packed, and what that costs at a slope."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from btc_jax.allocate.costs import Costs, Matrix
from btc_jax.allocate.survey import LEVELS, Item, Survey, surveys_of_all
from btc_jax.codecs import Codec
from btc_jax.coding import Recipe
from btc_jax.formats import Format
from btc_jax.sizes import nbytes_of_one_width

_GRAIN = 4096
"""Slopes per octave, 0.0001 bits apart: a grid on which rounding of the weights, as by scaling them, moves none."""
_PAYS = 0.98
"""Largest cost of transformed taps, relative to plain ones, at which they are used: they take time to decode."""
_USUAL = 2.0**-8
"""A slope at which leaves have about 4 bits."""


FINE = len(LEVELS) - 1
"""The level of most blocks."""
_ALL = range(len(LEVELS))


class LeafSet:
    """Leaves in the order of their items, each read once.

    Args:
        items: the leaves.
        taps: whether leaves may use the layout with transformed taps.

    Attributes:
        size: weights of each leaf.
        owners: for each item, the number of the leaf that it is, or is a piece of.
        scale, rms: see `Survey`.
        asked: base-2 logarithms of the weights that rules give to their errors.
        max_nbytes: bytes of each with every block at its widest.
    """

    def __init__(self, items: Sequence[Item], taps: bool = True):
        self.items = items
        self._surveys = _in_better_order(items, surveys_of_all(items, taps))
        self.size = np.array([item.size for item in items])
        self.asked = np.log2([item.weight for item in items])
        self.scale = np.array([survey.scale for survey in self._surveys])
        self.rms = np.array([float(survey.whole.rms) for survey in self._surveys])
        self.max_nbytes = np.array([_max_nbytes(item) for item in items])
        self.owners = _owners(items)
        self._groups = [
            _Group(codec, places, self._surveys, self.owners[places]) for codec, places in _alike(items).items()
        ]

    def slopes(self, octaves: np.ndarray) -> np.ndarray:
        """Slopes relative to the mean square of each leaf, from base-2 logarithms of slopes relative to its squared
        scale."""
        with np.errstate(divide="ignore", invalid="ignore"):
            own = self.of_leaves(np.where(self.scale > 0, 2 * np.log2(self.scale / self.rms), 0))
        return 2.0 ** (np.round((octaves + own) * _GRAIN) / _GRAIN)

    def of_leaves(self, octaves: np.ndarray) -> np.ndarray:
        """The mean over the pieces of each leaf: with one slope relative to each piece, their planes are about equally
        long."""
        return _of_owners(octaves * self.size, self.owners) / _of_owners(self.size, self.owners)

    def recipes(self, octaves: np.ndarray, level: int) -> list[Recipe]:
        slopes, forms = self.slopes(octaves), self._forms(octaves, level)
        return [
            Recipe(item.codec, form, survey.order, float(slope) if item.codec.rate_controlled else 0.0, float(rms))
            for item, form, survey, slope, rms in zip(self.items, forms, self._surveys, slopes, self.rms, strict=True)
        ]

    def costs(self, octaves: np.ndarray, level: int) -> Costs:
        return self._gathered(lambda group, slopes: group.costs(slopes, level)[1], octaves)

    def _forms(self, octaves: np.ndarray, level: int) -> list[Format]:
        slopes, forms = self.slopes(octaves), {}
        for group in self._groups:
            forms |= zip(group.places, group.costs(slopes[group.places], level)[0], strict=True)
        return [forms[i] for i in range(len(self.items))]

    def _gathered(self, costs: Callable[..., Costs], octaves: np.ndarray) -> Costs:
        slopes, found = self.slopes(octaves), Costs(*np.zeros((4, len(self.items))))
        for group in self._groups:
            for into, values in zip(found, costs(group, slopes[group.places]), strict=True):
                into[group.places] = values
        return found


class _Group:
    """Leaves that one codec encodes."""

    def __init__(self, codec: Codec, places: list[int], found: Sequence[Survey], owners: np.ndarray):
        self.codec, self.places, self._owners = codec, places, owners
        of_places = [found[i] for i in places]
        self._matrices = [[Matrix(codec, form, of_places, k, owners) for form in codec.formats] for k in _ALL]
        self._size = np.array([found[i].whole.count for i in places])

    def costs(self, slopes: np.ndarray, level: int) -> tuple[list[Format], Costs]:
        """The format of least error plus slope times bits for each leaf, and what that costs."""
        one = len(self.codec.formats) == 1
        # With several formats, or without rate control, the error does not depend on the slope.
        own = slopes if one and self.codec.rate_controlled else np.full_like(slopes, self.codec.slope or 0)
        costs = [matrix.costs(own) for matrix in self._matrices[level]]
        if one:
            return list(self.codec.formats) * len(slopes), costs[0]
        sums = [cost.error * self._size + slopes * 8 * cost.nbytes for cost in costs]
        best = np.argmin([_of_owners(values, self._owners) for values in sums], axis=0)
        chosen = [np.choose(best, [getattr(cost, name) for cost in costs]) for name in Costs._fields]
        return [self.codec.formats[i] for i in best], Costs(*chosen)


def _owners(items: Sequence[Item]) -> np.ndarray:
    """The number of the leaf that each item is, or is a piece of."""
    return np.unique([item.path for item in items], return_inverse=True)[1].reshape(-1)


def _of_owners(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """For each item, the sum over all items of the same leaf."""
    return np.bincount(owners, values)[owners]


def _alike(items: Sequence[Item]) -> dict[Codec, list[int]]:
    """Places of the items of each codec."""
    places: dict[Codec, list[int]] = {}
    for i, item in enumerate(items):
        places.setdefault(item.codec, []).append(i)
    return places


def _in_better_order(items: Sequence[Item], found: Sequence[list[Survey]]) -> list[Survey]:
    """For each leaf, the survey in the layout that costs less at about 4 bits."""
    chosen = [plain for plain, *_ in found]
    free = [i for i, both in enumerate(found) if len(both) > 1]
    for codec, places in _alike([items[i] for i in free]).items():
        both = [[found[free[i]][k] for i in places] for k in (0, 1)]
        form = next((f for f in codec.formats if f.widths == (4,)), codec.formats[0])
        owners = _owners([items[free[i]] for i in places])
        plain, taps = (_of_owners(_lagrangian(codec, form, surveyed), owners) for surveyed in both)
        for i, value, other in zip(places, plain, taps, strict=True):
            if other < _PAYS * value:
                chosen[free[i]] = found[free[i]][1]
    return chosen


def _lagrangian(codec: Codec, form: Format, found: Sequence[Survey]) -> Any:
    size = np.array([survey.whole.count for survey in found])
    cost = Matrix(codec, form, found, 0).costs(np.full(len(found), _USUAL))
    return cost.error * size + _USUAL * 8 * cost.nbytes


def _max_nbytes(item: Item) -> int:
    form = item.codec.formats[-1]
    return nbytes_of_one_width(form, item.size, form.widths[-1])
