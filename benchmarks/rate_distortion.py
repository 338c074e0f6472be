"""Error against stored bits of real networks: the paper's codec and the baselines, everything stored counted.

    python -m benchmarks.rate_distortion NETWORK.safetensors ... --output FOLDER

Prints a table, and writes it as JSON together with a figure. Networks are safetensors files in PyTorch's layout; every
array with two axes or more is quantized, whatever its size.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import rich
import typer
from safetensors.numpy import load_file

from btc_jax import (
    Baseline,
    Measures,
    Policy,
    Uniform,
    absmax4,
    apply_baseline,
    btc_metrics,
    btc_quantize,
    comparison_table,
    percentile8,
    uniform8,
)

Params = dict[str, np.ndarray]
BLOCK_SIZES = (32, 64, 128, 256)
THRESHOLDS = (0.0, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, float("inf"))
BASELINES = (uniform8(), percentile8(99.9), absmax4(32), absmax4(64), absmax4(128))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by the colour-blind too


def policy(codec: Uniform) -> Policy:
    return Policy(codec, names=("*",), min_size=0, order="stored")


def btc_row(params: Params, codec: Uniform) -> dict[str, Any]:
    """The figures of one configuration of the paper's codec."""
    chosen = policy(codec)
    total = btc_metrics(params, btc_quantize(params, policy=chosen), policy=chosen).total
    return row(f"BTC {codec.block_size}, threshold {codec.threshold:g}", f"BTC {codec.block_size}", total)


def baseline_row(params: Params, baseline: Baseline) -> dict[str, Any]:
    """The figures of one baseline."""
    _, metrics = apply_baseline(params, baseline, policy=policy(Uniform()))
    return row(baseline.name, baseline.name.split(" ")[0], metrics.total)


def row(name: str, family: str, total: Measures) -> dict[str, Any]:
    figures = {"payload": total.payload_bits, "header": total.header_bits, "effective": total.effective_bits}
    return {"name": name, "family": family} | figures | {"rmse": total.rmse, "SQNR dB": total.sqnr_db}


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel a network: effective bits against SQNR, a line for each block size, a point for each baseline."""
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4), sharey=True, squeeze=False)
    for panel, (network, rows) in zip(panels[0], results.items(), strict=True):
        for size, colour in zip(BLOCK_SIZES, COLOURS, strict=True):
            line = sorted((r["effective"], r["SQNR dB"]) for r in rows if r["family"] == f"BTC {size}")
            panel.plot(*zip(*line, strict=True), "-o", color=colour, markersize=4, label=f"BTC, blocks of {size}")
        for family, marker in (("absmax4", "s"), ("uniform8", "^"), ("percentile8", "v")):
            points = [(r["effective"], r["SQNR dB"]) for r in rows if r["family"] == family]
            panel.plot(*zip(*points, strict=True), marker, color="black", linestyle="none", label=family)
        panel.set(title=network, xlabel="effective bits per weight (everything stored)")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("SQNR of the weights, dB")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main(
    networks: Annotated[
        list[Path], typer.Argument(help="safetensors files, PyTorch layout.", exists=True, dir_okay=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for the JSON file and the figure.")] = Path("out"),
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    for network in networks:
        params = load_file(network)
        rows = [btc_row(params, Uniform(size, threshold=t)) for size in BLOCK_SIZES for t in THRESHOLDS]
        rows += [baseline_row(params, baseline) for baseline in BASELINES]
        results[network.stem] = rows
        shown = ({k: v for k, v in r.items() if k != "family"} for r in sorted(rows, key=lambda r: r["effective"]))
        rich.print(comparison_table(shown, f"{network.stem}, bits per weight"))
    (output / "rate_distortion.json").write_text(json.dumps(results, indent=1))
    draw(results, output / "rate_distortion.svg")
    draw(results, output / "rate_distortion.png")


if __name__ == "__main__":
    typer.run(main)
