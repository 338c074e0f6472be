"""One row of the tables: what one quantizer costs and saves on one network."""

import time
from typing import Any

from btc_jax.metrics import TreeMetrics
from examples.paper.exams import Exam
from examples.paper.methods import METHODS

Row = dict[str, Any]
FLOAT = {"payload": 32.0, "header": 0.0, "effective": 32.0, "rmse": 0.0, "payload_layers": 32.0, "rmse_layers": 0.0}


def measure(name: str, exam: Exam) -> Row:
    """The figures of one quantizer, by its name in `METHODS`."""
    start = time.perf_counter()
    tree, metrics, note = METHODS[name](exam.params, exam)
    costs = FLOAT if metrics is None else costs_of(metrics)
    return {"method": name, "note": note} | exam.figures(tree) | costs | {"seconds": time.perf_counter() - start}


def costs_of(metrics: TreeMetrics) -> Row:
    """Bits and error over all weights, and both averaged over layers, as the paper seems to do."""
    total, layers = metrics.total, [leaf.measures for leaf in metrics.leaves if leaf.measures]
    return {
        "payload": total.payload_bits,
        "header": total.header_bits,
        "effective": total.effective_bits,
        "rmse": total.rmse,
        "payload_layers": sum(layer.payload_bits for layer in layers) / len(layers),
        "rmse_layers": sum(layer.rmse for layer in layers) / len(layers),
        "wide_share": total.wide_share,
        "bytes": metrics.bytes_after,
    }
