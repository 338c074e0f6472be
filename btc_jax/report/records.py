"""The figures of a report."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from btc_jax.metrics import LeafMetrics, Measures, TreeMetrics, jsonable
from btc_jax.report.histogram import EDGES, Histogram
from btc_jax.tables import Drawn


@dataclasses.dataclass(frozen=True)
class LeafDetails:
    """A packed leaf in a report, besides its metrics.

    Attributes:
        codec: its codec, block size and layout in words.
        widths: number of blocks by bits per weight.
        before, after: histograms of its weights, in units of their root mean square.
        error_share: its part of the squared error of all packed leaves, 0 to 1.
    """

    codec: str
    widths: dict[int, int]
    before: Histogram
    after: Histogram
    error_share: float


@dataclasses.dataclass(frozen=True)
class BaselineFigures:
    """Another quantizer on the same leaves.

    Attributes:
        name: the quantizer.
        nbytes: bytes of the whole tree, dense leaves included.
        measures: its figures over all packed leaves.
    """

    name: str
    nbytes: int
    measures: Measures


@dataclasses.dataclass(frozen=True)
class Figures(Drawn):
    """What quantization saved and cost, without the page that shows it.

    Attributes:
        before, after: names of the original and of the packed tree.
        metrics: every leaf, sorted by path with the numbers in it as numbers, and the totals.
        details: more of each packed leaf, by path.
        baselines: other quantizers on the same leaves.
        versions: of the library and of JAX, by name.
    """

    kinds: ClassVar[tuple[str, ...]] = ("histogram",)

    before: str
    after: str
    metrics: TreeMetrics
    details: dict[str, LeafDetails]
    baselines: tuple[BaselineFigures, ...]
    versions: dict[str, str]

    @property
    def packed(self) -> tuple[LeafMetrics, ...]:
        """The packed leaves."""
        return tuple(leaf for leaf in self.metrics.leaves if leaf.path in self.details)

    @property
    def dense(self) -> tuple[LeafMetrics, ...]:
        """The leaves that stayed dense, or are stored with another leaf."""
        return tuple(leaf for leaf in self.metrics.leaves if leaf.path not in self.details)

    @property
    def worst(self) -> tuple[LeafMetrics, ...]:
        """The packed leaves, the lowest SQNR first."""
        return tuple(sorted(self.packed, key=lambda leaf: leaf.measures.sqnr_db if leaf.measures else math.inf))

    @functools.cached_property
    def widths(self) -> dict[int, int]:
        """Number of blocks of all packed leaves by bits per weight."""
        found: dict[int, int] = {}
        for details in self.details.values():
            for width, blocks in details.widths.items():
                found[width] = found.get(width, 0) + blocks
        return dict(sorted(found.items()))

    @property
    def histograms(self) -> tuple[Histogram, Histogram]:
        """All packed weights before and after, each leaf in units of its root mean square."""
        pairs = [(details.before, details.after) for details in self.details.values()]
        before, after = (np.sum([pair[i] for pair in pairs], axis=0).tolist() for i in (0, 1))
        return tuple(before), tuple(after)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; what is infinite becomes `None`."""
        return jsonable({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def table(self) -> Table:
        """The metrics, a row for each leaf."""
        return self.metrics.table(f"{self.after} against {self.before}")

    def draw(self, ax: Any, kind: str) -> None:
        """Draws the histograms of all packed weights before and after."""
        for label, counts in zip(("before", "after"), self.histograms, strict=True):
            ax.stairs(counts, EDGES, label=label)
        ax.set_xlabel("weight over the root mean square of its leaf")
        ax.set_ylabel("weights")
        ax.legend()
