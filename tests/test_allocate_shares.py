"""How a budget is divided: by weights, codecs, widths and scales."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_dequantize,
    btc_metrics,
    btc_quantize,
    coding,
    is_packed,
    load,
    save,
)
from btc_jax.formats import UniformFormat
from btc_jax.seal import SEAL
from tests import oracle
from tests.allocate_support import TREE as TREE
from tests.allocate_support import all_bits as all_bits
from tests.allocate_support import bits_of as bits_of
from tests.allocate_support import same_trees as same_trees
from tests.allocate_support import sqnr_of as sqnr_of
from tests.allocate_support import totals as totals
from tests.allocate_support import tree_of as tree_of
from tests.test_metrics_trees import DATA


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
