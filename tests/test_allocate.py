"""Targets for whole trees: met from below with little unused, allocated as requested, or refused in one clear line."""

import numpy as np
import pytest

from btc_jax import (
    Multilevel,
    btc_allocate,
    btc_metrics,
    btc_plan,
    btc_quantize,
    load,
    save,
)
from btc_jax.sizes import leaf_nbytes
from tests.allocate_support import TREE as TREE
from tests.allocate_support import all_bits as all_bits
from tests.allocate_support import bits_of as bits_of
from tests.allocate_support import same_trees as same_trees
from tests.allocate_support import sqnr_of as sqnr_of
from tests.allocate_support import totals as totals


def all_bytes(packed):
    return sum(leaf_nbytes(leaf) for leaf in packed.values())


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.3, 3.0, 4.5, 6.0, 7.0])
def test_bits_are_met_from_below(bits):
    assert bits * 0.995 <= all_bits(btc_quantize(TREE, bits=bits)) <= bits


@pytest.mark.parametrize(("size", "nbytes"), [("8KB", 8000), ("6.5 KiB", 6656), (5000, 5000), (5000.7, 5000.7)])
def test_size_counts_dense_leaves(size, nbytes):
    packed = btc_quantize(TREE, size=size)
    assert nbytes * 0.995 <= all_bytes(packed) <= nbytes
    assert packed["bias"] is TREE["bias"]
    assert btc_metrics(TREE, packed, Multilevel()).bytes_after == all_bytes(packed)


def test_size_in_a_file(tmp_path):
    packed = btc_quantize(TREE, size="8KB")
    save(tmp_path / "m.safetensors", packed)
    with (tmp_path / "m.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert all_bytes(packed) == (tmp_path / "m.safetensors").stat().st_size - header
    assert same_trees(packed, load(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("sqnr_db", [5.0, 20.0, 38.5])
def test_sqnr_is_met(sqnr_db):
    assert sqnr_db <= totals(TREE, btc_quantize(TREE, sqnr_db=sqnr_db))[0] < sqnr_db + 0.1


@pytest.mark.parametrize("rmse", [0.03, 0.3])
def test_rmse_is_met(rmse):
    assert rmse * 0.99 < totals(TREE, btc_quantize(TREE, rmse=rmse))[1] <= rmse


def test_leaves_that_are_looked_at_in_part_meet_the_target_as_a_whole():
    """A leaf with more weights than the slope search samples, and whose sample misleads."""
    leaf = np.random.default_rng(0).standard_normal((500, 500)).astype(np.float32)
    leaf[:20] *= 30
    for bits in (1.5, 4.5):
        assert bits * 0.995 <= all_bits(btc_quantize({"kernel": leaf}, bits=bits)) <= bits
    packed = btc_quantize({"kernel": leaf}, sqnr_db=30)
    assert 30 <= sqnr_of({"kernel": leaf}, packed, "kernel") < 30.1


def test_without_a_target_it_is_4_and_a_half_bits():
    assert 4.5 * 0.995 <= all_bits(btc_quantize(TREE, Multilevel())) <= 4.5


def test_the_plan_knows_the_bytes():
    plan = btc_plan(TREE, bits=4.0, measure=True)
    packed = btc_quantize(TREE, bits=4.0)
    assert plan.bytes_min == plan.bytes_max == all_bytes(packed)
    bounds = btc_plan(TREE, bits=4.0)
    assert bounds.bytes_min < plan.bytes_min <= bounds.bytes_max


def test_the_same_twice():
    assert same_trees(btc_quantize(TREE, bits=3.3), btc_quantize(TREE, bits=3.3))


def test_an_allocation_is_a_policy_that_packs_alike():
    tree = {path: TREE[path] for path in ("2/kernel", "bias")}
    policy = btc_allocate(tree, bits=4.5)
    assert same_trees(btc_quantize(tree, policy=policy), btc_quantize(tree, bits=4.5))


@pytest.mark.parametrize("exponent", [-60, 3, 40])
def test_powers_of_two_change_no_bit(exponent):
    scaled = {path: np.ldexp(leaf, exponent) for path, leaf in TREE.items()}
    assert same_trees(btc_quantize(scaled, bits=4.5), btc_quantize(TREE, bits=4.5))


def test_what_is_packed_already_passes_through():
    once = btc_quantize(TREE, bits=4.5)
    other = btc_quantize(once | {"new/kernel": TREE["0/kernel"]}, bits=3.0)
    assert all(other[path] is leaf for path, leaf in once.items())
    assert bits_of(other["new/kernel"]) <= 3
    with pytest.raises(ValueError, match="packed already"):
        btc_quantize(once, bits=3.0)
