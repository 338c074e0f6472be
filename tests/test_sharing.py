"""Where bits go: by the shapes and scales of leaves, or by sensitivities; and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_allocate,
    btc_metrics,
    btc_plan,
    btc_quantize,
    load,
    quantize_file,
    save,
)
from btc_jax.allocate import sharing_of
from btc_jax.policy.stacks import stacks
from tests.allocate_support import all_bits, bits_of, tree_of
from tests.test_multilevel import unchecked

RNG = np.random.default_rng(0)


def gaussian(*shape, scale=1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


TREE = {"large/kernel": gaussian(256, 256), "small/kernel": gaussian(64, 64)}


def bits(tree, **sharing):
    packed = btc_quantize(tree, bits=4.5, **sharing)
    assert all_bits(packed) <= 4.5
    return {path: bits_of(leaf) for path, leaf in packed.items()}


# By shape


def test_a_weight_of_a_small_matrix_gets_more_bits():
    found = bits(TREE)
    # 16 times the weights: 16 ** 0.75 times the squared error, or 1.5 bits.
    assert found["small/kernel"] - found["large/kernel"] == pytest.approx(1.5, abs=0.25)
    equal = bits(TREE, sensitivity="equal")
    assert equal["small/kernel"] == pytest.approx(equal["large/kernel"], abs=0.05)


def test_a_loud_leaf_gets_more_bits_but_not_as_many_as_for_the_least_error():
    tree = {"loud/kernel": gaussian(128, 128, scale=2), "quiet/kernel": gaussian(128, 128)}
    found, equal = bits(tree), bits(tree, sensitivity="equal")
    # An octave of scale is a bit for the least error, and half an octave of error less where answers count.
    assert equal["loud/kernel"] - equal["quiet/kernel"] == pytest.approx(1, abs=0.1)
    assert found["loud/kernel"] - found["quiet/kernel"] == pytest.approx(0.75, abs=0.1)


def test_targets_of_the_error_mean_the_plain_error():
    def nbytes(packed):
        return sum(leaf.nbytes for leaf in packed.values())

    equal = btc_quantize(TREE, bits=4.5, sensitivity="equal")
    sqnr_db = btc_metrics(TREE, equal).total.sqnr_db
    assert nbytes(btc_quantize(TREE, sqnr_db=sqnr_db)) == pytest.approx(nbytes(equal), rel=0.004)
    for goal in ({"bits": 4.5}, {"size": nbytes(equal)}):
        assert btc_metrics(TREE, unchecked(btc_quantize)(TREE, **goal)).total.sqnr_db < sqnr_db


def test_stacked_layers_and_experts_count_one_by_one():
    stacked = {"layers/kernel": gaussian(16, 64, 64), "layers/norm/scale": np.ones((16, 64), np.float32)}
    experts = {"experts/kernel": gaussian(16, 64, 64)}
    for tree in (stacked, experts):
        tree = tree | {"head/kernel": gaussian(64, 64)}
        packed = btc_quantize(tree, bits=4.5)
        found = {path: bits_of(packed[path]) for path in tree if path.endswith("kernel")}
        assert found.popitem()[1] == pytest.approx(found.popitem()[1], abs=0.1)


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ({"h/ln/scale": (12, 64), "h/fc/kernel": (12, 64, 9), "h/fc/bias": (12, 9), "wte": (100, 64)}, [12, 12, 12, 1]),
        ({"params/h/norm/bias": (2, 8), "params/h/w/kernel": (2, 8, 8), "params/out/kernel": (8, 2)}, [2, 2, 1]),
        ({"moe/experts/wi": (8, 64, 256), "moe/experts/wo": (8, 256, 64), "moe/router/kernel": (64, 8)}, [8, 8, 1]),
        ({"layers/experts/wi": (3, 8, 64, 256), "layers/norm/scale": (3, 64)}, [24, 3]),
        ({"experts.0.w1.weight": (64, 64)}, [1]),
        ({"attention/out/kernel": (8, 16, 128), "attention/out/bias": (128,)}, [1, 1]),
        ({"attention/query/kernel": (128, 8, 16), "attention/query/bias": (8, 16)}, [1, 1]),
        ({"conv/kernel": (3, 3, 8, 8), "conv/bias": (8,)}, [1, 1]),
        ({"scale": (), "kernel": (4, 4)}, [1, 1]),
        ({}, []),
    ],
)  # fmt: skip
def test_stacks(leaves, expected):
    assert stacks(list(leaves), list(leaves.values())) == expected


# By sensitivities


def test_bits_follow_the_sensitivities():
    tree = tree_of((1.0, 1.0, 1.0))
    known = {"0/kernel": 1.0, "1/kernel": 1.0, "2/kernel": 1.0, "bias": 1.0}
    found = [bits_of(btc_quantize(tree, bits=4.5, sensitivity=known | {"1/kernel": f})["1/kernel"]) for f in (1, 4, 16)]
    assert found == sorted(found)
    assert found[2] > found[0] + 0.5


def test_only_ratios_of_sensitivities_count():
    known = {path: 3.0 + i for i, path in enumerate(TREE)}
    one = btc_quantize(TREE, bits=4.5, sensitivity=known)
    other = btc_quantize(TREE, bits=4.5, sensitivity={path: 1e-9 * f for path, f in known.items()})
    assert all(np.array_equal(one[path].widths, other[path].widths) for path in TREE)


@pytest.mark.parametrize("zero", [0.0, 1e-300])
def test_leaves_of_no_sensitivity_are_packed_all_the_same(zero):
    found = bits(TREE, sensitivity={"large/kernel": 1.0, "small/kernel": zero})
    assert 0 < found["small/kernel"] < found["large/kernel"]
    assert bits(TREE, sensitivity={"large/kernel": 0.0, "small/kernel": 0.0})


def test_a_rule_counts_on_top_of_a_sensitivity():
    known = dict.fromkeys(TREE, 1.0)
    usual = bits(TREE, sensitivity=known)
    policy = Policy(rules=(Rule("small/*", weight=4.0),))
    packed = btc_quantize(TREE, policy=policy, bits=4.5, sensitivity=known)
    assert bits_of(packed["small/kernel"]) == pytest.approx(usual["small/kernel"] + 1, abs=0.15)


def test_every_function_takes_them(tmp_path):
    known = {"large": {"kernel": np.float32(1)}, "small": {"kernel": np.float32(100)}}
    tree = {"large": {"kernel": TREE["large/kernel"]}, "small": {"kernel": TREE["small/kernel"]}}
    packed = btc_quantize(tree, bits=4.5, sensitivity=known)
    nbytes = [leaf["kernel"].nbytes for leaf in packed.values()]
    assert nbytes != [leaf["kernel"].nbytes for leaf in btc_quantize(tree, bits=4.5).values()]
    plan = btc_plan(tree, bits=4.5, sensitivity=known, measure=True)
    again = btc_quantize(tree, policy=btc_allocate(tree, bits=4.5, sensitivity=known))
    save_file(TREE, tmp_path / "m.safetensors")
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=4.5, sensitivity=known)
    for found in (again, load(tmp_path / "q.safetensors")):
        assert [leaf["kernel"].nbytes for leaf in found.values()] == nbytes
    assert [row.bytes_max for row in plan.rows] == nbytes


def test_taps_can_be_left_out():
    ramp = np.linspace(-1, 1, 9).reshape(3, 3, 1, 1) * gaussian(1, 1, 16, 32)
    tree = {"kernel": ramp.astype(np.float32)}
    orders = [btc_quantize(tree, bits=4.5, taps=taps)["kernel"].order for taps in (True, False)]
    assert orders == ["output-major-taps", "output-major"]


# Refusals


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"large/kernel": 1.0}, "sensitivity is of another tree: it has no number for small/kernel; it has 'large/ke"),
        ({}, "no number for large/kernel; it is empty"),
        ({"large/kernel": math.nan, "small/kernel": 1.0}, "sensitivity of large/kernel is nan; it must be a number of"),
        ({"large/kernel": -1.0, "small/kernel": 1.0}, "sensitivity of large/kernel is -1.0"),
        ({"large/kernel": "much", "small/kernel": 1.0}, "sensitivity of large/kernel is 'much'"),
        (TREE, r"sensitivity of large/kernel is an array of shape \(256, 256\)"),
        (3.0, "sensitivity is 3.0; it can be a tree of numbers"),
        ("fisher", "sensitivity is 'fisher'; it can be a tree of numbers, 'shape' or 'equal'"),
    ],
)
def test_sensitivities_that_cannot_be(known, message):
    with pytest.raises(ValueError, match=message):
        unchecked(btc_quantize)(TREE, bits=4.5, sensitivity=known)


@pytest.mark.parametrize("kind", ["rmse", "sqnr_db"])
def test_sensitivities_are_not_for_targets_of_the_error(kind):
    with pytest.raises(ValueError, match=f"sensitivity='a tree' and {kind}=1.0 are given.*give bits or size"):
        unchecked(sharing_of)(**{kind: 1.0, "sensitivity": {"a": 1.0}})
    for word in (None, "equal"):
        assert unchecked(sharing_of)(**{kind: 1.0, "sensitivity": word}).sensitivity == "equal"


def test_unknown_keywords_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'; the keywords of targets are bits, size"):
        unchecked(sharing_of)(bit=4)


# Small leaves


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 24), min_size=2, max_size=4),
    st.sampled_from([np.float32, jnp.bfloat16, np.float16]),
    st.sampled_from([{}, {"bits": 4.5}]),
    st.sampled_from(["Dense_0", "a_module_with_a_long_name"]),
)
def test_what_is_packed_by_default_becomes_smaller_in_its_file(tmp_path_factory, shape, dtype, goal, name):
    folder = tmp_path_factory.mktemp("small")
    leaf = gaussian(*shape, scale=0.1).astype(dtype)
    large = gaussian(64, 64, scale=0.1).astype(dtype)  # a file stores what leaves of a kind have in common once
    tree = {name: {"kernel": leaf}, "large": {"kernel": large}}
    packed = btc_quantize(tree, **goal)
    dense = packed | {name: {"kernel": leaf}}
    for file, saved in (("packed", packed), ("dense", dense)):
        save(folder / file, saved)
    assert (folder / "packed").stat().st_size <= (folder / "dense").stat().st_size


@pytest.mark.parametrize("codec", [Uniform(), Multilevel(), Uniform(256), Multilevel(width=4)])
def test_where_leaves_become_small_enough(codec):
    """Far below 4,096 weights, unless blocks are larger than the leaf."""
    leaves = {f"{n}/kernel": jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (2, 4, 8, 16, 32)}
    reasons = {row.path: row.reason for row in btc_plan(leaves, codec).rows}
    assert reasons["2/kernel"] == "would not become smaller"
    assert reasons["32/kernel"] == reasons["16/kernel"] == "default"


def test_min_size_still_keeps_small_leaves_dense():
    assert [row.reason for row in btc_plan(TREE, policy=Policy(min_size=5000)).rows] == ["default", "too small"]
    with pytest.raises(ValueError, match="min_size is -1; it must be a number of 0 or more, or None"):
        Policy(min_size=-1)
