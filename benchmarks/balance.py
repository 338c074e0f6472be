"""Which balance between total and relative error costs a network least: the table behind `Policy.balance`.

    python -m benchmarks.balance [NETWORK ...] --output FOLDER

Quantizes CIFAR-10 ResNets to the same stored bits while the squared error of a leaf counts `rms ** -p`, for p from 0
(least total error) to 2 (least relative error of each leaf), and prints how far the answers move.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import rich
import typer
from rich.progress import track

from benchmarks import networks
from btc_jax import Multilevel, Policy, btc_metrics, btc_quantize, comparison_table

BALANCES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
BITS = (3.0, 3.5, 4.5)


def row(network: networks.WeightSet, bits: float, balance: float) -> dict[str, Any]:
    """One network at one rate and one balance."""
    policy = Policy(Multilevel(), names=("*",), min_size=0, order="stored", balance=balance)
    tree = btc_quantize(network.params, policy=policy, bits=bits)
    metrics = btc_metrics(network.params, tree, policy=policy)
    worst = min(leaf.measures.sqnr_db for leaf in metrics.leaves if leaf.measures)
    assert network.exam is not None
    result = network.exam.evaluate(tree)
    return {
        "name": network.name,
        "bits": bits,
        "balance": balance,
        "effective": metrics.total.effective_bits,
        "SQNR dB": metrics.total.sqnr_db,
        "worst leaf dB": worst,
        "KL": result.kl,
        "agreement": result.agreement,
        "accuracy": result.top1,
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NETWORK]...", help="Of benchmarks.networks.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("out"),
) -> None:
    loaded = [networks.cifar(name) for name in names or ("resnet20", "resnet32", "resnet56")]
    tried = list(itertools.product(loaded, BITS, BALANCES))
    rows = [row(*one) for one in track(tried, "quantizing", transient=True)]
    rich.print(comparison_table(rows, "Balance of total and relative error"))
    output.mkdir(parents=True, exist_ok=True)
    (output / "balance.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
