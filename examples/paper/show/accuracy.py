"""Tables 2, 3, 4 and 6, and that of the MLPs: the quantizers on each network, next to the paper's figures."""

from collections.abc import Iterator
from typing import Any

from examples.paper import published
from examples.paper.show.tables import Shown, figure, percent, span

Row = dict[str, Any]
Results = dict[str, Any]
PAPER_COLUMN = {"float32": "fp32", "BTC": "btc", "uniform8": "uniform", "percentile8": "percentile"}
COLUMNS = (
    "model",
    "method",
    "acc. %",
    "± s.e.",
    "paper %",
    "agree %",
    "KL",
    "rmse",
    "paper rmse",
    "payload",
    "by layer",
)
COLUMNS += ("paper bits", "stored", "block size, why")
"""Bits per weight: `payload` is over weights, `by layer` the mean of layers, `stored` counts everything."""


def accuracy_table(number: int, results: Results) -> Shown:
    """Table 2, 3 or 6: the paper's networks in its order, followed by other weights of the same networks."""
    dataset = published.published()[f"table{number}"]["dataset"]
    rows = [row for row in results["rows"] if row["dataset"] == dataset]
    own = {row["title"]: [r for r in rows if r["title"] == row["title"] and r["own_weights"]] for row in rows}
    lines: list[list[str]] = []
    for paper in published.table(number):
        lines += _lines(own.get(paper["model"], []), paper) or _not_run(paper)
    titles = {paper["model"] for paper in published.table(number)}
    for row in rows:
        if not row["own_weights"] or row["title"] not in titles:
            lines.append(_line(row, None))
    return Shown(published.title(number), COLUMNS, lines, list(_notes(rows)))


def mlp_table(results: Results) -> Shown:
    """The MLPs, for which the paper gives only a row in Table 4."""
    rows = [row for row in results["rows"] if row["dataset"] == "tabular"]
    notes = ["Two hidden layers of 256 and 128, trained here; accuracy, agreement and KL on the held-out rows:"]
    notes += [", ".join(dict.fromkeys(row["known"] for row in rows)) + "."]
    return Shown("MLPs on tabular data", COLUMNS, [_line(row, None) for row in rows], notes)


def _lines(rows: list[Row], paper: Row) -> list[list[str]]:
    return [_line(row, paper) for row in rows]


def _line(row: Row, paper: Row | None) -> list[str]:
    column = PAPER_COLUMN.get(row["method"])
    theirs = paper.get(column) if paper and column else None
    bits = paper.get(f"{column}_bits") if paper and column else None
    error = paper.get("rmse") if paper and row["method"] == "BTC" else None
    quantized = row["method"] != "float32"
    return [
        row["title"],
        row["method"],
        percent(row.get("accuracy")),
        percent(row.get("standard_error")),
        figure(theirs, ".2f"),
        percent(row.get("agreement")) if quantized else "",
        figure(row.get("kl"), ".5f") if quantized else "",
        figure(row["rmse"], ".5f") if quantized else "",
        figure(error, ".5f"),
        figure(row["payload"], ".3f"),
        figure(row["payload_layers"], ".3f"),
        figure(bits, ".2f"),
        figure(row["effective"], ".3f"),
        row["note"],
    ]


def _not_run(paper: Row) -> list[list[str]]:
    """Rows with only the paper's figures."""
    lines = []
    for method, column in PAPER_COLUMN.items():
        if column in paper:
            bits, error = paper.get(f"{column}_bits"), paper.get("rmse") if method == "BTC" else None
            cells = {"model": paper["model"], "method": method, "block size, why": "not run, see below"}
            cells |= {"paper %": figure(paper[column], ".2f"), "paper bits": figure(bits, ".2f")}
            lines.append([(cells | {"paper rmse": figure(error, ".5f")}).get(name, "") for name in COLUMNS])
    return lines


def _notes(rows: list[Row]) -> Iterator[str]:
    yield "Bits per weight: payload over weights and averaged over layers; stored includes header and padding."
    if any(row.get("known") for row in rows):
        yield f"Accuracy on: {', '.join(sorted({row['known'] for row in rows if row.get('known')}))}."
        yield f"Agreement and KL on: {', '.join(sorted({row['compared'] for row in rows if row.get('compared')}))}."
    elif rows:
        yield "No images available: bits and errors only."


CLASSES = {
    "ResNet (4 depths)": lambda row: row["title"].startswith("ResNet") and row["dataset"].startswith("cifar"),
    "ShuffleNetV2": lambda row: row["title"].startswith("ShuffleNet"),
    "MobileNetV2": lambda row: row["title"].startswith("MobileNet"),
    "RepVGG-A0": lambda row: row["title"].startswith("RepVGG"),
    "MLP": lambda row: row["title"].startswith("MLP"),
}


def summary_table(results: Results) -> Shown:
    """Table 4 in three versions: as printed, from the paper's own Tables 2 and 3, and as measured."""
    columns = ("class", "paper: drop", "Tables 2, 3", "measured", "paper: bits", "Tables 2, 3", "measured")
    columns += ("paper: rmse", "Tables 2, 3", "measured")
    lines = [_summary(row, results) for row in published.table(4)]
    notes = [
        "Drops in points of accuracy. `measured` bits are payload averaged over layers, as the paper's seem to be."
    ]
    return Shown(published.title(4), columns, lines, notes)


def _summary(paper: Row, results: Results) -> list[str]:
    taken = CLASSES[paper["class"]]
    theirs = [
        row
        for n, name in ((2, "cifar10"), (3, "cifar100"))
        for row in published.table(n)
        if taken({"title": row["model"], "dataset": name})
    ]
    rows = [row for row in results["rows"] if taken(row)]
    ours = [row for row in rows if row["method"] == "BTC"]
    floats = {row["name"]: row.get("accuracy") for row in rows if row["method"] == "float32"}
    drops = [100 * (floats[row["name"]] - row["accuracy"]) for row in ours if row.get("accuracy") is not None]
    return [
        paper["class"],
        span(paper["drop"], ".1f"),
        span([row["fp32"] - row["btc"] for row in theirs], ".2f"),
        span(drops, ".2f"),
        span(paper["bits"], ".1f"),
        span([row["btc_bits"] for row in theirs], ".2f"),
        span([row["payload_layers"] for row in ours], ".2f"),
        span(paper["rmse"], ".4f"),
        span([row["rmse"] for row in theirs], ".4f"),
        span([row["rmse"] for row in ours], ".4f"),
    ]
