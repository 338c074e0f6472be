"""Error against stored bits: btc_jax's codecs and other quantizers on real weights, counting everything stored.

    python -m benchmarks.rate_distortion [SET ...] [--data FOLDER] --output FOLDER

Sets are resnet20, resnet32, resnet56, minilm, gaussian and laplace (all but resnet32 by default), or paths of
safetensors files in PyTorch's layout, whose arrays with two or more axes are quantized. Prints a table for each set,
and writes a JSON file and a figure. Other quantizers are included if they are installed: pip install
"btc_jax[benchmarks,peers-ggml,peers-torch]"; their figures are kept in the output folder for the next run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import rich
import typer

from benchmarks import networks
from benchmarks.machine import measured_on
from benchmarks.networks import WeightSet
from benchmarks.peers import Peer, available
from benchmarks.rate_distortion_figure import draw
from benchmarks.rows import Row, measured, peer_row
from btc_jax import Multilevel, Policy, Uniform, btc_dequantize, btc_quantize
from btc_jax._progress import tracked
from btc_jax.codecs import Codec
from btc_jax.tables import comparison_table

DEFAULT_SETS = tuple(name for name in networks.SETS if name != "resnet32")
THRESHOLDS = (0.0, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, float("inf"))
PAPER = (*((64, t) for t in THRESHOLDS), *((size, t) for size in (32, 128, 256) for t in (0.05, float("inf"))))
MULTILEVEL = {
    "Multilevel": (Multilevel(), (2.5, 3.0, 3.44, 4.0, 4.25, 4.5, 5.0, 5.5, 6.0, 6.56, 7.5)),
    "Multilevel, exhaustive": (Multilevel(effort="exhaustive"), (3.0, 4.0, 4.5, 5.0, 6.0)),
    "Multilevel, a width a leaf": (Multilevel(width="leaf"), (3.0, 4.0, 4.5, 5.0, 6.0)),
}
"""Codecs and their budgets of bits."""
COLUMNS = ("name", "effective", "SQNR dB", "relative dB", "KL", "agreement")


def everything(codec: Codec) -> Policy:
    """A policy that quantizes every leaf, in PyTorch's memory layout."""
    return Policy(codec, names=("*",), min_size=0, order="stored")


def ours(weights: WeightSet) -> Iterator[Row]:
    """The rows of btc_jax's codecs."""
    for size, threshold in PAPER:
        names = {"name": f"BTC {size}, threshold {threshold:g}", "family": f"BTC {size}"}
        yield coded(weights, everything(Uniform(size, threshold=threshold)), names)
    for name, (codec, budgets) in MULTILEVEL.items():
        for bits in budgets:
            names = {"name": f"{name} {bits:g}", "family": name}
            # Minimize the total error, which the figure and the table measure.
            yield coded(weights, everything(codec), names, bits=bits, sensitivity="equal")


def coded(weights: WeightSet, policy: Policy, names: dict[str, str], **target: Any) -> Row:
    """The row for weights packed by `policy`; `target` is passed to `btc_quantize`."""
    packed = btc_quantize(weights.params, policy=policy, **target)
    bits = 8 * sum(leaf.nbytes for leaf in packed.values())
    return measured(weights, btc_dequantize(packed), bits, **names, source="btc_jax")


def compare(weights: WeightSet, peers: list[Peer], cache: Path, refresh: bool) -> list[Row]:
    """The rows of all sides, sorted by bits."""
    what = f"{weights.name}: other quantizers"
    rows = [peer_row(weights, peer, cache, refresh) for peer in tracked(peers, what, True)]
    with rich.get_console().status(f"{weights.name}: btc_jax"):
        rows += ours(weights)
    return sorted(rows, key=lambda row: row["effective"])


def show(weights: WeightSet, rows: list[Row]) -> None:
    shown = ({name: row[name] for name in COLUMNS if name in row} for row in rows)
    rich.print(comparison_table(shown, f"{weights.name}, {weights.size:,} weights; effective bits per weight"))


def load(names: list[str], data: Path) -> Iterator[WeightSet]:
    for name in names:
        try:
            yield networks.load(name, data)
        except networks.MissingWeights as missing:
            rich.print(f"left out: {missing}")


def main(
    sets: Annotated[list[str] | None, typer.Argument(help="Sets of weights, or safetensors files.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the CIFAR-10 networks and images.")] = networks.DATA,
    output: Annotated[Path, typer.Option(help="Folder for the results, the figure, and peers' figures.")] = Path("out"),
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the peers again.")] = False,
) -> None:
    peers = available(rich.print)
    results = {}
    for weights in load(sets or list(DEFAULT_SETS), data):
        results[weights.name] = compare(weights, peers, output / "peers", refresh)
        show(weights, results[weights.name])
    if not results:
        raise typer.BadParameter("none of the sets is available")
    output.mkdir(parents=True, exist_ok=True)
    (output / "rate_distortion.json").write_text(json.dumps(results, indent=1))
    draw(results, output / "rate_distortion.svg")
    draw(results, output / "rate_distortion.png")
    print(measured_on("gguf", "hqq", "bitsandbytes", "qwix", "torchao", "torch"))


if __name__ == "__main__":
    typer.run(main)
