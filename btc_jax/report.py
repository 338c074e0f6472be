"""Records as rich tables. Nothing is computed here, and nothing printed: `rich.print(table)` does."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from btc_jax.codecs import Codec
from btc_jax.metrics import Measures, TreeMetrics
from btc_jax.plan import Plan, PlanRow
from btc_jax.search import SearchResult, Trial

_MEASURES = ("wide", "payload", "header", "effective", "rmse", "rel. rmse", "SQNR dB", "largest")
_TEXTS = ("leaf", "shape", "dtype", "reason", "codec", "name", "verdict")


def metrics_table(metrics: TreeMetrics, title: str = "Quantized leaves (bits per weight)") -> Table:
    """A row a leaf, dense ones with their reason, and the totals."""
    table = _table(title, ("leaf", "shape", "reason", "bytes", "packed", *_MEASURES))
    for leaf in metrics.leaves:
        figures = [""] * len(_MEASURES) if leaf.measures is None else _measures(leaf.measures)
        after = f"{leaf.bytes_after:,}" if leaf.measures else "" if leaf.tied_to else "dense"
        cells = (leaf.path, _shape(leaf.shape), leaf.reason, f"{leaf.bytes_before:,}", after, *figures)
        _add(table, cells, None if leaf.measures else "dim")
    table.add_section()
    totals = (f"{metrics.bytes_before:,}", f"{metrics.bytes_after:,}", *_measures(metrics.total))
    _add(table, ("all", f"{metrics.total.weights:,} weights", "", *totals), "bold")
    return table


def plan_table(plan: Plan, title: str = "Plan") -> Table:
    """A row a leaf: what would be packed, why not the others, and the bytes after; as caption, what a target allows."""
    table = _table(title, ("leaf", "shape", "dtype", "reason", "codec", "bytes", "after"))
    for row in plan.rows:
        codec = "dense" if row.codec is None else codec_cell(row.codec.to_json(), row.order)
        cells = (row.path, _shape(row.shape), row.dtype, row.reason, codec, f"{row.bytes_before:,}", _after(row, plan))
        _add(table, cells, None if row.codec else "dim")
    table.add_section()
    after = f"at most {plan.bytes_max:,}" if plan.note else _range(plan.bytes_min, plan.bytes_max)
    _add(table, ("all", "", "", "", "", f"{plan.bytes_before:,}", after), "bold")
    table.caption = Text(plan.note) if plan.note else None
    return table


def _after(row: PlanRow, plan: Plan) -> str:
    """The bytes of a leaf, if they do not depend on how a target is shared out."""
    shared = plan.note and row.bytes_min < row.bytes_max and isinstance(row.codec, Codec) and row.codec.adaptive
    return "shared out" if shared else _range(row.bytes_min, row.bytes_max)


def search_table(result: SearchResult, title: str = "Search (bits per weight)") -> Table:
    """A row a trial; the message is the caption. Budgets of bits, and divergences, have columns where there are any."""
    rows = [_trial(trial, trial is result.best) for trial in result.trials]
    names = (
        "block",
        "budget",
        "accuracy",
        "drop",
        "KL",
        "agreement",
        "rmse",
        "effective",
        "packed",
        "seconds",
        "verdict",
    )
    optional = ("budget", "KL", "agreement")
    names = [name for name in names if name not in optional or any(row[name] for row in rows)]
    table = _table(title, names)
    for row, trial in zip(rows, result.trials, strict=True):
        _add(table, [row[name] for name in names], "bold" if trial is result.best else None)
    table.caption = Text(result.message)
    return table


def _trial(trial: Trial, best: bool) -> dict[str, str]:
    total = trial.metrics.total
    return {
        "block": str(trial.codec.block_size),
        "budget": "" if trial.bits is None else f"{trial.bits:.3f}",
        "accuracy": "" if trial.accuracy is None else f"{trial.accuracy:.2%}",
        "drop": "" if trial.drop is None else f"{trial.drop:.2f}",
        "KL": "" if trial.kl is None else f"{trial.kl:.5f}",
        "agreement": "" if trial.agreement is None else f"{trial.agreement:.2%}",
        "rmse": f"{total.rmse:.5f}",
        "effective": f"{total.effective_bits:.3f}",
        "packed": f"{trial.metrics.bytes_after:,}",
        "seconds": f"{trial.seconds:.2f}",
        "verdict": trial.broke or ("best" if best else "holds"),
    }


def codec_cell(codec: Mapping[str, Any], order: str) -> str:
    """A codec as JSON values, and an order, in few words: `multilevel 32, 4 bits, taps`."""
    words = [f"{codec.get('id')} {codec.get('block_size')}"]
    if (width := codec.get("width")) is not None:
        words.append("one width" if width == "leaf" else f"{width} bits")
    return ", ".join([*words, "taps"] if order.endswith("-taps") else words)


def comparison_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """A row for each mapping of column name to figure; numbers are formatted by their column's name."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = _table(title, names)
    for row in rows:
        _add(table, [_figure(name, row.get(name)) for name in names])
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(
        title=Text(title), min_width=len(title), title_justify="left", caption_justify="left", header_style="bold"
    )
    table.box, table.padding, table.show_edge = box.SIMPLE, 0, False  # narrow: figures stay whole on 80 columns
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXTS else "right", overflow="fold")
    return table


def _add(table: Table, cells: Iterable[str], style: str | None = None) -> None:
    # As plain text: a path or an error message may hold what rich takes for markup.
    table.add_row(*map(Text, cells), style=style)


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
    default = "," if isinstance(value, int) else ".3f"
    return value if isinstance(value, str) else format(value, _FORMATS.get(name, default))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
