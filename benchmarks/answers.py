"""How far quantization moves the answers of networks at equal stored bits: btc_jax and other quantizers.

    python -m benchmarks.answers [NETWORK ...] [--bits X ...] [--data FOLDER] --output FOLDER

Networks are those of benchmarks/exams. All sides quantize the same leaves, everything stored counts, and other
quantizers get their leaves in PyTorch's layout. The divergence of a small network varies by a factor of two to three,
so figures are geometric means over draws; in each draw, the channels within every leaf are permuted before
quantization, in the same way for all sides, and restored afterwards. Prints tables, writes answers.json and a figure,
and keeps all measurements in the output folder for the next run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import rich
import typer

from benchmarks import exams
from benchmarks.answers_figure import draw
from benchmarks.answers_tables import markdown, summaries
from benchmarks.exams import Exam
from benchmarks.machine import measured_on
from benchmarks.peers import Peer, available
from benchmarks.sides import OURS, Kept, Row, of_peer, ours
from btc_jax._progress import tracked
from btc_jax.tables import comparison_table

BITS = (3.0, 3.4375, 4.0, 4.5, 5.5)
PEERS = (
    *("llama.cpp " + name for name in ("Q3_K", "Q4_K", "Q5_K", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_0")),
    *("HQQ 3-bit, 64", "HQQ 4-bit, 64", "bitsandbytes NF4, 64", "qwix int4, 32"),
)


def rows_of(exam: Exam, bits: list[float], peers: list[Peer], kept: Kept) -> Iterator[Row]:
    """The rows of one network for all sides."""
    sides: list[Any] = [(name, budget) for budget in bits for name in OURS]
    for side in tracked([*peers, *sides], exam.name, True):
        if isinstance(side, Peer):
            yield kept.row(exam, f"{side.name} {side.source}", lambda side=side: of_peer(exam, side))
        else:
            yield kept.row(exam, f"{side[0]} {side[1]:g} {kept.library}", lambda side=side: ours(exam, *side))


def main(
    networks: Annotated[list[str] | None, typer.Argument(metavar="[NETWORK]...", help="In benchmarks.exams.")] = None,
    bits: Annotated[list[float] | None, typer.Option(help="Budgets of effective bits.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the networks' files.")] = exams.DATA,
    output: Annotated[Path, typer.Option(help="Folder for results and stored rows.")] = Path("out"),
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure everything again.")] = False,
) -> None:
    peers = [peer for peer in available(rich.print) if peer.name in PEERS]
    kept, results = Kept(output / "answers", refresh), {}
    for exam in exams.available(networks, rich.print, data):
        rows = sorted(rows_of(exam, bits or list(BITS), peers, kept), key=lambda row: (row["effective"], row["name"]))
        results[exam.name] = rows
        shown = ({name: value for name, value in row.items() if name != "budget"} for row in rows)
        rich.print(comparison_table(shown, f"{exam.name}: {exam.what}"))
    if not results:
        raise typer.BadParameter("none of the networks is available")
    (output / "answers.json").write_text(json.dumps(results, indent=1))
    for title, rows in summaries(results).items():
        rich.print(comparison_table(rows, title))
    print(markdown(results))
    print(measured_on("llama-cpp-python", "hqq", "bitsandbytes", "qwix", "torch"))
    draw(results, output / "answers.svg")
    draw(results, output / "answers.png")


if __name__ == "__main__":
    typer.run(main)
