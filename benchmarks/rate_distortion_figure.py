"""The figure of the comparison: one column per network, with error above and, where measured, divergence below."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.rows import Row

# Okabe and Ito's colours, which are safe for colour-blind readers; families also differ by their marker.
LINES = {
    "Multilevel": ("btc_jax, multilevel codec", "#0072B2", 2.2),
    "BTC 64": ("btc_jax, the paper's codec, blocks of 64", "#56B4E9", 1.2),
}
POINTS = {
    "llama.cpp": ("o", "#D55E00"),
    "HQQ": ("s", "#009E73"),
    "bitsandbytes": ("D", "#CC79A7"),
    "HIGGS": ("*", "#E69F00"),
    "qwix": ("^", "#000000"),
    "torchao": ("v", "#000000"),
    "baselines": ("x", "#888888"),
}
LABELLED = tuple(f"llama.cpp {name}" for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"))
NAMES = {"baselines": "plain uniform, absmax"}
RANDOM = ("gaussian", "laplace")
BITS = (2.3, 9.2)
A_BIT = 20 * math.log10(2)
GAP = "SQNR minus 6.02 dB per bit, dB (higher is better)"


def draw(results: dict[str, list[Row]], path: Path) -> None:
    """Write the figure. Random numbers are only in the tables, unless there is nothing else.

    One more bit halves the error of any good quantizer, which is 6.02 dB. With that subtracted, a quantizer that is
    equally good at all rates gives a horizontal line, whose height shows how good it is.
    """
    shown = {name: rows for name, rows in results.items() if name not in RANDOM} or results
    examined = any("KL" in row for rows in shown.values() for row in rows)
    size = (max(4.4 * len(shown), 7), 4 * (1 + examined) + 0.8)
    figure, panels = plt.subplots(1 + examined, len(shown), figsize=size, squeeze=False, layout="constrained")
    for column, (name, rows) in enumerate(shown.items()):
        _panel(panels[0][column], [(row, row["SQNR dB"] - A_BIT * row["effective"]) for row in rows])
        panels[0][column].set(title=name, ylabel=GAP, ylim=(-12.5, None))
        if examined:
            _divergence(panels[1][column], rows)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _divergence(panel: Axes, rows: list[Row]) -> None:
    examined = [(row, row["KL"]) for row in rows if row.get("KL", 0) > 0]
    if not examined:
        panel.set_axis_off()
        return
    _panel(panel, examined)
    panel.set(yscale="log", ylabel="KL from the float network, nats (lower is better)")


def _panel(panel: Axes, values: list[tuple[Row, float]]) -> None:
    for family, (label, colour, width) in LINES.items():
        if line := _of(family, values):
            panel.plot(*zip(*line, strict=True), "-o", color=colour, linewidth=width, markersize=3, label=label)
    for family, (marker, colour) in POINTS.items():
        if points := _of(family, values):
            panel.plot(
                *zip(*points, strict=True),
                marker,
                color=colour,
                markersize=6,
                linestyle="none",
                label=NAMES.get(family, family),
            )
    for row, value in values:
        if row["name"] in LABELLED:
            name, place = row["name"].split(" ")[1], (row["effective"], value)
            panel.annotate(name, place, (4, 4), textcoords="offset points", fontsize=7)
    panel.set(xlim=BITS, xlabel="effective bits per weight (everything stored)")
    panel.grid(alpha=0.3)


def _of(family: str, values: list[tuple[Row, float]]) -> list[tuple[float, float]]:
    return sorted((row["effective"], value) for row, value in values if row["family"] == family)
