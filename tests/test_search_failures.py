"""Searches in which evaluate fails, and arguments that are invalid."""

import contextlib
import json
import math

import jaxtyping
import numpy as np
import pytest

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_quantize,
    btc_search,
)
from btc_jax.evaluate import Evaluation
from btc_jax.formats import UniformFormat
from btc_jax.policy import BTCPolicyError
from btc_jax.search import SearchStatus
from tests.search_support import CODEC as CODEC
from tests.search_support import PARAMS as PARAMS
from tests.search_support import assert_same_tree as assert_same_tree
from tests.search_support import params as params
from tests.search_support import scripted as scripted
from tests.search_support import search as search
from tests.search_support import sizes as sizes
from tests.search_support import true_rmse as true_rmse


@contextlib.contextmanager
def as_users_run_it():
    """Without the test run's type checks, which would precede the package's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


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
