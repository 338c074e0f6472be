"""Tables 1 and 5, and claims in the paper's text: averages, wide blocks, the threshold, small blocks."""

from collections.abc import Iterator
from typing import Any

from examples.paper import published
from examples.paper.averages import over_layers, over_weights, ranked
from examples.paper.experiments import shares
from examples.paper.show.tables import Shown, figure, percent, span

Row = dict[str, Any]
Results = dict[str, Any]


def complexity_table(results: Results) -> Shown:
    """Table 1 in numbers."""
    columns = ("method", "calibration", "ms", "copies", "peak memory", "header bits/weight")
    forms = {"ms": ".1f", "copies": ".1f", "peak": ".2f", "header": ".4f"}
    rows = results["complexity"]["all"]
    lines = [[row["method"], row["calibration"], *(figure(row[n], form) for n, form in forms.items())] for row in rows]
    notes = [
        "16 MiB of float32, a quarter of the blocks wide. Time to quantize and decode, once compiled: median of 5,",
        "also in multiples of a copy in memory; `packed` quantizes into the packed form. Peak memory beyond the",
        "weights, result included, in multiples of them. The paper has only adjectives: uniform very low and none, BTC",
        "low and small.",
        "Reconstruction PTQ (BRECQ and others) is not implemented here and was not run.",
    ]
    return Shown("Table 1. PTQ complexity, measured", columns, lines, notes)


def storage_table(results: Results) -> Shown:
    """Table 5, from packed leaves."""
    columns = ("block size", "bits", "payload", "header", "overhead", "paper: payload", "header", "overhead", "equal")
    lines = [_storage_line(row, row["published"]) for row in results["storage"]["all"]]
    return Shown(published.title(5), columns, lines, ["Bits per block; overhead per weight. Packed by the library."])


def _storage_line(row: Row, paper: Row) -> list[str]:
    names = ("payload", "header")
    equal = all(row[n] == paper[n] for n in names) and f"{row['overhead']:.2f}" == f"{paper['overhead']:.2f}"
    ours, theirs = ([*(str(one[n]) for n in names), f"{one['overhead']:.2f}"] for one in (row, paper))
    return [str(row["block_size"]), str(row["bits"]), *ours, *theirs, "yes" if equal else "NO"]


def averages_table(results: Results) -> Shown:
    """Both averages at each block size, next to the paper's column."""
    columns = ("model", "blocks", "payload over weights", "over layers", "effective", "paper bits", "rmse over weights")
    lines = [
        line for name, layers in results.get("averages", {}).items() for line in _average_lines(results, name, layers)
    ]
    notes = ["Effective: payload over weights plus 33 bits per block. The paper's 4.12 bits for ResNet56 are less than"]
    notes += ["4 + 33/256 = 4.129, the minimum for blocks of 256: its averages leave the header out."]
    return Shown("Bits averaged over weights and over layers", (*columns, "over layers", "paper rmse"), lines, notes)


def _average_lines(results: Results, name: str, layers: dict[str, list[Row]]) -> Iterator[list[str]]:
    what = results["networks"][name]
    paper = (published.row_of(what["dataset"], what["title"]) if what["own_weights"] else None) or {}
    for size, rows in layers.items():
        (bits, error), (layer_bits, layer_error) = over_weights(rows), over_layers(rows)
        figures = [figure(value, ".3f") for value in (bits, layer_bits, bits + 33 / int(size))]
        errors = [figure(value, ".5f") for value in (error, layer_error, paper.get("rmse"))]
        yield [what["title"], size, *figures, figure(paper.get("btc_bits"), ".2f"), *errors]


def compared_networks(results: Results) -> tuple[dict[str, Any], dict[str, Row]]:
    """Layers by block of the networks that are the paper's own, and the paper's rows of them."""
    layers, paper = {}, {}
    for name, value in results.get("averages", {}).items():
        what = results["networks"][name]
        row = published.row_of(what["dataset"], what["title"])
        if what["own_weights"] and row:
            layers[name], paper[name] = value, row
    return layers, paper


