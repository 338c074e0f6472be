"""The paper's search: larger and larger blocks, until the error or the accuracy breaks its limit (section 3.1)."""

import dataclasses
import enum
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from btc_jax._progress import tracked
from btc_jax._typing import PyTree
from btc_jax.codecs import Codec
from btc_jax.metrics import TreeMetrics, btc_metrics
from btc_jax.policy import Policy
from btc_jax.tensor import is_packed
from btc_jax.tree import btc_quantize, flatten, one_policy

Evaluate = Callable[[PyTree], float]
"""`evaluate(params) -> accuracy` from 0 to 1, for a dense tree as for a packed one."""


class SearchStatus(enum.StrEnum):
    """How a search ended."""

    COMPLETE = "complete"
    """Every block size held."""
    STOPPED = "stopped"
    """A block size broke a limit; the ones before it held."""
    NOTHING_HELD = "nothing held"
    """The first block size already broke a limit."""
    EVALUATE_FAILED = "evaluate failed"
    """The evaluate function raised, or returned what is no accuracy."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        codec: the default codec of the policy, with this trial's block size.
        metrics: bits, bytes and error of the packed tree.
        accuracy: what `evaluate` returned, 0 to 1; `None` if it was not called or failed.
        drop: points (hundredths) of accuracy lost against the float tree; `None` without accuracy.
        seconds: time for packing, measuring and evaluating.
        broke: the limit it broke, in words; empty if it held.
    """

    codec: Codec
    metrics: TreeMetrics
    accuracy: float | None
    drop: float | None
    seconds: float
    broke: str

    @property
    def held(self) -> bool:
        return not self.broke


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        status: how it ended.
        message: the same in words, with what to do next.
        best: the last trial that held, or `None`.
        tree: the packed tree of `best`, or `None`.
        trials: all trials, in the order made.
        accuracy: the float tree's accuracy, or `None`.
    """

    status: SearchStatus
    message: str
    best: Trial | None
    tree: PyTree | None
    trials: tuple[Trial, ...]
    accuracy: float | None

    def to_json(self) -> dict[str, Any]:
        """The record, without the tree, as plain JSON values."""
        trials = [
            {
                "codec": t.codec.to_json(),
                "metrics": t.metrics.to_json(),
                "accuracy": t.accuracy,
                "drop": t.drop,
            }
            | {"seconds": t.seconds, "broke": t.broke}
            for t in self.trials
        ]
        best = next((i for i, trial in enumerate(self.trials) if trial is self.best), None)
        return {
            "status": self.status,
            "message": self.message,
            "accuracy": self.accuracy,
            "best": best,
            "trials": trials,
        }


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What a configuration must keep to; `None` is no limit."""

    max_rmse: float | None
    max_drop: float | None

    def __post_init__(self):
        for name in ("max_rmse", "max_drop"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more, or None for no limit")

    def broken(self, rmse: float, drop: float | None) -> str:
        if self.max_rmse is not None and rmse > self.max_rmse:
            return f"rmse {_above(rmse, self.max_rmse, '.3g')}"
        if self.max_drop is not None and drop is not None and drop > self.max_drop:
            return f"accuracy drop {_above(drop, self.max_drop, '.2f')} points"
        return ""


def _above(value: float, limit: float, form: str) -> str:
    """`value > limit`, with as many digits as it takes to see it."""
    form = next((f for f in (form, ".6g", ".9g") if float(format(value, f)) > limit), ".17g")
    return f"{value:{form}} > {limit:g}"


def btc_search(
    params: PyTree,
    evaluate: Evaluate | None = None,
    *,
    codec: Codec | None = None,
    policy: Policy | None = None,
    block_sizes: Iterable[int] = (32, 64, 128, 256),
    max_rmse: float | None = 3e-3,
    max_drop: float | None = 2.0,
    progress: bool = True,
) -> SearchResult:
    """Tries block sizes from small to large, and stops at the first that breaks a limit.

    Larger blocks have fewer headers, and so fewer bits, but a coarser grid. The limits by default are the paper's.

    Args:
        params: the float tree.
        evaluate: `evaluate(tree) -> accuracy` from 0 to 1; called with `params` first, then with each packed tree.
            Without it only the error is looked at.
        codec, policy: as for `btc_quantize`; the block size of the default codec is searched. Rules keep theirs.
        block_sizes: the sizes to try; they are put in increasing order.
        max_rmse: largest root mean squared error over all quantized weights, in their units; `None` for no limit.
        max_drop: largest loss of accuracy in points (hundredths); `None` for no limit.
        progress: show a bar on a terminal.

    Returns:
        A record with the last configuration that held, its tree, and all trials. An evaluate function that fails ends
        the search, and its error is in the record; the trials made are kept.

    Raises:
        ValueError: a limit is negative or NaN, or there is no block size; and what `btc_quantize` raises.

    Example:
        >>> import jax, btc_jax
        >>> params = {"kernel": 0.1 * jax.random.normal(jax.random.key(0), (64, 64))}
        >>> result = btc_search(params, max_rmse=2e-3)
        >>> result.status.value, result.best.codec.block_size
        ('complete', 256)
    """
    limits = _Limits(max_rmse, max_drop)
    if any(map(is_packed, flatten(params)[1])):
        raise ValueError("the tree is already quantized; search from the float tree, or from btc_dequantize(tree)")
    policy = one_policy(codec, policy)
    policies = _policies(policy, block_sizes)
    baseline, trouble = _accuracy(evaluate, params)
    trials, tree = [], None
    for one in tracked([] if trouble else policies, "searching block sizes", progress):
        trial, packed, trouble = _try(params, one, evaluate, baseline, limits)
        trials.append(trial)
        if trial.broke:
            break
        tree = packed
    best = next((trial for trial in reversed(trials) if trial.held), None)
    status = _status(trials, trouble)
    message = _message(status, best, trials, trouble, evaluate is None and max_drop is not None)
    return SearchResult(status, message, best, tree, tuple(trials), baseline)


def _policies(policy: Policy, block_sizes: Iterable[int]) -> list[Policy]:
    """The policy with each block size once, in increasing order. A bad size is refused by the codec, here."""
    codecs = [dataclasses.replace(policy.codec, block_size=size) for size in block_sizes]  # pyright: ignore
    by_size = {codec.block_size: dataclasses.replace(policy, codec=codec) for codec in codecs}
    if not by_size:
        raise ValueError("block_sizes is empty; give at least one")
    return [by_size[size] for size in sorted(by_size)]


def _try(
    params: PyTree, policy: Policy, evaluate: Evaluate | None, baseline: float | None, limits: _Limits
) -> tuple[Trial, PyTree, str]:
    """One trial, its tree, and what went wrong in evaluating it."""
    start = time.perf_counter()
    tree = btc_quantize(params, policy=policy)
    metrics = btc_metrics(params, tree, policy=policy)
    accuracy, trouble = _accuracy(evaluate, tree)
    # Rounded, or 0.92 - 0.90 were more than 2 points.
    drop = None if accuracy is None or baseline is None else round(100 * (baseline - accuracy), 9)
    broke = trouble or limits.broken(metrics.total.rmse, drop)
    return Trial(policy.codec, metrics, accuracy, drop, time.perf_counter() - start, broke), tree, trouble


def _accuracy(evaluate: Evaluate | None, tree: PyTree) -> tuple[float | None, str]:
    """The accuracy, or what went wrong. A failure must not lose the trials made, so it is data here."""
    if evaluate is None:
        return None, ""
    try:
        answer = jax.block_until_ready(evaluate(tree))
    except Exception as error:
        return None, f"evaluate raised {type(error).__name__}: {error}"
    try:
        accuracy = float(answer)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        return None, f"evaluate returned {answer!r:.80}; it must return an accuracy from 0 to 1"
    return accuracy, ""


def _status(trials: list[Trial], trouble: str) -> SearchStatus:
    if trouble:
        return SearchStatus.EVALUATE_FAILED
    if trials[-1].held:
        return SearchStatus.COMPLETE
    return SearchStatus.STOPPED if len(trials) > 1 else SearchStatus.NOTHING_HELD


def _message(status: SearchStatus, best: Trial | None, trials: list[Trial], trouble: str, unchecked: bool) -> str:
    found = (
        ""
        if best is None
        else f"Block size {best.codec.block_size} holds at {best.metrics.total.effective_bits:.2f} bits"
    )
    last = trials[-1] if trials else None
    if status is SearchStatus.EVALUATE_FAILED:
        kept = f"{found}; the larger sizes are unknown" if found else "No configuration is known to hold"
        message = f"{trouble}. {kept}. Mend evaluate and search again."
    elif status is SearchStatus.COMPLETE:
        message = (
            f"{found}, the largest tried. Try larger block sizes, or fewer bits or a higher threshold in the codec."
        )
    elif status is SearchStatus.STOPPED:
        assert last is not None
        limit = f"block size {last.codec.block_size} breaks the limit ({last.broke})"
        message = f"{found}; {limit}. Use the tree found, or raise the limit."
    else:
        assert last is not None
        message = (
            f"Block size {last.codec.block_size}, the first tried, already breaks the limit ({last.broke}). Try "
            "smaller block sizes, more bits or a lower threshold in the codec, leave sensitive leaves dense by a "
            "rule, or raise the limit."
        )
    return message + (" Accuracy was not looked at: max_drop needs an evaluate function." if unchecked else "")
