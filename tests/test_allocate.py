"""Targets for whole trees: met from below with little unused, allocated as requested, or refused in one clear line."""

import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_allocate,
    btc_dequantize,
    btc_metrics,
    btc_plan,
    btc_quantize,
    coding,
    is_packed,
    load,
    save,
)
from btc_jax.allocate import nbytes_of, sharing_of
from btc_jax.formats import UniformFormat
from btc_jax.policy import BTCPolicyError
from btc_jax.seal import SEAL
from btc_jax.sizes import leaf_nbytes
from tests import oracle
from tests.test_metrics import DATA
from tests.test_multilevel import same_bytes, unchecked


def tree_of(scales=(1.0, 0.05, 3.0), seed=0):
    """Gaussian, Laplacian and heavy-tailed leaves of different scales, and a dense one."""
    rng = np.random.default_rng(seed)
    draws = (rng.standard_normal, lambda size: rng.laplace(size=size), lambda size: rng.standard_t(4, size))
    leaves = {f"{i}/kernel": scale * draws[i % 3]((64, 64)) for i, scale in enumerate(scales)}
    return {path: leaf.astype(np.float32) for path, leaf in leaves.items()} | {"bias": np.ones(100, np.float32)}


TREE = tree_of()


def bits_of(leaf):
    return 8 * leaf.nbytes / leaf.size


def all_bits(packed):
    leaves = [leaf for leaf in packed.values() if is_packed(leaf)]
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


def all_bytes(packed):
    return sum(leaf_nbytes(leaf) for leaf in packed.values())


def sqnr_of(tree, packed, path):
    return oracle.sqnr_db(tree[path], packed[path].dequantize())


def totals(tree, packed):
    """SQNR and rmse over all packed weights."""
    paths = [path for path, leaf in packed.items() if is_packed(leaf)]
    pairs = [(np.asarray(tree[path], np.float64), np.asarray(packed[path].dequantize(), np.float64)) for path in paths]
    flat = [np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1)]
    return oracle.sqnr_db(*flat), math.sqrt(np.mean((flat[0] - flat[1]) ** 2))


def same_trees(a, b):
    return all(same_bytes(x, b[path]) for path, x in a.items() if is_packed(x))


# Targets are met


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


def test_bounds_that_are_met_anyway():
    assert all_bits(btc_quantize(TREE, size="1MB")) > 7
    assert all_bits(btc_quantize(TREE, rmse=100)) < 1
    assert all_bits(btc_quantize(TREE, sqnr_db=1e-3)) < 1


# Targets are refused


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


# Bits are allocated as requested


def test_a_weight_shifts_bits_to_a_leaf():
    tree, bits = tree_of((1.0, 0.7, 1.3)), []
    for weight in (0.25, 1.0, 4.0, 16.0):
        rules = (Rule("1/*", Multilevel(), weight=weight),)
        packed = btc_quantize(tree, policy=Policy(Multilevel(), rules), bits=4)
        assert 3.98 <= all_bits(packed) <= 4
        bits.append(bits_of(packed["1/kernel"]))
    assert bits == sorted(bits)
    # Four times the weight is half the step, or one bit; the other two leaves each give up a third of a bit.
    assert 0.5 < bits[2] - bits[1] < 0.8


def test_one_slope_serves_all_leaves_best():
    """If the total error is minimized, moving a bit from one leaf to another never helps."""
    tree = tree_of((1.0, 0.5, 2.0))
    best = totals(tree, btc_quantize(tree, bits=4, sensitivity="equal"))[0]
    for path, weight in (("0/*", 1.5), ("0/*", 0.7), ("2/*", 1.5), ("2/*", 0.7)):
        moved = Policy(Multilevel(), (Rule(path, Multilevel(), weight=weight),))
        assert totals(tree, btc_quantize(tree, policy=moved, bits=4, sensitivity="equal"))[0] < best + 0.01


