"""The page of a report. Figures are formatted here, and laid out by the template next to this file."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from btc_jax.metrics import LeafMetrics, Measures
from btc_jax.report.histogram import LIMIT, Histogram
from btc_jax.report.records import Figures
from btc_jax.tables import printable, shape_cell

ROWS = 1000
"""Leaves listed at most: browsers slow down beyond."""
_WORST = 20
_PICTURED = 12


def page_of(report: Figures) -> str:
    """The report as one HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not whenever the library is imported

    loader = PackageLoader("btc_jax.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"plain": printable, "shape": shape_cell, "path": histogram_path}
    return environment.get_template("page.html").render(_contents(report)) + "\n"


def _contents(report: Figures) -> dict[str, Any]:
    metrics, packed = report.metrics, report.packed
    blocks = max(sum(report.widths.values()), 1)
    return {
        "report": report,
        "ratio": f"{metrics.bytes_before / max(metrics.bytes_after, 1):.2f}",
        "before": f"{metrics.bytes_before:,}",
        "after": f"{metrics.bytes_after:,}",
        "total": _figures(metrics.total),
        "leaves": [_leaf(report, leaf) for leaf in packed[:ROWS]],
        "left_out": max(len(packed) - ROWS, 0),
        "worst": [_leaf(report, leaf) for leaf in report.worst[:_WORST]],
        "pictured": [_leaf(report, leaf) for leaf in report.worst[:_PICTURED]],
        "widths": [(width, count, f"{count / blocks:.1%}", count / blocks) for width, count in report.widths.items()],
        "histograms": report.histograms,
        "limit": f"{LIMIT:g}",
        "dense": _by_reason(report.dense),
        "quantizers": [
            ("btc_jax", metrics.bytes_after, _figures(metrics.total)),
            *((other.name, other.nbytes, _figures(other.measures)) for other in report.baselines),
        ],
    }


def _leaf(report: Figures, leaf: LeafMetrics) -> dict[str, Any]:
    assert leaf.measures is not None
    details, most = report.details[leaf.path], max(report.widths)
    blocks = max(sum(details.widths.values()), 1)
    scale = max((one.measures.effective_bits for one in report.packed if one.measures), default=1.0)
    return {
        "leaf": leaf,
        "details": details,
        "figures": _figures(leaf.measures),
        "share": f"{details.error_share:.1%}",
        "length": f"{100 * leaf.measures.effective_bits / scale:.1f}",
        "widths": [
            (width, f"{count / blocks:.1%}", f"{100 * count / blocks:.2f}", f"{(width + 1) / (most + 1):.2f}")
            for width, count in details.widths.items()
        ],
    }


def _figures(m: Measures) -> dict[str, str]:
    return {
        "bits": f"{m.effective_bits:.3f}",
        "payload": f"{m.payload_bits:.3f}",
        "header": f"{m.header_bits:.3f}",
        "sqnr": f"{m.sqnr_db:.2f}" if math.isfinite(m.sqnr_db) else "exact",
        "relative": f"{m.relative_rmse:.2%}",
        "rmse": f"{m.rmse:.3g}",
        "largest": f"{m.largest_error:.3g}",
        "weights": f"{m.weights:,}",
    }


def _by_reason(leaves: Sequence[LeafMetrics]) -> list[tuple[str, list[LeafMetrics], str]]:
    """Dense leaves by reason, those of the most bytes first. Being tied is one reason, whatever the other leaf."""
    groups: dict[str, list[LeafMetrics]] = defaultdict(list)
    for leaf in leaves:
        groups["tied to another leaf" if leaf.tied_to else leaf.reason].append(leaf)
    sized = [(reason, group, sum(leaf.bytes_after for leaf in group)) for reason, group in groups.items()]
    return [(reason, group, f"{size:,}") for reason, group, size in sorted(sized, key=lambda row: -row[2])]


def histogram_path(counts: Histogram, most: int, width: int = 324, height: int = 100) -> str:
    """The outline of a histogram as the `d` of an SVG path.

    Args:
        counts: weights in each bin.
        most: the count that reaches the top.

    Examples:
        >>> histogram_path((1, 2), 2, 10, 8)
        'M0 8V4H5V0H10V8'
    """
    step, top = width / len(counts), max(most, 1)
    steps = [f"V{height - height * count / top:.4g}H{step * (i + 1):.4g}" for i, count in enumerate(counts)]
    return f"M0 {height}{''.join(steps)}V{height}"
