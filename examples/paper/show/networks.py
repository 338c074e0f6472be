"""Figures 1, 4, 5 and 7: weights of a layer, summaries of the CIFAR networks, wide blocks layer by layer."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from examples.paper import published
from examples.paper.show.style import BLACK, SKY, VERMILLION, Draw, panels, style

Results = dict[str, Any]
Row = dict[str, Any]


def histograms(results: Results) -> Figure | None:
    """Figure 1."""
    found = results.get("histogram", {})
    if not found:
        return None
    name, shown = next(iter(found.items()))
    title = f"Figure 1. Weights of {results['networks'][name]['title']}, {shown['layer']}"
    figure, axes = panels(3, 1, (8, 8), title, sharex=True, sharey=True)
    edges = np.array(shown["edges"])
    for panel, (method, counted) in zip(axes, shown["counts"].items(), strict=True):
        heights = np.array(counted["counts"])
        panel.fill_between(edges[:-1], heights, step="post", color=style(method)[0], linewidth=0)
        panel.set_ylabel("weights per bin")
        label = f"{method}: {counted['distinct']:,} distinct values"
        label += f", rmse {counted['rmse']:.5f}" if counted["rmse"] else ""
        panel.set_title(label, loc="left", fontsize=10)
    axes[-1].set_xlabel(f"value of a weight ({len(edges) - 1} bins)")
    return figure


def summary(results: Results, number: int, title: str) -> Figure:
    """Figures 4 and 5: accuracy, bits and error of each network; the paper's values have hollow markers."""
    paper = published.table(number)
    dataset = published.published()[f"table{number}"]["dataset"]
    rows = [row for row in results["rows"] if row["dataset"] == dataset]
    titles = [row["model"] for row in paper]
    titles += sorted({row["title"] for row in rows} - set(titles))
    figure, (accuracy, bits, error) = panels(3, 1, (10, 10), title, sharex=True)
    _paper_points(accuracy, titles, paper, {"float32": "fp32", "BTC": "btc", "uniform8": "uniform"})
    _paper_points(bits, titles, paper, {"BTC": "btc_bits", "uniform8": "uniform_bits"})
    _paper_points(error, titles, paper, {"BTC": "rmse"})
    _measured_points(accuracy, titles, rows, "accuracy", 100, "standard_error")
    _measured_points(bits, titles, [row for row in rows if row["method"] != "float32"], "effective")
    _measured_points(error, titles, [row for row in rows if row["method"] != "float32"], "rmse")
    _layer_points(bits, titles, [row for row in rows if row["method"] == "BTC"])
    known = sorted({row["known"] for row in rows if row.get("known")})
    accuracy.set_title(
        f"measured on: {', '.join(known)}; bars: standard error" if known else "", loc="left", fontsize=9
    )
    accuracy.set_ylabel("accuracy, %")
    bits.set_ylabel("bits per weight\n(measured: all stored)")
    error.set_ylabel("rmse of the weights")
    error.set_ylim(bottom=0)
    error.set_xticks(range(len(titles)), [text.replace(", ", "\n") for text in titles], rotation=25, ha="right")
    entries = {label: handle for panel in (accuracy, bits) for handle, label in zip(*_entries(panel), strict=True)}
    figure.legend(entries.values(), entries.keys(), ncols=4, fontsize=8, loc="outside lower left")
    return figure


def _entries(panel: Axes) -> tuple[list[Any], list[str]]:
    return panel.get_legend_handles_labels()


OFFSETS = {"float32": -0.27, "BTC": -0.09, "uniform8": 0.09, "percentile8": 0.27}


def _paper_points(panel: Axes, titles: list[str], paper: list[Row], columns: dict[str, str]) -> None:
    for method, column in columns.items():
        colour, marker = style(method)
        x = [titles.index(row["model"]) + OFFSETS.get(method, 0) - 0.04 for row in paper]
        look = {"linestyle": "none", "markerfacecolor": "none", "markersize": 7}
        panel.plot(x, [row[column] for row in paper], marker, color=colour, label=f"{method}, paper", **look)


