"""The paper's search (section 3.1), for larger and larger blocks until the error or the accuracy exceeds its limit; and
its counterpart for rate-controlled codecs, for fewer and fewer bits.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Literal

from btc_jax._progress import tracked
from btc_jax._typing import PyTree
from btc_jax.allocate import Sharing, sharing_of
from btc_jax.codecs import Codec
from btc_jax.policy import Policy
from btc_jax.search.budgets import Budgets
from btc_jax.search.record import SearchResult, message_of, status_of
from btc_jax.search.trial import Evaluate, Evaluator, Limits, Outcome, answers_of
from btc_jax.tensor import is_packed
from btc_jax.tree import flatten, one_policy

_SIZES = (32, 64, 128, 256)
_RMSE = 3e-3


def btc_search(
    params: PyTree,
    evaluate: Evaluate | None = None,
    *,
    codec: Codec | None = None,
    policy: Policy | None = None,
    block_sizes: Iterable[int] = _SIZES,
    bits: tuple[float, float] | None = None,
    tolerance: float = 0.05,
    max_rmse: float | Literal["auto"] | None = "auto",
    max_drop: float | None = 2.0,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    sensitivity: PyTree | Literal["shape", "equal"] | None = None,
    taps: bool = True,
    progress: bool = True,
) -> SearchResult:
    """Find the smallest tree that keeps to limits on error, accuracy, and the change of the answers.

    Without `bits`, it tries block sizes from small to large and stops at the first that exceeds a limit, as the paper
    does: larger blocks have fewer headers, and so fewer bits, but a coarser grid. The default limits are the paper's.

    With `bits=(3, 6)`, it finds the smallest budget of effective bits in that range that keeps to the limits, and
    allocates each budget as `btc_quantize(params, bits=...)` does. Each trial predicts where to look next: one more bit
    halves the error and the share of answers that change, and divides the divergence by four. With sensitivities, the
    divergence is predicted before the model is evaluated. A limit on the accuracy alone predicts nothing; the range is
    then bisected. Each budget is tried once.

    Args:
        params: the float tree.
        evaluate: `evaluate(tree)` returns an accuracy from 0 to 1, or an `Evaluation`, from `btc_evaluate`; called with
            `params` first, then with each packed tree. Without it, only the error is checked.
        codec, policy: as for `btc_quantize`; the block size of the default codec is searched, and rules keep theirs.
            With `bits`, the default is `Multilevel()`, and its block size is kept.
        block_sizes: the sizes to try, in increasing order whatever the order given.
        bits: the smallest and the largest budget, in effective bits over the packed leaves.
        tolerance: how near the budget found must be to one that exceeds a limit, in bits.
        max_rmse: largest root mean squared error over all quantized weights, in their units; `None` for no limit.
            `"auto"` is the paper's 3e-3 for block sizes, and no limit for bits.
        max_drop: largest loss of accuracy in points (hundredths); `None` for no limit.
        max_kl: largest divergence of the answers from those of the float tree, in nats, as in `Evaluation.kl`; `None`
            for no limit. It detects much smaller differences than the accuracy does.
        min_agreement: smallest share of answers equal to those of the float tree, 0 to 1; `None` for no limit.
        sensitivity, taps: as for `btc_quantize`, where bits are searched.
        progress: show a bar on a terminal.

    Returns:
        A record of the best configuration within the limits, its tree, and all trials. If `evaluate` fails, the search
        ends, its error is in the record, and the trials made so far are kept.

    Raises:
        ValueError: if a limit is impossible, or on something that `evaluate` does not return; if there is no block
            size; if the range of bits is not a range or unattainable; if nothing limits the bits; or as for
            `btc_quantize`.

    Examples:
        >>> import jax, btc_jax
        >>> params = {"kernel": 0.1 * jax.random.normal(jax.random.key(0), (64, 64))}
        >>> result = btc_search(params, max_rmse=2e-3)
        >>> result.status.value, result.best.codec.block_size
        ('complete', 256)
        >>> result = btc_search(params, bits=(3, 7), max_rmse=2e-3)
        >>> result.status.value, len(result.trials) < 6, 5 < result.best.bits < 7
        ('stopped', True, True)
    """
    if bits is not None and block_sizes != _SIZES:
        raise ValueError("both bits and block_sizes are given; search one of them, with the other in the codec")
    if bits is None and sensitivity is not None:
        raise ValueError("sensitivity is for bits; search bits=(low, high) instead of block_sizes")
    error = (_RMSE if bits is None else None) if max_rmse == "auto" else max_rmse
    limits = Limits(error, max_drop, max_kl, min_agreement)
    if any(map(is_packed, flatten(params)[1])):
        raise ValueError("the tree is already quantized; search from the float tree, or from btc_dequantize(tree)")
    ends = None if bits is None else _ends(bits, tolerance)
    sharing = sharing_of(bits=ends and ends[1], sensitivity=sensitivity, taps=taps)
    policy = one_policy(codec, policy, sharing)
    if not ends and policy.codec and policy.codec.rate_controlled:
        raise ValueError(f"{policy.codec!r} is rate-controlled; search bits=(low, high) instead of block_sizes")
    policies = [] if ends else _policies(policy, block_sizes)
    if ends:
        _refuse_unlimited(limits, evaluate)
    float_answers, failure = answers_of(evaluate, params)
    if not failure:
        limits.refuse_without_answers(float_answers)
    evaluator = Evaluator(params, limits, evaluate, float_answers.accuracy)
    found: Iterable[Outcome] = ()
    if not failure:
        found = (
            _fewer_bits(evaluator, policy, sharing, ends, tolerance, progress)
            if ends
            else _larger_blocks(evaluator, policies, progress)
        )
    unchecked = max_drop is not None and float_answers.accuracy is None and max_kl is None and min_agreement is None
    return _result(found, float_answers.accuracy, failure, ends, unchecked and not failure)


def _result(
    found: Iterable[Outcome],
    baseline: float | None,
    failure: str,
    ends: tuple[float, float] | None,
    unchecked: bool,
) -> SearchResult:
    trials, tree, best = [], None, None
    for outcome in found:
        trials.append(outcome.trial)
        failure = outcome.failure
        if outcome.trial.ok and (best is None or ends is None or (outcome.trial.bits or 0) < (best.bits or 0)):
            best, tree = outcome.trial, outcome.tree
    complete = best is not None and (best.bits == ends[0] if ends else best is trials[-1])
    status = status_of(trials, failure, complete)
    message = message_of(status, best, trials, failure, by_bits=ends is not None)
    if unchecked:
        message += " Accuracy was not checked: max_drop needs an evaluate function that returns one."
    return SearchResult(status, message, best, tree, tuple(trials), baseline)


def _larger_blocks(evaluator: Evaluator, policies: list[Policy], progress: bool) -> Iterator[Outcome]:
    for policy in tracked(policies, "searching block sizes", progress):
        outcome = evaluator.run(policy, Sharing())
        yield outcome
        if outcome.trial.violation:
            return


def _fewer_bits(
    evaluator: Evaluator, policy: Policy, sharing: Sharing, ends: tuple[float, float], tolerance: float, progress: bool
) -> Iterator[Outcome]:
    first = _predicted(evaluator, policy, sharing, ends)
    budgets = Budgets(*ends, tolerance, first, evaluator.limits.predictable)
    for _ in tracked(range(budgets.most), "searching bits", progress):
        if (bits := budgets.next()) is None:
            return
        outcome = evaluator.run(policy, _of_bits(sharing, bits))
        yield outcome
        if outcome.failure:
            return
        budgets.tell(bits, outcome.trial.ok, outcome.needs)


def _predicted(evaluator: Evaluator, policy: Policy, sharing: Sharing, ends: tuple[float, float]) -> float | None:
    """The budget at which measured sensitivities predict the divergence to reach its limit; see `sensitivity`."""
    known, limit = sharing.sensitivity, evaluator.limits.max_kl
    if isinstance(known, str) or not limit:
        return None
    middle = (ends[0] + ends[1]) / 2
    leaves = evaluator.packed(policy, _of_bits(sharing, middle))[1].leaves
    errors = {leaf.path: leaf.measures.rmse**2 * leaf.measures.weights for leaf in leaves if leaf.measures}
    kl = sum(known[path] * error for path, error in errors.items()) / 2
    return min(max(middle + 0.5 * math.log2(kl / limit), ends[0]), ends[1]) if 0 < kl < math.inf else None


def _of_bits(sharing: Sharing, bits: float) -> Sharing:
    return sharing._replace(target=sharing_of(bits=bits).target)


def _ends(bits: tuple[float, float], tolerance: float) -> tuple[float, float]:
    low, high = map(float, bits)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"bits is {bits}; give the least and the largest budget, such as (3, 6)")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be a positive number of bits")
    return low, high


def _refuse_unlimited(limits: Limits, evaluate: Evaluate | None) -> None:
    if limits.max_rmse is not None:
        return
    if evaluate is None or (limits.max_drop is None and limits.max_kl is None and limits.min_agreement is None):
        raise ValueError(
            "nothing limits the bits; give evaluate with max_drop, max_kl or min_agreement, or max_rmse; or for a "
            "budget that is known, btc_quantize(params, bits=...)"
        )


def _policies(policy: Policy, block_sizes: Iterable[int]) -> list[Policy]:
    """The policy with each block size once, in increasing order. The codec refuses a bad size here."""
    codecs = [dataclasses.replace(policy.codec, block_size=size) for size in block_sizes]  # pyright: ignore
    by_size = {codec.block_size: dataclasses.replace(policy, codec=codec) for codec in codecs}
    if not by_size:
        raise ValueError("block_sizes is empty; give at least one")
    return [by_size[size] for size in sorted(by_size)]