def test_mixed_codecs_share_one_target():
    policy = Policy(Multilevel(), (Rule("1/*", Uniform(threshold=0.0)),))
    packed = btc_quantize(TREE, policy=policy, bits=5)
    assert packed["1/kernel"].format == UniformFormat(widths=(8,))
    assert bits_of(packed["1/kernel"]) == 8.5 + 8 * SEAL.nbytes / 4096
    assert 5 * 0.995 <= all_bits(packed) <= 5
    with pytest.raises(ValueError, match=r"bits of 2 cannot be reached: .* from 3\.0"):
        btc_quantize(TREE, policy=policy, bits=2)


def test_without_a_target_only_what_adapts_comes_to_4_and_a_half_bits():
    policy = Policy(Multilevel(), (Rule("1/*", Uniform(threshold=0.0)),))
    packed = btc_quantize(TREE, policy=policy)
    assert 4.5 * 0.995 <= all_bits({path: packed[path] for path in ("0/kernel", "2/kernel")}) <= 4.5


@pytest.mark.parametrize("exponent", [0, -6, 7])
def test_an_automatic_threshold_follows_the_scale(exponent):
    codec = Uniform(threshold="auto")
    scaled = {path: np.ldexp(leaf, exponent) for path, leaf in TREE.items()}
    plain, packed = (btc_quantize(tree, codec, bits=5.5) for tree in (TREE, scaled))
    # One more block of 64 with 8 bits is 0.02 bits for each of the 12288 weights.
    assert 5.5 - 4 * 64 / 12288 <= all_bits(packed) <= 5.5
    for path in ("0/kernel", "1/kernel", "2/kernel"):
        assert np.array_equal(packed[path].header["wide"], plain[path].header["wide"])
        assert np.array_equal(np.ldexp(np.asarray(plain[path].dequantize()), exponent), packed[path].dequantize())


def test_one_width_a_leaf():
    codec = Multilevel(width="leaf")
    packed = btc_quantize(TREE, codec, bits=4.0)
    assert 4 - 1 / 3 < all_bits(packed) <= 4  # less than a bit of one of three leaves is unused
    for path in ("0/kernel", "1/kernel", "2/kernel"):
        leaf = packed[path]
        assert type(leaf.format.width) is int
        assert set(np.asarray(leaf.widths).tolist()) == {leaf.format.width}
        assert bits_of(leaf) == leaf.format.width + 8 * (128 + 8 + SEAL.nbytes) / 4096


def test_one_width_a_leaf_in_a_file(tmp_path):
    packed = btc_quantize(TREE, Multilevel(width="leaf"), bits=4.0)
    save(tmp_path / "m.safetensors", packed)
    loaded = load(tmp_path / "m.safetensors")
    assert same_trees(packed, loaded)
    assert [loaded[p].format for p in packed if is_packed(packed[p])] == [
        leaf.format for leaf in packed.values() if is_packed(leaf)
    ]
    assert np.array_equal(loaded["0/kernel"].dequantize(), packed["0/kernel"].dequantize())


def test_a_bit_more_of_one_width_is_about_6_db():
    codecs = [Multilevel(width=width) for width in range(9)]
    errors = [coding.pack(TREE["0/kernel"], coding.Recipe(codec, codec.formats[0], "stored")).error for codec in codecs]
    errors = [error.errors for error in errors]
    gains = -np.diff(10 * np.log10(errors))
    assert np.all((gains > 4.0) & (gains < 6.5)), gains


def test_every_rate_is_within_reach_of_a_leaf():
    leaf = {"kernel": TREE["0/kernel"]}
    for bits in (0.3, 8.0):  # 128 blocks; one more bit in one of them is 0.008 bits
        assert bits - 0.008 <= all_bits(btc_quantize(leaf, bits=bits)) <= bits
    assert set(np.asarray(btc_quantize(leaf, bits=0.3)["kernel"].widths).tolist()) >= {0}
    assert set(np.asarray(btc_quantize(leaf, bits=8.0)["kernel"].widths).tolist()) <= {7, 8}


@pytest.mark.parametrize("sensitivity", ["shape", "equal"])
def test_leaves_of_scales_far_apart_keep_every_rate(sensitivity):
    tree = tree_of((1.0, 1e-3, 1e3))
    for bits in (0.4, 7.8):
        packed = btc_quantize(tree, bits=bits, sensitivity=sensitivity)
        assert bits * 0.99 <= all_bits(packed) <= bits


