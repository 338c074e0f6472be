"""Arguments of the search for the fewest bits, and its choice of budgets."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_search,
)
from btc_jax.formats import MultilevelFormat
from btc_jax.search.budgets import PREDICTED, Budgets
from tests.search_support import PARAMS as PARAMS
from tests.search_support import accurate_from as accurate_from
from tests.search_support import answers as answers
from tests.search_support import budgets as budgets
from tests.search_support import by_bits as by_bits
from tests.search_support import divergence as divergence
from tests.search_support import params as params


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
