"""Records as rich tables. Nothing is computed here, and nothing printed: `rich.print(table)` does."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from btc_jax.metrics import Measures, TreeMetrics
from btc_jax.plan import Plan
from btc_jax.search import SearchResult

_MEASURES = ("wide", "payload", "header", "effective", "rmse", "rel. rmse", "SQNR dB", "largest")


def metrics_table(metrics: TreeMetrics, title: str = "Quantized leaves") -> Table:
    """A row a leaf, dense ones with their reason, and the totals. Bits are per weight."""
    table = _table(title, ("leaf", "shape", "reason"), ("bytes", "packed", *_MEASURES))
    for leaf in metrics.leaves:
        figures = [""] * len(_MEASURES) if leaf.measures is None else _measures(leaf.measures)
        after = f"{leaf.bytes_after:,}" if leaf.measures else "dense"
        table.add_row(
            leaf.path, _shape(leaf.shape), leaf.reason, f"{leaf.bytes_before:,}", after, *figures,
            style=None if leaf.measures else "dim",
        )  # fmt: skip
    table.add_section()
    totals = [f"{metrics.bytes_before:,}", f"{metrics.bytes_after:,}", *_measures(metrics.total)]
    table.add_row("all", f"{metrics.total.weights:,} weights", "", *totals, style="bold")
    return table


def plan_table(plan: Plan, title: str = "Plan") -> Table:
    """A row a leaf: what would be taken, why not the others, and the bytes after."""
    table = _table(title, ("leaf", "shape", "dtype", "reason", "codec"), ("bytes", "after"))
    for row in plan.rows:
        codec = "dense" if row.codec is None else f"{row.codec.id} {row.codec.block_size}"
        after = _range(row.bytes_min, row.bytes_max)
        table.add_row(
            row.path, _shape(row.shape), row.dtype, row.reason, codec, f"{row.bytes_before:,}", after,
            style=None if row.codec else "dim",
        )  # fmt: skip
    table.add_section()
    total = _range(plan.bytes_min, plan.bytes_max)
    table.add_row("all", "", "", "", "", f"{plan.bytes_before:,}", total, style="bold")
    return table


def search_table(result: SearchResult, title: str = "Search") -> Table:
    """A row a trial; the message is the caption."""
    table = _table(title, ("block",), ("accuracy", "drop", "rmse", "effective", "packed", "seconds", "verdict"))
    for trial in result.trials:
        total = trial.metrics.total
        accuracy = "" if trial.accuracy is None else f"{trial.accuracy:.2%}"
        drop = "" if trial.drop is None else f"{trial.drop:.2f}"
        row = (
            accuracy,
            drop,
            f"{total.rmse:.5f}",
            f"{total.effective_bits:.3f}",
            f"{trial.metrics.bytes_after:,}",
        )
        verdict = trial.broke or ("best" if trial is result.best else "holds")
        style = "bold" if trial is result.best else None
        table.add_row(str(trial.codec.block_size), *row, f"{trial.seconds:.1f}", verdict, style=style)
    table.caption = result.message
    return table


def comparison_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """A row for each mapping of column name to figure; numbers are formatted by their column's name."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = _table(title, names[:1], names[1:])
    for row in rows:
        table.add_row(*(_figure(name, row.get(name)) for name in names))
    return table


def _table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", header_style="bold")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _measures(m: Measures) -> list[str]:
    bits = [f"{bits:.3f}" for bits in (m.payload_bits, m.header_bits, m.effective_bits)]
    errors = (f"{m.rmse:.3g}", f"{m.relative_rmse:.2%}", f"{m.sqnr_db:.2f}", f"{m.largest_error:.3g}")
    return [f"{m.wide_share:.1%}", *bits, *errors]


_FORMATS = {
    "accuracy": ".2%",
    "top-5": ".2%",
    "agreement": ".2%",
    "KL": ".5f",
    "rmse": ".5f",
    "bytes": ",",
    "SQNR dB": ".2f",
}


def _figure(name: str, value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else format(value, _FORMATS.get(name, ".3f"))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
