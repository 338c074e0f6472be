"""The figure of the comparison of answers: divergence against stored bits, one panel per network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.answers_tables import COLUMNS
from benchmarks.sides import Row

PANELS = ("resnet20-paper", "minilm", "babyllama")
LINES = {
    "btc_jax, by shape": ("btc_jax", "#0b5fa5", "o-"),
    "btc_jax, sensitivities, random inputs": ("btc_jax, with sensitivities", "#08a045", "s-"),
}
PEERS = {
    "llama.cpp": ("llama.cpp", "#c0392b", "^"),
    "HQQ": ("HQQ", "#8e44ad", "D"),
    "bitsandbytes": ("bitsandbytes NF4", "#d68910", "v"),
    "qwix": ("qwix int4", "#555555", "X"),
}


def draw(results: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Write the figure, in the format given by the file name."""
    networks = [network for network in PANELS if network in results] or list(results)[:3]
    figure, panels = plt.subplots(1, len(networks), figsize=(3.4 * len(networks), 3.3), squeeze=False)
    for panel, network in zip(panels[0], networks, strict=True):
        _panel(panel, results[network])
        panel.set_title(COLUMNS.get(network, network), fontsize=10)
    panels[0][0].set_ylabel("divergence of the answers\n(KL, nats; lower is better)", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _panel(panel: Axes, rows: Sequence[Row]) -> None:
    for name, (label, colour, style) in LINES.items():
        points = sorted((row["effective"], row["KL"]) for row in rows if row["name"] == name)
        panel.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4) if points else None
    for start, (label, colour, marker) in PEERS.items():
        points = [(row["effective"], row["KL"]) for row in rows if row["name"].startswith(start)]
        if points:
            panel.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, label=label, zorder=3)
    panel.set_yscale("log")
    panel.set_xlabel("stored bits per weight", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, which="major")
