"""The paper's search (section 3.1): larger and larger blocks, until the error or the accuracy breaks its limit. And its
like for codecs that take any number of bits: fewer and fewer, by halving the interval.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Literal

from btc_jax._progress import tracked
from btc_jax._typing import PyTree
from btc_jax.allocate import sharing_of
from btc_jax.codecs import Codec
from btc_jax.policy import Policy
from btc_jax.search.record import SearchResult, message_of, status_of
from btc_jax.search.trial import Divergence, Evaluate, Judge, Limits, Tried, accuracy_of
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
    divergence: Divergence | None = None,
    max_kl: float | None = None,
    progress: bool = True,
) -> SearchResult:
    """Finds the smallest tree that keeps to limits of error and accuracy.

    Without `bits` it tries block sizes from small to large, and stops at the first that breaks a limit, as the paper
    does: larger blocks have fewer headers, and so fewer bits, but a coarser grid. The default limits are the paper's.

    With `bits=(3, 6)` it looks for the smallest budget of effective bits in that range that keeps to the limits, and
    shares out each budget as `btc_quantize(params, bits=...)` does. It tries the largest budget, the smallest, and then
    halves the interval between one that held and one that did not. Each budget is tried once.

    Args:
        params: the float tree.
        evaluate: `evaluate(tree) -> accuracy` from 0 to 1; called with `params` first, then with each packed tree.
            Without it only the error, and the divergence, are looked at.
        codec, policy: as for `btc_quantize`; the block size of the default codec is searched. Rules keep theirs. With
            `bits` the default is `Multilevel()`, and the codec stays as it is.
        block_sizes: the sizes to try; they are put in increasing order.
        bits: the least and the largest budget, effective bits over the packed leaves.
        tolerance: how near the budget found is to one that breaks a limit, in bits.
        max_rmse: largest root mean squared error over all quantized weights, in their units; `None` for no limit.
            `"auto"` is the paper's 3e-3 for block sizes, and no limit for bits.
        max_drop: largest loss of accuracy in points (hundredths); `None` for no limit.
        divergence: `divergence(tree) -> float` of a packed tree's answers from those of the float tree: their mean
            Kullback-Leibler divergence in nats, as in `btc_evaluate(..., reference=...).kl`. It sees much smaller
            differences than the accuracy does.
        max_kl: largest divergence; `None` for no limit.
        progress: show a bar on a terminal.

    Returns:
        A record with the best configuration that held, its tree, and all trials. An evaluate or divergence function
        that fails ends the search, and its error is in the record; the trials made are kept.

    Raises:
        ValueError: a limit is negative or NaN, there is no block size, the range of bits is no range or cannot be
            reached, or nothing limits the bits; and what `btc_quantize` raises.

    Example:
        >>> import jax, btc_jax
        >>> params = {"kernel": 0.1 * jax.random.normal(jax.random.key(0), (64, 64))}
        >>> result = btc_search(params, max_rmse=2e-3)
        >>> result.status.value, result.best.codec.block_size
        ('complete', 256)
        >>> result = btc_search(params, bits=(3, 7), max_rmse=2e-3)
        >>> result.status.value, len(result.trials), 5 < result.best.bits < 7
        ('stopped', 9, True)
    """
    if bits is not None and block_sizes != _SIZES:
        raise ValueError("both bits and block_sizes are given; search one of them, with the other in the codec")
    error = (_RMSE if bits is None else None) if max_rmse == "auto" else max_rmse
    limits = Limits(error, max_drop, max_kl)
    if any(map(is_packed, flatten(params)[1])):
        raise ValueError("the tree is already quantized; search from the float tree, or from btc_dequantize(tree)")
    if max_kl is not None and divergence is None:
        raise ValueError(f"max_kl is {max_kl}, and there is no divergence function to measure it; give divergence")
    ends = None if bits is None else _ends(bits, tolerance)
    policy = one_policy(codec, policy, sharing_of(bits=ends and ends[1]))
    if not ends and policy.codec and policy.codec.adaptive:
        raise ValueError(f"{policy.codec!r} takes the bits it is given, whatever its blocks; search bits=(3, 6), say")
    policies = [] if ends else _policies(policy, block_sizes)
    if ends:
        _refuse_unlimited(limits, evaluate)
    baseline, trouble = accuracy_of(evaluate, params)
    judge = Judge(params, limits, evaluate, divergence, baseline)
    found = _fewer_bits(judge, policy, ends, tolerance, progress) if ends else _larger_blocks(judge, policies, progress)
    return _result([] if trouble else found, baseline, trouble, ends, evaluate is None and max_drop is not None)


def _result(
    found: Iterable[Tried], baseline: float | None, trouble: str, ends: tuple[float, float] | None, unchecked: bool
) -> SearchResult:
    trials, tree, best = [], None, None
    for trial, packed, wrong in found:
        trials.append(trial)
        trouble = wrong
        if trial.held:
            best, tree = trial, packed
    complete = best is not None and (best.bits == ends[0] if ends else best is trials[-1])
    status = status_of(trials, trouble, complete)
    message = message_of(status, best, trials, trouble, by_bits=ends is not None)
    if unchecked:
        message += " Accuracy was not looked at: max_drop needs an evaluate function."
    return SearchResult(status, message, best, tree, tuple(trials), baseline)


def _larger_blocks(judge: Judge, policies: list[Policy], progress: bool) -> Iterator[Tried]:
    for policy in tracked(policies, "searching block sizes", progress):
        tried = judge.try_(policy)
        yield tried
        if tried.trial.broke:
            return


def _fewer_bits(
    judge: Judge, policy: Policy, ends: tuple[float, float], tolerance: float, progress: bool
) -> Iterator[Tried]:
    """The largest budget, the smallest, and the middle of one that broke and one that held until they are near."""
    low, high = ends
    budgets = list(dict.fromkeys((high, low)))
    halvings = max(math.ceil(math.log2((high - low) / tolerance)), 0) if high > low else 0
    for number in tracked(range(len(budgets) + halvings), "searching bits", progress):
        budget = budgets[number] if number < len(budgets) else (low + high) / 2
        tried = judge.try_(policy, budget)
        yield tried
        decided = budget in ends and tried.trial.held == (budget == ends[0])
        if tried.trouble or decided:
            return  # the largest breaks a limit, or the smallest holds
        low, high = (low, budget) if tried.trial.held else (budget, high)


def _ends(bits: tuple[float, float], tolerance: float) -> tuple[float, float]:
    low, high = map(float, bits)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"bits is {bits}; give the least and the largest budget, such as (3, 6)")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be a positive number of bits")
    return low, high


def _refuse_unlimited(limits: Limits, evaluate: Evaluate | None) -> None:
    if (limits.max_drop is None or evaluate is None) and limits.max_rmse is None and limits.max_kl is None:
        raise ValueError(
            "nothing limits the bits; give evaluate with max_drop, divergence with max_kl, or max_rmse; or for a "
            "budget that is known, btc_quantize(params, bits=...)"
        )


def _policies(policy: Policy, block_sizes: Iterable[int]) -> list[Policy]:
    """The policy with each block size once, in increasing order. A bad size is refused by the codec, here."""
    codecs = [dataclasses.replace(policy.codec, block_size=size) for size in block_sizes]  # pyright: ignore
    by_size = {codec.block_size: dataclasses.replace(policy, codec=codec) for codec in codecs}
    if not by_size:
        raise ValueError("block_sizes is empty; give at least one")
    return [by_size[size] for size in sorted(by_size)]
