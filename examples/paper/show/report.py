"""All tables of a run, on the terminal and in files."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.paper.published import published
from examples.paper.show import accuracy, studies
from examples.paper.show.tables import Shown
from examples.paper.store import write_whole

Results = dict[str, Any]


def tables(results: Results) -> list[Shown]:
    """The paper's six tables, and those for the claims in its text."""
    found = [
        studies.complexity_table(results),
        accuracy.accuracy_table(2, results),
        accuracy.accuracy_table(3, results),
    ]
    found += [accuracy.summary_table(results), studies.storage_table(results), accuracy.accuracy_table(6, results)]
    found += [accuracy.mlp_table(results), studies.averages_table(results), studies.readings_table(results)]
    found += [studies.uniform_table(results), studies.wide_table(results), studies.threshold_table(results)]
    return [*found, studies.block_table(results)]


def missing_lines(results: Results) -> list[str]:
    """A line for everything that was not run: what it is, and how to get it."""
    return [f"{missing['what']}: {missing['how']}" for missing in results["missing"]]


def print_all(console: Console, results: Results) -> None:
    for shown in tables(results):
        if shown.rows:
            console.print(shown.rich())
            console.print(*shown.notes, "", sep="\n", soft_wrap=True)
    if lines := missing_lines(results):
        console.print(f"Not run, for lack of files ({len(lines)}); `--download` fetches weights:")
        for line in lines:
            console.print(f"- {line}", soft_wrap=True)


def write_all(folder: Path, results: Results, figures: list[str]) -> list[Path]:
    """Write `paper.md` with tables and figures, and `paper.json` with all results."""
    document = {"published": published(), "results": results}
    write_whole(folder / "paper.json", json.dumps(document, indent=1, allow_nan=False).encode())
    write_whole(folder / "paper.md", _markdown(results, figures).encode())
    return [folder / "paper.md", folder / "paper.json"]


def _markdown(results: Results, figures: list[str]) -> str:
    parts = ["# The paper's evaluation, reproduced\n"]
    parts += [shown.markdown() for shown in tables(results) if shown.rows]
    parts += ["## Figures\n", *(f"![{name}]({name}.svg)\n" for name in figures)]
    parts += ["## Not run\n", *(f"- {line}" for line in missing_lines(results))]
    return "\n".join(parts) + "\n"