@pytest.mark.parametrize("seed", range(4))
def test_the_default_starves_no_leaf(seed):
    """Leaves 0.01 to 100 times as large, as after folding in batch norm."""
    tree = tree_of(10.0 ** np.random.default_rng(seed).uniform(-2, 2, 8), seed)
    for bits in (4.0, 5.0):
        packed = btc_quantize(tree, bits=bits)
        assert min(sqnr_of(tree, packed, path) for path in tree if path != "bias") > 10


# Real networks


NAMED = Policy(Multilevel(), names=("*",), min_size=0, order="stored")


def network(name):
    path = DATA / f"cifar10_{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return {path: leaf for path, leaf in load_file(path).items() if leaf.ndim > 1}


@pytest.mark.parametrize(
    ("name", "bits", "sqnr_db"),
    [
        *(("resnet20", *pair) for pair in ((3, 17.7), (4, 23.8), (4.5, 26.8), (5, 29.8), (6, 35.7))),
        *(("resnet56", *pair) for pair in ((3, 18.0), (4, 23.9), (4.5, 27.0), (5, 30.0), (6, 35.4))),
    ],
)
def test_error_at_equal_stored_bits(name, bits, sqnr_db):
    weights = network(name)
    packed = btc_quantize(weights, policy=NAMED, bits=bits, sensitivity="equal")
    assert bits * 0.995 <= all_bits(packed) <= bits
    total = btc_metrics(weights, packed, policy=NAMED).total
    assert total.sqnr_db >= sqnr_db
    assert total.effective_bits == all_bits(packed)


@pytest.mark.parametrize(("draw", "sqnr_db"), [("standard_normal", 22.94), ("laplace", 21.46)])
def test_random_numbers_at_4_and_a_half_bits(draw, sqnr_db):
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((500, 500)) if draw == "standard_normal" else rng.laplace(size=(500, 500))
    packed = btc_quantize({"kernel": leaf.astype(np.float32)}, bits=4.5)
    assert 4.5 * 0.995 <= all_bits(packed) <= 4.5
    assert oracle.sqnr_db(leaf, packed["kernel"].dequantize()) > sqnr_db


@pytest.mark.parametrize("sensitivity", ["shape", "equal"])
def test_the_scale_of_a_network_changes_neither_widths_nor_codes(sensitivity):
    weights = network("resnet20")
    plain = btc_quantize(weights, policy=NAMED, bits=4.5, sensitivity=sensitivity)
    for factor in (0.01, 100):
        scaled = {path: leaf * np.float32(factor) for path, leaf in weights.items()}
        scaled = btc_quantize(scaled, policy=NAMED, bits=4.5, sensitivity=sensitivity)
        differences = 0
        for path, leaf in plain.items():
            assert np.array_equal(leaf.header["header"], scaled[path].header["header"])
            expected, found = leaf.dequantize(), scaled[path].dequantize() / np.float32(factor)
            differences += (np.abs(expected - found) > 1e-5 * np.abs(expected).max()).sum()
        # Scaling rounds the weights, so a weight midway between two levels may move to the other one.
        assert differences <= 1e-5 * sum(leaf.size for leaf in weights.values())


@pytest.mark.parametrize("seed", [0, 4])
def test_the_default_starves_no_leaf_of_a_network(seed):
    rng, policy = np.random.default_rng(seed), Policy(Multilevel(), names=("*",), min_size=0, order="stored")
    tree = {path: leaf * np.float32(10 ** rng.uniform(-2, 2)) for path, leaf in network("resnet20").items()}
    packed = btc_quantize(tree, policy=policy, bits=4)
    worst = min(tree, key=lambda path: sqnr_of(tree, packed, path))
    assert sqnr_of(tree, packed, worst) > 10, (worst, bits_of(packed[worst]))


def test_a_shared_out_tree_goes_through_jit_and_devices():
    packed = btc_quantize(TREE, bits=4.5)
    decoded = btc_dequantize(packed)
    for tree in (jax.jit(btc_dequantize)(packed), btc_dequantize(jax.device_put(packed, jax.devices()[2]))):
        for path, leaf in decoded.items():
            assert np.array_equal(tree[path], leaf)
