"""The quantizers of the tables, one entry each; the whole evaluation follows from `METHODS`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import btc_jax
from btc_jax import Multilevel, Policy, Uniform
from btc_jax.baselines import Baseline
from btc_jax.codecs import Codec
from btc_jax.metrics import TreeMetrics
from examples.paper.exams import Exam
from examples.paper.merged import layer_metrics, merged_policy, restore

PyTree = Any
BLOCK_SIZES = (32, 64, 128, 256)
MAX_RMSE, MAX_DROP = 3e-3, 2.0
"""The limits of the paper's search (section 3.1)."""
BUDGET = 4.5
"""Budget of effective bits for the multilevel codec: about what the paper's codec uses."""


class Quantized(NamedTuple):
    """A quantized tree, packed or decoded, its metrics (`None` for the float tree), and a note for the table."""

    tree: PyTree
    metrics: TreeMetrics | None
    note: str = ""


def policy(codec: Codec | None = None) -> Policy:
    """What the paper quantizes: the weights of all convolutions and dense layers, of any size."""
    return Policy(codec or Uniform(), names=("kernel",), min_size=0)


def quantized(params: PyTree, codec: Codec, **options: Any) -> Quantized:
    """A tree packed with any codec, layer by layer; `options` go to `btc_quantize`."""
    chosen = policy(codec)
    tree = btc_jax.btc_quantize(params, policy=chosen, **options)
    return Quantized(tree, btc_jax.btc_metrics(params, tree, policy=chosen))


def swept(exam: Exam, codec: Uniform, note: str = "") -> Quantized:
    """The same weights and metrics for the paper's codec, but faster: see `merged`."""
    packed = btc_jax.btc_quantize(exam.merged.tree, policy=merged_policy(codec))
    return Quantized(restore(exam.merged, packed), layer_metrics(exam.merged, packed, codec), note)


def unquantized(params: PyTree, exam: Exam) -> Quantized:
    return Quantized(params, None)


def searched(params: PyTree, exam: Exam) -> Quantized:
    """The paper's choice: the largest blocks within its limits, or the smallest if none is."""
    merged, limits = exam.merged, {"block_sizes": BLOCK_SIZES, "max_rmse": MAX_RMSE, "max_drop": MAX_DROP}
    evaluate = (lambda tree: exam.accuracy(restore(merged, tree))) if exam.known else None
    result = btc_jax.btc_search(merged.tree, evaluate, policy=merged_policy(Uniform()), progress=False, **limits)
    if result.best is None:
        broke = result.trials[0].violation if result.trials else result.message
        return swept(exam, Uniform(BLOCK_SIZES[0]), f"{BLOCK_SIZES[0]}, and none holds: {broke}")
    stopped = result.trials[-1].violation
    rest = f"{result.trials[-1].codec.block_size}: {stopped}" if stopped else "all hold"
    return swept(exam, Uniform(result.best.codec.block_size), f"{result.best.codec.block_size}; {rest}")


def baseline(kind: Baseline) -> Callable[[PyTree, Exam], Quantized]:
    """One of the library's other quantizers, decoded immediately."""
    return lambda params, exam: Quantized(*btc_jax.baselines.apply_baseline(params, kind, policy=policy()))


METHODS: dict[str, Callable[[PyTree, Exam], Quantized]] = {
    "float32": unquantized,
    "BTC": searched,
    "uniform8": baseline(btc_jax.baselines.uniform8()),
    "percentile8": baseline(btc_jax.baselines.percentile8()),
    "Multilevel": lambda params, exam: quantized(params, Multilevel(), bits=BUDGET),
}
