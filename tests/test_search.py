import contextlib
import dataclasses
import json
import math
import re
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_dequantize,
    btc_evaluate,
    btc_logits,
    btc_metrics,
    btc_quantize,
    btc_search,
    is_packed,
)
from btc_jax.evaluate import Evaluation
from btc_jax.formats import MultilevelFormat, UniformFormat
from btc_jax.policy import BTCPolicyError
from btc_jax.search import SearchStatus
from btc_jax.search.budgets import PREDICTED, Budgets

CODEC = Uniform(threshold=0.0)
"""One width only, so that a shape compiles once for each block size."""


def params(scale=0.1):
    return {"kernel": (scale * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)}


PARAMS = params()


def search(evaluate=None, **arguments):
    return btc_search(PARAMS, evaluate, **{"codec": CODEC, "max_rmse": None, "progress": False} | arguments)


def true_rmse(size):
    """The error at a block size, computed by numpy."""
    decoded = btc_dequantize(btc_quantize(PARAMS, Uniform(size, threshold=0.0)))["kernel"]
    return float(np.sqrt(np.mean((np.asarray(decoded, np.float64) - PARAMS["kernel"]) ** 2)))


def scripted(*answers):
    """An evaluate function that returns these accuracies in turn, and raises those that are errors."""
    answers = iter(answers)

    def evaluate(tree):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return evaluate


