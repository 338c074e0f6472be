"""The search for the fewest bits."""

import math
import re

import numpy as np
import pytest

from btc_jax import (
    Multilevel,
    Uniform,
    btc_evaluate,
    btc_logits,
    btc_quantize,
    btc_search,
)
from btc_jax.search import SearchStatus
from tests.search_support import PARAMS as PARAMS
from tests.search_support import accurate_from as accurate_from
from tests.search_support import answers as answers
from tests.search_support import assert_same_tree as assert_same_tree
from tests.search_support import budgets as budgets
from tests.search_support import by_bits as by_bits
from tests.search_support import divergence as divergence
from tests.search_support import effective_bits as effective_bits
from tests.search_support import params as params
from tests.search_support import scripted as scripted
from tests.search_support import search as search
from tests.search_support import sizes as sizes


@pytest.mark.parametrize("bits", [2.5, 4.1, 5.7])
def test_bits_are_halved_until_the_limit_is_near(bits):
    result = by_bits(accurate_from(bits))
    assert result.status is SearchStatus.STOPPED
    assert budgets(result)[:3] == [6, 2, 4]
    assert len(set(budgets(result))) == len(budgets(result)) == 9
    held = [trial.bits or 0 for trial in result.trials if trial.ok]
    broken = [trial.bits or 0 for trial in result.trials if trial.violation]
    assert result.best is not None
    assert result.best.bits == min(held)
    assert max(broken) < min(held) <= max(broken) + 0.05
    assert bits <= result.best.metrics.total.effective_bits < bits + 0.1
    assert effective_bits(result.tree) == result.best.metrics.total.effective_bits
    for part in (
        f"{min(held):.6g} bits holds",
        f"{max(broken):.6g} bits breaks",
        "accuracy drop 5.00 > 2",
        "Use the tree",
    ):
        assert part in result.message


def test_every_budget_is_that_of_btc_quantize():
    result = by_bits(accurate_from(3.3), tolerance=1)
    assert result.best is not None
    assert result.best.codec == Multilevel()
    assert_same_tree(result.tree, btc_quantize(PARAMS, bits=result.best.bits))
    for trial in result.trials:
        assert trial.bits is not None
        assert trial.bits * 0.99 < trial.metrics.total.effective_bits <= trial.bits


@pytest.mark.parametrize(("tolerance", "trials"), [(4, 2), (3, 3), (1, 4), (0.5, 5)])
def test_tolerance_decides_how_many_are_tried(tolerance, trials):
    assert len(by_bits(accurate_from(3.3), tolerance=tolerance).trials) == trials


@pytest.mark.parametrize("limit", [3e-3, 1e-3, 0.05])
def test_a_limit_of_divergence(limit):
    result = by_bits(answers(divergence), max_kl=limit)
    assert result.status is SearchStatus.STOPPED
    assert result.accuracy is None
    assert result.best is not None
    assert result.best.kl == pytest.approx(divergence(result.tree))
    assert all((trial.kl or 0) <= limit for trial in result.trials if trial.ok)
    assert all((trial.kl or 0) > limit for trial in result.trials if trial.violation)
    broken = max(trial.bits or 0 for trial in result.trials if trial.violation)
    assert broken < (result.best.bits or 0) <= broken + 0.05
    assert len(result.trials) <= 4  # 9 by bisection
    assert re.search(rf"breaks the limit \(KL 0\.\d+ > {limit:g}\)", result.message)
    assert "not checked" not in result.message


def test_a_limit_of_agreement():
    result = by_bits(answers(agreement=lambda tree: 1 - math.sqrt(divergence(tree))), min_agreement=0.95)
    assert result.best is not None
    assert (result.best.agreement or 0) >= 0.95
    assert len(result.trials) <= 4
    assert re.search(r"agreement 0\.94\d* < 0\.95", result.message)


def test_sensitivities_predict_the_first_budget():
    """The predicted divergence is half of sensitivity times squared error; here it is exact."""
    known = {"kernel": 2.0 / float(np.sum(np.square(PARAMS["kernel"], dtype=np.float64)))}
    result = by_bits(answers(divergence), max_kl=1e-3, sensitivity=known)
    assert len(result.trials) <= 3
    assert next(trial.kl for trial in result.trials) == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(ValueError, match="sensitivity is for bits"):
        search(sensitivity=known)


def test_sensitivities_share_out_every_budget():
    tree = {"a": params()["kernel"], "b": params()["kernel"].copy()}
    known = {"a": 1.0, "b": 64.0}
    result = btc_search(tree, bits=(3, 5), max_rmse=0.01, sensitivity=known, progress=False)
    assert result.best is not None
    assert_same_tree(result.tree, btc_quantize(tree, bits=result.best.bits, sensitivity=known))


