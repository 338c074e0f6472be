"""The look of all figures: colours, markers, empty panels."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, Any]
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#0072B2", "#D55E00", "#CC79A7"),
)
"""Okabe and Ito's colours, which are safe for colour-blind readers; markers differ as well."""
STYLES = {"float32": (BLACK, "o"), "BTC": (BLUE, "s"), "uniform8": (VERMILLION, "^"), "percentile8": (GREEN, "v")}
SPARE = ((PURPLE, "D"), (ORANGE, "P"), (SKY, "X"))
"""For all other quantizers and networks."""
SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "btc_jax",
}
SETTINGS |= {"axes.spines.top": False, "axes.spines.right": False}


def panels(rows: int, columns: int, size: tuple[float, float], title: str, **shared: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).ravel())


def style(method: str) -> tuple[str, str]:
    """Colour and marker of a quantizer, the same in all figures."""
    return STYLES.get(method) or SPARE[sum(map(ord, method)) % len(SPARE)]


Draw = Callable[[Results], Figure | None]
