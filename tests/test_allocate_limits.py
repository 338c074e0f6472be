"""Targets that are met anyway, unattainable or invalid, and weights that cannot be packed."""

import math

import numpy as np
import pytest

from btc_jax import (
    Multilevel,
    Rule,
    Uniform,
    btc_quantize,
)
from btc_jax.allocate import nbytes_of, sharing_of
from btc_jax.policy import BTCPolicyError
from tests.allocate_support import TREE as TREE
from tests.allocate_support import all_bits as all_bits
from tests.allocate_support import totals as totals
from tests.test_multilevel import unchecked


def test_bounds_that_are_met_anyway():
    assert all_bits(btc_quantize(TREE, size="1MB")) > 7
    assert all_bits(btc_quantize(TREE, rmse=100)) < 1
    assert all_bits(btc_quantize(TREE, sqnr_db=1e-3)) < 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"bits": 12}, r"bits of 12 cannot be reached: these leaves and codecs reach from 0\.2\d* to 8\.\d+"),
        ({"bits": 0.1}, r"bits of 0\.1 cannot be reached: .* from 0\.2\d* to 8\.\d+"),
        ({"size": 400}, r"size of 400 cannot be reached: .* from \d{3} to"),
        ({"rmse": 1e-9}, r"rmse of 1e-09 cannot be reached: .* from 0\.0\d* to \d\.\d+"),
        ({"sqnr_db": 99}, r"sqnr_db of 99 cannot be reached: .* to 4\d\.\d+"),
    ],
)
def test_the_unreachable_is_refused_with_what_can_be(target, message):
    with pytest.raises(ValueError, match=message):
        btc_quantize(TREE, **target)


def test_just_above_the_best_is_refused_too():
    with pytest.raises(ValueError, match="cannot be reached") as refused:
        btc_quantize(TREE, sqnr_db=99)
    best = float(str(refused.value).rsplit(" ", 1)[1])
    with pytest.raises(ValueError, match="cannot be reached"):
        btc_quantize(TREE, sqnr_db=best + 0.1)
    assert totals(TREE, btc_quantize(TREE, sqnr_db=best - 0.1))[0] >= best - 0.1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"bits": 4.5, "size": "1MB"}, r"bits=4.5 and size='1MB' are given; one target decides the others: give one"),
        ({"rmse": 0.1, "sqnr_db": 20}, r"rmse=0.1 and sqnr_db=20 are given"),
        *(({kind: math.nan}, f"{kind} is nan; it must be") for kind in ("bits", "size", "rmse", "sqnr_db")),
        *(({kind: -1}, f"{kind} is -1; it must be") for kind in ("bits", "size", "rmse", "sqnr_db")),
        *(({kind: 0}, f"{kind} is 0; it must be") for kind in ("bits", "size", "rmse", "sqnr_db")),
        *(({kind: math.inf}, f"{kind} is inf; it must be") for kind in ("bits", "size", "rmse", "sqnr_db")),
        *(({kind: "much"}, f"{kind} is 'much'; it must be") for kind in ("bits", "size", "rmse", "sqnr_db")),
        *(({kind: "4"}, f"{kind} is '4'; it must be a number") for kind in ("bits", "rmse", "sqnr_db")),
        *(({kind: [4]}, rf"{kind} is \[4\]; it must be a number") for kind in ("bits", "size", "rmse", "sqnr_db")),
        *(({kind: True}, f"{kind} is True; it must be a number") for kind in ("bits", "size", "rmse", "sqnr_db")),
        ({"size": "0.5B"}, "size is '0.5B'; it must be 1 byte or more, such as '500MB'"),
        ({"size": "-5MB"}, "size is '-5MB'"),
        ({"size": "5MW"}, "size is '5MW'"),
        ({"size": "MB"}, "size is 'MB'"),
        ({"size": ""}, "size is ''"),
        ({"size": "1e9MB"}, "size is '1e9MB'"),
        ({"size": "5 MB extra"}, "size is '5 MB extra'"),
    ],
)
def test_targets_that_are_none(target, message):
    with pytest.raises(ValueError, match=message):
        unchecked(sharing_of)(**target)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("25MB", 25e6), ("2 GiB", 2**31), ("100", 100), ("7B", 7), ("1.5kb", 1500), (12, 12), ("3TB", 3e12)],
)
def test_sizes(size, nbytes):
    assert nbytes_of(size) == nbytes


def test_numpy_numbers_are_targets():
    for bits in (np.float32(4.5), np.float64(4.5)):
        assert unchecked(sharing_of)(bits=bits).target[:2] == ("bits", 4.5)
    assert unchecked(sharing_of)(size=np.int64(100)).target[:2] == ("size", 100)


@pytest.mark.parametrize("codec", [Uniform(), Multilevel(width=4), Multilevel(slope=0.01)])
def test_fixed_codecs_have_no_target(codec):
    with pytest.raises(ValueError, match=r"bits=5 is asked for, but no leaf has a codec that adapts.*Multilevel\(\)"):
        btc_quantize(TREE, codec, bits=5)


@pytest.mark.parametrize("spike", [np.nan, np.inf])
def test_not_finite_weights_are_named_and_counted(spike):
    tree = TREE | {"1/kernel": TREE["1/kernel"].copy()}
    tree["1/kernel"][[3, 5], 4] = spike
    with pytest.raises(ValueError, match=r"^1/kernel: 2 of 4096 weights are NaN or infinite"):
        btc_quantize(tree, bits=4.5)


def test_weights_too_large_are_named():
    tree = TREE | {"1/kernel": TREE["1/kernel"] * np.float32(1e38)}
    with pytest.raises(ValueError, match=r"^1/kernel: weights as large as .*e\+3\d leave no room"):
        btc_quantize(tree, sqnr_db=20)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_bad_weight(weight):
    with pytest.raises(BTCPolicyError, match=f"weight is {weight}; it must be a positive number"):
        Rule("*", Multilevel(), weight=weight)