def _measured_points(
    panel: Axes, titles: list[str], rows: list[Row], name: str, scale: float = 1, bar: str = ""
) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method and row.get(name) is not None]
        colour, marker = style(method)
        x = [titles.index(row["title"]) + OFFSETS.get(method, 0.36) + 0.04 for row in chosen]
        bars = [scale * row[bar] for row in chosen] if bar else None
        y = [scale * row[name] for row in chosen]
        panel.errorbar(x, y, bars, fmt=marker, color=colour, markersize=6, linewidth=1, label=f"{method}, measured")


def _layer_points(panel: Axes, titles: list[str], rows: list[Row]) -> None:
    """The mean over layers, to compare with the paper's column."""
    if rows:
        x = [titles.index(row["title"]) + OFFSETS["BTC"] + 0.04 for row in rows]
        look = {"linestyle": "none", "markersize": 9, "label": "BTC, measured, payload over layers"}
        panel.plot(x, [row["payload_layers"] for row in rows], "+", color=BLACK, **look)


def cifar10(results: Results) -> Figure:
    """Figure 4."""
    return summary(results, 2, "Figure 4. CIFAR-10: accuracy, bits and error (hollow: the paper's figures)")


def cifar100(results: Results) -> Figure:
    """Figure 5."""
    measured = any(row["dataset"] == "cifar100" for row in results["rows"])
    what = "hollow: the paper's figures" if measured else "the paper's figures only, no weights were available"
    return summary(results, 3, f"Figure 5. CIFAR-100: accuracy, bits, error ({what})")


def wide_blocks(results: Results) -> Figure | None:
    """Figure 7, which is not in the paper: what section 3.1 says about early, middle and last layers."""
    found = {name: layers for name, layers in results.get("wide", {}).items() if not name.startswith("mlp")}
    if not found:
        return None
    title = "Figure 7. Share of wide blocks, layer by layer (threshold 0.05, blocks of 64)"
    columns = min(3, len(found))
    count = -(-len(found) // columns)
    figure, axes = panels(count, columns, (4.2 * columns, 3.2 * count + 0.8), title, sharey=True)
    for panel, (name, layers) in zip(axes, found.items(), strict=False):
        panel.bar(range(1, len(layers) + 1), [100 * layer["wide"] for layer in layers], width=0.9, color=SKY)
        _claims(panel, len(layers))
        panel.set_title(f"{results['networks'][name]['title']}, {len(layers)} layers", loc="left", fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("layer, in order of use")
    for panel in axes[len(found) :]:
        panel.set_visible(False)
    for panel in axes[::columns]:
        panel.set_ylabel("wide blocks, %")
    figure.legend(*_entries(axes[0]), fontsize=9, loc="outside upper right")
    return figure


def _claims(panel: Axes, layers: int) -> None:
    """The paper's claims about first, middle and last layers, as boxes."""
    said, early = published.claims(), max(3.5, 0.06 * layers)
    spans = {
        "first_wide": (0.5, early),
        "middle_wide": (early, layers - 1.0),
        "last_wide": (layers - 1.0, layers + 0.5),
    }
    for name, (left, right) in spans.items():
        low, high = (100 * value for value in said[name])
        label = "the paper on early, middle and last layers" if name == "first_wide" else None
        look = {"facecolor": "none", "edgecolor": VERMILLION, "linewidth": 2.0, "label": label}
        panel.add_patch(Rectangle((left, low), right - left, high - low, zorder=3, **look))


FIGURES: dict[str, Draw] = {
    "figure1_histograms": histograms,
    "figure4_cifar10": cifar10,
    "figure5_cifar100": cifar100,
    "figure7_wide_blocks": wide_blocks,
}
