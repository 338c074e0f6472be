import dataclasses
import re

import numpy as np
import pytest

from btc_jax import (
    Uniform,
    btc_metrics,
    btc_quantize,
    btc_search,
    is_packed,
)
from btc_jax.search import SearchStatus
from tests.search_support import CODEC as CODEC
from tests.search_support import PARAMS as PARAMS
from tests.search_support import assert_same_tree as assert_same_tree
from tests.search_support import params as params
from tests.search_support import scripted as scripted
from tests.search_support import search as search
from tests.search_support import sizes as sizes
from tests.search_support import true_rmse as true_rmse


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