def test_a_divergence_is_measured_beside_the_accuracy_and_with_block_sizes():
    both = answers(divergence, accuracy=accurate_from(3))
    result = by_bits(both, tolerance=4)
    assert [trial.ok for trial in result.trials] == [True, False]
    assert [trial.kl for trial in result.trials] == [divergence(btc_quantize(PARAMS, bits=bits)) for bits in (6, 2)]
    result = search(answers(divergence), max_kl=0.5 * (divergence_of(32) + divergence_of(64)))
    assert sizes(result) == [32, 64]
    assert result.trials[1].violation.startswith("KL")


def test_figures_that_evaluate_does_not_return_are_missed_at_once():
    for evaluate in (lambda tree: 0.9, answers(agreement=0.9)):
        with pytest.raises(ValueError, match=r"max_kl is 0\.1, and evaluate returns no kl; return btc_evaluate\("):
            by_bits(evaluate, max_kl=0.1)
    with pytest.raises(ValueError, match=r"min_agreement is 0\.9, and evaluate returns no agreement"):
        by_bits(answers(kl=0.0), min_agreement=0.9)


def test_a_real_model():
    inputs = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)

    def apply(tree, x):
        return x @ tree["kernel"]

    reference = btc_logits(apply, PARAMS, inputs)
    result = by_bits(lambda tree: btc_evaluate(apply, tree, inputs, reference=reference), max_kl=1e-3)
    assert result.status is SearchStatus.STOPPED
    assert len(result.trials) <= 5


def divergence_of(size):
    return divergence(btc_quantize(PARAMS, Uniform(size, threshold=0.0)))


def test_the_fewest_bits_hold():
    result = by_bits(lambda tree: 0.9)
    assert result.status is SearchStatus.COMPLETE
    assert budgets(result) == [6, 2]
    assert result.best is result.trials[1]
    assert "the smallest allowed. Use the tree found, or allow fewer bits." in result.message


def test_the_most_bits_do_not_hold():
    result = by_bits(accurate_from(7))
    assert result.status is SearchStatus.NONE_WITHIN_LIMITS
    assert budgets(result) == [6]
    assert result.best is result.tree is None
    for part in ("A budget of 6 bits, the largest allowed, already breaks", "Allow more bits", "by a rule"):
        assert part in result.message


@pytest.mark.parametrize(("bits", "status"), [(3, SearchStatus.COMPLETE), (7, SearchStatus.NONE_WITHIN_LIMITS)])
def test_one_budget(bits, status):
    result = by_bits(accurate_from(bits), bits=(4, 4))
    assert (result.status, budgets(result)) == (status, [4])


def test_rmse_limits_bits_only_when_told():
    worse = 1e-3
    assert by_bits(lambda tree: 0.9, tolerance=4).status is SearchStatus.COMPLETE
    result = by_bits(max_rmse=worse, bits=(2, 8), tolerance=0.5)
    assert result.status is SearchStatus.STOPPED
    assert result.best is not None
    assert result.best.metrics.total.rmse <= worse
    assert "Accuracy was not checked" in result.message


def test_evaluate_that_fails_while_bits_are_searched_keeps_the_trials():
    result = by_bits(scripted(0.9, 0.9, 0.8, OSError("disk full")))
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert budgets(result) == [6, 2, 4]
    assert [trial.ok for trial in result.trials] == [True, False, False]
    assert result.best is result.trials[0]
    for part in ("OSError: disk full", "budget of 6 bits holds", "that were not tried are unknown", "Fix `evaluate`"):
        assert part in result.message


@pytest.mark.parametrize(("kl", "shown"), [(math.nan, "nan"), (-0.1, "-0.1")])
def test_a_divergence_that_cannot_be(kl, shown):
    found = iter([0.0, kl])
    result = by_bits(answers(kl=lambda tree: next(found)), max_kl=0.1)
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert len(result.trials) == 1
    assert f"kl={shown}" in result.message
    assert "Fix `evaluate`" in result.message


def test_a_divergence_of_nothing_may_be_a_rounding_below_zero_and_one_may_be_infinite():
    assert by_bits(answers(kl=-1e-8), max_kl=0).status is SearchStatus.COMPLETE
    assert by_bits(answers(kl=math.inf), max_kl=1).status is SearchStatus.NONE_WITHIN_LIMITS
    assert by_bits(answers(agreement=1.0), min_agreement=1).status is SearchStatus.COMPLETE
