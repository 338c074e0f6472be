"""Draws how the two codecs represent one block of weights.

    python -m benchmarks.codec_figure

Writes docs/codecs.svg: the weights of a block, the levels that each codec offers it at about 4 bits, and the level that
each weight takes.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from btc_jax import BTCTensor, Multilevel, Uniform
from btc_jax.packing import quantize_leaf

FILE = Path(__file__).parents[1] / "docs" / "codecs.svg"
BLOCK = 32


def levels(packed: BTCTensor, block: int) -> np.ndarray:
    """The values that the codes of a block can stand for."""
    form, width = packed.format, int(np.asarray(packed.widths)[block])
    header = {name: np.asarray(array) for name, array in packed.header.items()}
    widths, unpacked = form.unpack_header(header, packed.num_blocks)
    grid: dict[str, Any] = {name: np.asarray(values)[block : block + 1] for name, values in unpacked.items()}
    codes = np.arange(2**width)[None]
    return np.asarray(form.decode(codes, form.grid(widths[block : block + 1], grid)))[0]


def draw(ax: Axes, packed: BTCTensor, weights: np.ndarray, block: int, title: str) -> None:
    decoded = np.asarray(packed.dequantize()).reshape(-1, BLOCK)[block]
    for level in levels(packed, block):
        ax.axhline(level, color="0.85", linewidth=0.8, zorder=0)
    places = np.arange(BLOCK)
    ax.vlines(places, weights, decoded, color="tab:red", linewidth=1)
    ax.plot(places, weights, "o", color="tab:blue", markersize=4, label="weight")
    ax.plot(places, decoded, "_", color="tab:red", markersize=7, label="level that it takes")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("weight of the block")


def main() -> None:
    blocks = 0.02 * np.random.default_rng(3).standard_normal((64, BLOCK)).astype(np.float32)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, codec, title in (
        (axes[0], Uniform(BLOCK, threshold=0.05), "Uniform: even steps from minimum to maximum"),
        (axes[1], Multilevel(width=4), "Multilevel: levels denser in the middle"),
    ):
        draw(ax, quantize_leaf(blocks, codec, order="stored"), blocks[0], 0, title)
    axes[0].set_ylabel("value")
    axes[1].legend(fontsize=8, loc="upper right")
    plt.rcParams["svg.hashsalt"] = "btc_jax"
    figure.savefig(FILE, metadata={"Date": None})


if __name__ == "__main__":
    main()
