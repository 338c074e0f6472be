"""What the paper shows in figures or in words: configurations, block sizes, thresholds, wide blocks by layer."""

from typing import Any

import jax
import numpy as np
from flax import linen

from btc_jax import Uniform
from btc_jax.metrics import dict_of
from examples.paper.exams import Exam
from examples.paper.methods import BLOCK_SIZES, METHODS, swept
from examples.paper.rows import Row, costs_of

PyTree = Any
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
SMALL_BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256)
BINS = 600
CONFIGURATIONS = tuple(Uniform(size, threshold=t) for size in BLOCK_SIZES for t in (0.03, 0.05, 0.1))
"""Figures 2 and 3: block sizes and thresholds step by step."""


def configurations(exam: Exam) -> dict[str, list[Row]]:
    """BTC step by step, and the two fixed references."""
    fixed = [{"method": name} | _costs(exam, name) for name in ("float32", "uniform8")]
    return {"steps": [_row(exam, codec) for codec in CONFIGURATIONS], "fixed": fixed}


def _costs(exam: Exam, name: str) -> Row:
    tree, metrics, _ = METHODS[name](exam.params, exam)
    costs = {"rmse": 0.0, "payload": 32.0, "effective": 32.0} if metrics is None else costs_of(metrics)
    return costs | exam.figures(tree)


def block_sizes(exam: Exam) -> list[Row]:
    """Figure 6: blocks of 2 to 256."""
    return [_row(exam, Uniform(size)) for size in SMALL_BLOCKS]


def thresholds(exam: Exam, answers: bool = True) -> list[Row]:
    """Blocks of 64 at each threshold; without `answers`, only bits and error, which do not run the network."""
    return [_row(exam, Uniform(threshold=threshold), answers) for threshold in THRESHOLDS]


def _row(exam: Exam, codec: Uniform, answers: bool = True) -> Row:
    tree, metrics, _ = swept(exam, codec)
    assert metrics is not None
    figures = exam.figures(tree) if answers else {}
    return {"block_size": codec.block_size, "threshold": codec.threshold} | costs_of(metrics) | figures


def wide_blocks(exam: Exam) -> list[Row]:
    """Share of wide blocks of each layer, from the first to the last, at the paper's threshold and blocks of 64."""
    _, metrics, _ = swept(exam, Uniform())
    assert metrics is not None
    layers = {leaf.path: leaf.measures for leaf in metrics.leaves if leaf.measures}
    rows = [(path, layers[path]) for path in layer_order(exam)]
    return [{"layer": path, "weights": m.weights, "wide": m.wide_share, "payload": m.payload_bits} for path, m in rows]


def layer_order(exam: Exam) -> list[str]:
    """Paths of all kernels in the order in which the network uses them; a tree of parameters is sorted by name."""
    used: list[str] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        used.append("/".join((*context.module.path, "kernel")))
        return call(*args, **kwargs)

    with linen.intercept_methods(record):
        jax.eval_shape(
            lambda params: exam.apply(params, exam.example), exam.params
        )  # a new function, so that no earlier trace is reused
    kernels = dict_of(exam.params)
    return [path for path in dict.fromkeys(used) if path in kernels]


def shares(layers: list[Row]) -> Row:
    """Mean share of wide blocks in the first, middle and last layers, which section 3.1 describes.

    "Early" may mean more than one layer, so the first three are included too.
    """
    wide = [layer["wide"] for layer in layers]
    middle = float(np.mean(wide[1:-1])) if len(wide) > 2 else None
    return {"first": wide[0], "first three": float(np.mean(wide[:3])), "middle": middle, "last": wide[-1]}


def histogram(exam: Exam) -> dict[str, Any]:
    """Figure 1: histograms of the weights of the middle layer, original and after each quantizer."""
    convolutions = [path for path in layer_order(exam) if np.ndim(_leaf(exam.params, path)) == 4]
    path = convolutions[len(convolutions) // 2]
    trees = {"float32": exam.params, "BTC": swept(exam, Uniform()).tree}
    trees["uniform8"] = METHODS["uniform8"](exam.params, exam).tree
    values = {name: np.asarray(_leaf(tree, path)).ravel() for name, tree in trees.items()}
    edges = np.histogram_bin_edges(values["float32"], BINS)
    counts = {name: _counted(weights, values["float32"], edges) for name, weights in values.items()}
    return {"layer": path, "edges": edges.tolist(), "counts": counts}


def _counted(weights: np.ndarray, original: np.ndarray, edges: np.ndarray) -> Row:
    rmse = float(np.sqrt(np.mean(np.square(weights - original))))
    counts = np.histogram(weights, edges)[0].tolist()
    return {"counts": counts, "distinct": len(np.unique(weights)), "rmse": rmse}


def _leaf(tree: PyTree, path: str) -> Any:
    return dict_of(tree)[path]