def readings_table(results: Results, best: int = 8) -> Shown:
    """The readings that fit the paper's column best, and the plain ones."""
    layers, paper = compared_networks(results)
    rows = ranked(layers, paper) if layers else []
    plain = [row for row in rows if row["taken"] == "all layers" and row["blocks"] in ("block 64", "block 256")]
    lines = [_reading(row) for row in rows[:best]] + [_reading(row) for row in plain if row not in rows[:best]]
    if rows:
        lines.append(["paper", "", "", "", *(f"{row['btc_bits']:.2f}, {row['rmse']:.5f}" for row in paper.values())])
    columns = (
        "layers",
        "average over",
        "blocks",
        "largest difference",
        *(results["networks"][n]["title"] for n in layers),
    )
    notes = [f"Payload bits and rmse; the best of {len(rows)} readings, and the plain ones. Differences in bits."]
    return Shown("What the paper's column of bits may be", columns, lines, notes)


def _reading(row: Row) -> list[str]:
    figures = [f"{bits:.2f}, {error:.5f}" for bits, error in row["figures"].values()]
    return [row["taken"], row["mean"].removeprefix("over "), row["blocks"], f"{row['off']:.3f}", *figures]


def uniform_table(results: Results) -> Shown:
    """The paper's uniform column, which shows less than 8 bits."""
    rows = published.uniform_column()
    lines = [[str(r["table"]), r["model"], f"{r['uniform']:.2f}", f"{r['mean']:.3f}"] for r in rows]
    equal = sum(abs(row["uniform"] - row["mean"]) < 0.0051 for row in rows)
    notes = [f"{equal} of {len(rows)} are (8 + BTC bits) / 2 to the last digit. The uniform quantizer stores 8 bits."]
    columns = ("table", "model", "uniform bits", "(8 + BTC bits) / 2")
    return Shown("The paper's bits of the uniform quantizer", columns, lines, notes)


def wide_table(results: Results) -> Shown:
    """Share of wide blocks, next to what section 3.1 says."""
    claims, lines = published.claims(), []
    for name, layers in results.get("wide", {}).items():
        share = shares(layers)
        names = ("first", "first three", "middle", "last")
        lines.append([results["networks"][name]["title"], str(len(layers)), *(percent(share[n], 1) for n in names)])
    said = [
        span([100 * v for v in claims[name]], ".0f")
        for name in ("first_wide", "first_wide", "middle_wide", "last_wide")
    ]
    lines.append(["paper (section 3.1)", "", *said])
    notes = ["Threshold 0.05, blocks of 64. `middle` is the mean over all layers except the first and the last."]
    return Shown("Share of wide blocks, %", ("model", "layers", "first", "first three", "middle", "last"), lines, notes)


def threshold_table(results: Results) -> Shown:
    """Sensitivity to the threshold."""
    columns = ("model", "threshold", "payload", "over layers", "effective", "rmse", "accuracy %", "agree %", "KL")
    lines = []
    for name, rows in results.get("thresholds", {}).items():
        lines += [_sweep(results["networks"][name]["title"], f"{row['threshold']:g}", row) for row in rows]
    return Shown("Sensitivity to the threshold, blocks of 64", columns, lines, list(_sensitivity(results)))


def _sensitivity(results: Results) -> Iterator[str]:
    """The change of bits and error over the range that the paper calls weakly sensitive."""
    low, high = published.claims()["weakly_sensitive"]
    for name, rows in results.get("thresholds", {}).items():
        first, last = (next(row for row in rows if row["threshold"] == t) for t in (low, high))
        bits = f"payload {first['payload']:.2f} to {last['payload']:.2f} bits"
        error = f"rmse {first['rmse']:.5f} to {last['rmse']:.5f} ({last['rmse'] / first['rmse']:.1f} times)"
        yield f"{results['networks'][name]['title']}, threshold {low:g} to {high:g}: {bits}, {error}."


def block_table(results: Results) -> Shown:
    """Figure 6 in numbers."""
    columns = ("model", "block size", "payload", "over layers", "effective", "rmse", "accuracy %", "agree %", "KL")
    lines = []
    for name, rows in results.get("block_sizes", {}).items():
        lines += [_sweep(results["networks"][name]["title"], str(row["block_size"]), row) for row in rows]
    notes = ["With 33 bits of header per block, blocks of 2 and 4 store about as much as float32 and float16."]
    return Shown("Block sizes on fully connected layers", columns, lines, notes)


def _sweep(title: str, setting: str, row: Row) -> list[str]:
    bits = [figure(row[name], ".3f") for name in ("payload", "payload_layers", "effective")]
    answers = [percent(row.get("accuracy")), percent(row.get("agreement")), figure(row.get("kl"), ".5f")]
    return [title, setting, *bits, figure(row["rmse"], ".5f"), *answers]