def sizes(result):
    return [trial.codec.block_size for trial in result.trials]


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@contextlib.contextmanager
def as_users_run_it():
    """Without the test run's type checks, which would precede the package's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("given", [(32, 64, 128), (128, 32, 64), [64, 64, 128, 32, 32]])
def test_sizes_are_tried_once_each_in_increasing_order(given):
    result = search(block_sizes=given)
    assert sizes(result) == [32, 64, 128]
    assert result.best is result.trials[-1]


def test_sizes_may_come_from_a_generator():
    assert sizes(search(block_sizes=(2**i for i in (6, 5)))) == [32, 64]


def test_complete_search_has_the_paper_sizes_and_the_largest_is_best():
    result = search()
    assert result.status is SearchStatus.COMPLETE
    assert sizes(result) == [32, 64, 128, 256]
    assert all(trial.ok for trial in result.trials)
    assert result.best is result.trials[-1]
    assert "256" in result.message
    assert "arger block sizes" in result.message


def test_tree_is_that_of_btc_quantize_at_the_best_size():
    result = search(block_sizes=(32, 64, 128), max_rmse=(true_rmse(64) + true_rmse(128)) / 2)
    assert result.best is not None
    assert result.best.codec == Uniform(64, threshold=0.0)
    assert_same_tree(result.tree, btc_quantize(PARAMS, Uniform(64, threshold=0.0)))
    found, expected = result.best.metrics, btc_metrics(PARAMS, result.tree, Uniform(64, threshold=0.0))
    assert found.bytes_after == expected.bytes_after
    # The encoder has already summed the errors, in float32 within a block.
    assert dataclasses.asdict(found.total) == pytest.approx(dataclasses.asdict(expected.total), rel=1e-6)


def test_stops_at_the_first_size_that_breaks_the_error():
    result = search(max_rmse=(true_rmse(32) + true_rmse(64)) / 2)
    assert result.status is SearchStatus.STOPPED
    assert sizes(result) == [32, 64]
    assert [trial.ok for trial in result.trials] == [True, False]
    assert result.best is result.trials[0]
    assert result.trials[1].metrics.total.rmse == pytest.approx(true_rmse(64), rel=1e-5)
    for part in ("Block size 32 holds", "block size 64 breaks", "rmse", "raise the limit"):
        assert part in result.message


def test_stops_at_the_first_size_that_breaks_the_accuracy():
    result = search(scripted(0.95, 0.94, 0.929, 0.95, 0.95))
    assert result.status is SearchStatus.STOPPED
    assert result.accuracy == 0.95
    assert [trial.accuracy for trial in result.trials] == [0.94, 0.929]
    assert [trial.drop for trial in result.trials] == pytest.approx([1, 2.1])
    assert result.best is result.trials[0]
    for part in ("Block size 32 holds", "block size 64 breaks", "accuracy drop 2.10 > 2 points"):
        assert part in result.message


def test_nothing_held_says_what_to_try():
    result = search(max_rmse=0)
    assert result.status is SearchStatus.NONE_WITHIN_LIMITS
    assert result.best is result.tree is None
    assert sizes(result) == [32]
    for part in ("Block size 32", "rmse", "smaller block sizes", "lower threshold", "rule", "raise the limit"):
        assert part in result.message


@pytest.mark.parametrize(
    ("before", "after", "limit", "held"),
    [(0.92, 0.90, 2.0, True), (0.57, 0.55, 2.0, True), (0.9, 0.899, 0.1, True), (0.92, 0.899, 2.0, False)],
)
def test_a_drop_of_just_the_limit_holds(before, after, limit, held):
    assert search(scripted(before, after), block_sizes=(32,), max_drop=limit).trials[0].ok == held


def test_an_error_of_just_the_limit_holds():
    rmse = search(block_sizes=(32,)).trials[0].metrics.total.rmse
    assert search(block_sizes=(32,), max_rmse=rmse).trials[0].ok
    assert not search(block_sizes=(32,), max_rmse=np.nextafter(rmse, 0)).trials[0].ok


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_message_shows_an_error_above_the_limit(size):
    rmse = true_rmse(size)
    shorter = float(f"{rmse:.3g}")
    result = search(block_sizes=(size,), max_rmse=(rmse + shorter) / 2 if shorter < rmse else 0.999 * rmse)
    (shown,) = re.findall(r"rmse (\S+) > (\S+)\)", result.message)
    assert float(shown[0]) > float(shown[1])


@pytest.mark.parametrize("after", [0.87996, 0.879, 0.8])
def test_the_message_shows_a_drop_above_the_limit(after):
    result = search(scripted(0.9, after), block_sizes=(32,))
    (shown,) = re.findall(r"accuracy drop (\S+) > (\S+) points\)", result.message)
    assert float(shown[0]) > float(shown[1])


def test_accuracy_may_rise():
    result = search(scripted(0.5, 0.6), block_sizes=(32,), max_drop=0)
    assert result.trials[0].drop == pytest.approx(-10)
    assert result.status is SearchStatus.COMPLETE


def test_no_limits_never_stop():
    result = search(scripted(1.0, 0.5, 0.0, 0.3, 0.1), max_drop=None)
    assert result.status is SearchStatus.COMPLETE
    assert [trial.drop for trial in result.trials] == pytest.approx([50, 100, 70, 90])


def test_limits_of_the_paper_by_default():
    large = btc_search(params(1.0), codec=CODEC, block_sizes=(32,), progress=False)
    assert large.trials[0].metrics.total.rmse > 3e-3
    assert large.status is SearchStatus.NONE_WITHIN_LIMITS
    dropped = btc_search(PARAMS, scripted(0.9, 0.879), codec=CODEC, block_sizes=(32,), progress=False)
    assert dropped.status is SearchStatus.NONE_WITHIN_LIMITS


def test_evaluate_sees_the_float_tree_and_then_each_packed_one():
    seen = []

    def evaluate(tree):
        seen.append(tree)
        return 0.9

    result = search(evaluate, block_sizes=(32, 64))
    assert seen[0] is PARAMS
    assert [is_packed(tree["kernel"]) and tree["kernel"].format.block_size for tree in seen[1:]] == [32, 64]
    assert seen[2] is result.tree


@pytest.mark.parametrize("limit", [2.0, None])
def test_a_drop_that_cannot_be_seen_is_said(limit):
    result = search(block_sizes=(32,), max_drop=limit)
    assert ("Accuracy was not checked" in result.message) == (limit is not None)
    assert result.accuracy is result.trials[0].accuracy is result.trials[0].drop is None


def test_evaluate_that_raises_midway_keeps_the_trials():
    result = search(scripted(0.9, 0.9, 0.9, OSError("disk full")))
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert sizes(result) == [32, 64, 128]
    assert [trial.ok for trial in result.trials] == [True, True, False]
    assert result.trials[2].accuracy is result.trials[2].drop is None
    assert result.trials[2].metrics.total.rmse == pytest.approx(true_rmse(128), rel=1e-5)
    assert result.best is result.trials[1]
    assert_same_tree(result.tree, btc_quantize(PARAMS, Uniform(64, threshold=0.0)))
    for part in ("OSError: disk full", "Block size 64 holds", "larger sizes are unknown", "rerun"):
        assert part in result.message


def test_evaluate_that_raises_on_the_float_tree_ends_the_search():
    result = search(scripted(RuntimeError("no data")))
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert result.trials == ()
    assert result.best is result.tree is result.accuracy is None
    for part in ("RuntimeError: no data", "No configuration", "Fix `evaluate`"):
        assert part in result.message


def test_evaluate_that_raises_on_the_first_packed_tree_leaves_nothing_known():
    result = search(scripted(0.9, ValueError("bad shape")))
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert sizes(result) == [32]
    assert result.best is result.tree is None
    assert result.accuracy == 0.9
    assert "No configuration" in result.message


@pytest.mark.parametrize(("answer", "shown"), [(math.nan, "nan"), (91.6, "91.6"), (-0.1, "-0.1"), (math.inf, "inf")])
@pytest.mark.parametrize("before", [(), (0.9,)])
def test_evaluate_that_returns_no_accuracy(answer, shown, before):
    result = search(scripted(*before, answer))
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert sizes(result) == [32] * len(before)
    assert f"evaluate returned {shown}" in result.message
    assert "from 0 to 1" in result.message


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (None, "None"),
        (Evaluation(1, None, None, 1, None), "Evaluation"),
        (Evaluation(1, math.nan, math.nan, 1, math.nan, math.nan, math.nan), "Evaluation"),
        ((0.9, 0.1), "(0.9, 0.1)"),
        (np.array([0.9, 0.8]), "[0.9"),
    ],
)
def test_evaluate_that_returns_no_number(answer, shown):
    with as_users_run_it():
        result = search(lambda tree: answer)
    assert result.status is SearchStatus.EVALUATE_FAILED
    assert "evaluate returned" in result.message
    assert shown in result.message
    assert "raised" not in result.message


def test_interrupt_is_not_swallowed():
    def interrupted(tree):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(interrupted)


@pytest.mark.parametrize("accuracy", [np.float32(0.5), np.array(0.5), 1, 0])
def test_accuracy_may_be_any_scalar(accuracy):
    result = search(lambda tree: accuracy, block_sizes=(32,))
    assert result.status is SearchStatus.COMPLETE
    assert result.accuracy == result.trials[0].accuracy == float(accuracy)


@pytest.mark.parametrize("name", ["max_rmse", "max_drop"])
@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan])
def test_bad_limits(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}.*0 or more, or None"):
        search(**{name: value})


def test_no_sizes():
    with pytest.raises(ValueError, match="block_sizes is empty"):
        search(block_sizes=())


@pytest.mark.parametrize(("given", "shown"), [((1, 32), "1"), ((0,), "0"), ((-64,), "-64")])
def test_sizes_that_no_codec_takes_are_refused_before_evaluating(given, shown):
    def evaluate(tree):
        raise AssertionError("evaluated in vain")

    with pytest.raises(ValueError, match=f"block_size is {shown};"):
        search(evaluate, block_sizes=given)


def test_a_size_that_is_no_integer_is_named():
    with as_users_run_it(), pytest.raises(TypeError, match=r"block_size.* 32\.5"):
        search(block_sizes=(64, 32.5))


def test_what_btc_quantize_refuses_is_refused():
    with pytest.raises(BTCPolicyError, match="matches no leaf"):
        search(codec=None, policy=Policy(rules=(Rule("head", None),)))
    broken = PARAMS["kernel"].copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="kernel: 1 of 4096 weights are NaN"):
        btc_search({"kernel": broken}, codec=CODEC, progress=False)
    with pytest.raises(BTCPolicyError, match="both codec and policy"):
        search(policy=Policy())


def test_rules_keep_their_codec_and_the_rest_of_the_default_is_kept():
    tree = PARAMS | {"head": params()["kernel"], "first": params()["kernel"]}
    rules = (Rule("head", Uniform(16, threshold=math.inf)), Rule("first", None))
    result = btc_search(tree, policy=Policy(CODEC, rules, min_size=100), block_sizes=(32, 64), max_rmse=None)
    assert [trial.codec for trial in result.trials] == [Uniform(32, threshold=0.0), Uniform(64, threshold=0.0)]
    assert result.tree is not None
    assert result.tree["head"].format == UniformFormat(16, (4,))
    assert result.tree["kernel"].format == UniformFormat(64, (8,))
    assert result.tree["first"] is tree["first"]


def test_json_holds_the_record():
    result = search(scripted(0.9, 0.9, 0.8), codec=Uniform(threshold=math.inf))
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (record["status"], record["message"], record["accuracy"]) == ("stopped", result.message, 0.9)
    assert record["best"] == 0
    first, second = record["trials"]
    assert (first["codec"]["block_size"], first["codec"]["threshold"], first["violation"]) == (32, "inf", "")
    assert second["drop"] == pytest.approx(10)
    assert second["violation"].startswith("accuracy drop")
    assert second["metrics"]["total"]["rmse"] == result.trials[1].metrics.total.rmse
    assert second["seconds"] > 0


def test_json_of_a_search_that_found_nothing():
    record = json.loads(json.dumps(search(scripted(ValueError("x"))).to_json(), allow_nan=False))
    assert (record["status"], record["best"], record["trials"]) == ("evaluate failed", None, [])


def test_progress_is_silent_where_there_is_no_terminal(capfd):
    search(block_sizes=(32,), progress=True)
    assert capfd.readouterr() == ("", "")


# The search for bits


def by_bits(evaluate=None, **arguments):
    return btc_search(PARAMS, evaluate, **{"bits": (2, 6), "progress": False} | arguments)


def effective_bits(tree):
    return 8 * tree["kernel"].nbytes / PARAMS["kernel"].size


def accurate_from(bits):
    """An evaluate function that loses 5 points below this many effective bits."""
    return lambda tree: 0.9 if not is_packed(tree["kernel"]) or effective_bits(tree) >= bits else 0.85


def divergence(tree):
    """A divergence that falls as errors do."""
    error = np.asarray(tree["kernel"], np.float64) - PARAMS["kernel"]
    return float(np.mean(error**2) / np.mean(PARAMS["kernel"].astype(np.float64) ** 2))


def answers(kl: Any = None, accuracy: Any = None, agreement: Any = None) -> Any:
    """An evaluate function with these figures, each a number or a function of the tree."""

    def figure(value: Any, tree: Any) -> Any:
        return value(tree) if callable(value) else value

    return lambda tree: Evaluation(1, figure(accuracy, tree), None, 1, None, figure(agreement, tree), figure(kl, tree))


def budgets(result):
    return [trial.bits for trial in result.trials]


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


def test_codecs_and_policies_work_with_bits():
    result = by_bits(accurate_from(5.9), codec=Uniform(32, threshold="auto"), bits=(5.5, 7), tolerance=0.5)
    assert result.best is not None
    assert result.best.codec == Uniform(32, threshold="auto")
    tree = PARAMS | {"head": params()["kernel"]}
    policy = Policy(Multilevel(64), rules=(Rule("head", None),))
    result = btc_search(tree, lambda tree: 0.9, policy=policy, bits=(3, 4), progress=False)
    assert result.tree is not None
    assert result.tree["head"] is tree["head"]
    assert result.tree["kernel"].format == MultilevelFormat(64)


@pytest.mark.parametrize("bits", [(6, 2), (0, 3), (-1, 2), (math.nan, 3), (3, math.nan), (2, math.inf)])
def test_bad_ranges(bits):
    with pytest.raises(ValueError, match=r"bits is .*the least and the largest budget, such as \(3, 6\)"):
        by_bits(bits=bits)


@pytest.mark.parametrize("tolerance", [0, -1, math.nan, math.inf])
def test_bad_tolerances(tolerance):
    with pytest.raises(ValueError, match=r"tolerance is .*positive number of bits"):
        by_bits(tolerance=float(tolerance))


def test_searches_that_cannot_be():
    with pytest.raises(ValueError, match="nothing limits the bits; give evaluate with max_drop"):
        by_bits()
    with pytest.raises(ValueError, match="nothing limits the bits"):
        by_bits(answers(divergence), max_drop=None)
    with pytest.raises(ValueError, match=r"max_kl is -1\.0"):
        by_bits(answers(divergence), max_kl=-1.0)
    with pytest.raises(ValueError, match=r"min_agreement is 91\.0; it must be from 0 to 1"):
        by_bits(answers(divergence), min_agreement=91.0)
    with pytest.raises(ValueError, match="both bits and block_sizes"):
        by_bits(lambda tree: 0.9, block_sizes=(32,))
    with pytest.raises(ValueError, match="no leaf has a codec that adapts"):
        by_bits(lambda tree: 0.9, codec=Uniform())
    with pytest.raises(ValueError, match="bits of 20 cannot be reached"):
        by_bits(lambda tree: 0.9, bits=(3, 20))


def test_json_of_a_search_for_bits():
    result = by_bits(answers(divergence, accuracy=accurate_from(3)), tolerance=2)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [trial["bits"] for trial in record["trials"]] == [6, 2, 4]
    assert record["trials"][2]["kl"] == result.trials[2].kl
    assert record["best"] == 2
    assert record["trials"][0]["codec"] == {"id": "multilevel", "block_size": 32, "width": None}


# Which budget is next


def budgets_tried(limit, low=2.0, high=8.0, tolerance=0.05, needs=None, first=None):
    """The budgets tried for a limit that holds from this many bits on, and the smallest that held."""
    budgets, tried = Budgets(low, high, tolerance, first, needs is not None), []
    while (bits := budgets.next()) is not None:
        assert low <= bits <= high
        tried.append(bits)
        budgets.tell(bits, bits >= limit, needs and needs(bits))
    return tried, budgets


@settings(deadline=None, max_examples=300)
@given(
    st.floats(0, 10),
    st.floats(0.001, 5),
    st.sampled_from([None, "exact", "steep", "flat", "stepped", "wrong", "noise"]),
    st.none() | st.floats(2, 8),
    st.integers(0, 2**31),
)
def test_whatever_is_predicted_the_budget_found_is_next_to_one_that_broke(limit, tolerance, kind, first, seed):
    rng = np.random.default_rng(seed)
    predictions = {
        "exact": lambda bits: limit - bits,
        "steep": lambda bits: 9 * (limit - bits),
        "flat": lambda bits: 0.05 * (limit - bits),
        "stepped": lambda bits: float(np.ceil(limit - bits)),
        "wrong": lambda bits: bits - limit,
        "noise": lambda bits: float(rng.normal()),
    }
    tried, budgets = budgets_tried(limit, tolerance=tolerance, needs=predictions.get(kind), first=first)
    assert len(set(tried)) == len(tried)
    if budgets.lowest_ok is None:
        assert (budgets.highest_violating, limit > 8) == (8, True)
    else:
        assert budgets.lowest_ok >= limit
        violating = budgets.highest_violating
        assert budgets.lowest_ok == 2 or (violating is not None and budgets.lowest_ok - violating <= tolerance + 1e-12)
    halving = 2 + math.ceil(math.log2(max(6 / tolerance, 1)))
    assert len(tried) <= min(halving + PREDICTED, budgets.most)


@pytest.mark.parametrize("limit", [2.01, 2.5, 3.3, 4.37, 5.0, 6.9, 7.99])
def test_good_predictions_need_few_trials(limit):
    assert len(budgets_tried(limit, needs=lambda bits: limit - bits)[0]) <= 4
    assert len(budgets_tried(limit, needs=lambda bits: 0.9 * (limit - bits) + 0.02 * (bits - 4) ** 2)[0]) <= 7
    assert len(budgets_tried(limit)[0]) == 9
