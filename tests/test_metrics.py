import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import Rule, Uniform
from btc_jax.seal import SEAL
from tests import oracle
from tests.metrics_support import WIDE_ONLY as WIDE_ONLY
from tests.metrics_support import all_leaves as all_leaves
from tests.metrics_support import assert_errors as assert_errors
from tests.metrics_support import measured as measured
from tests.metrics_support import weights as weights


def assert_storage(measures, widths, sizes, header_bits, nbytes):
    """Compare bits with the widths and the numbers of real weights of all blocks."""
    n = sum(sizes)
    assert measures.weights == n
    assert measures.wide_share == widths.count(8) / len(widths)
    assert measures.payload_bits == sum(width * size for width, size in zip(widths, sizes, strict=True)) / n
    assert measures.header_bits == header_bits / n
    assert measures.effective_bits == 8 * nbytes / n


def blocks_of(leaf, codec):
    """Widths and sizes of the blocks of a leaf, from the oracle."""
    blocks = oracle.quantize(oracle.output_major(leaf).astype(np.float32), codec.block_size)
    return [block[0] for block in blocks], [len(block[1]) for block in blocks]


def test_figures_of_each_leaf_and_of_all():
    tree = {"a": weights((40, 50), 1), "b": {"w": weights((3, 3, 7, 11), 2)}, "bias": np.ones(5, np.float32)}
    codec = Uniform(64)
    metrics, decoded = measured(tree, all_leaves(codec))
    a, b, bias = metrics.leaves
    assert [leaf.path for leaf in metrics.leaves] == ["a", "b/w", "bias"]
    widths, sizes, header_bits, nbytes = [], [], 0, 0
    for row, leaf, found in ((a, tree["a"], decoded["a"]), (b, tree["b"]["w"], decoded["b"]["w"])):
        leaf_widths, leaf_sizes = blocks_of(leaf, codec)
        blocks, wide = len(leaf_widths), leaf_widths.count(8)
        leaf_header = 8 * (4 * blocks + math.ceil(blocks / 8))
        leaf_bytes = (blocks + wide) * 32 + leaf_header // 8 + SEAL.nbytes
        assert 0 < wide < blocks
        assert leaf_sizes[-1] < 64
        assert (row.shape, row.dtype, row.reason) == (leaf.shape, "float32", "default")
        assert (row.bytes_before, row.bytes_after) == (leaf.nbytes, leaf_bytes)
        assert_storage(row.measures, leaf_widths, leaf_sizes, leaf_header, leaf_bytes)
        assert_errors(row.measures, [leaf], [found])
        widths, sizes = widths + leaf_widths, sizes + leaf_sizes
        header_bits, nbytes = header_bits + leaf_header, nbytes + leaf_bytes
    assert_storage(metrics.total, widths, sizes, header_bits, nbytes)
    assert_errors(metrics.total, [tree["a"], tree["b"]["w"]], [decoded["a"], decoded["b"]["w"]])
    assert (bias.measures, bias.reason, bias.bytes_before, bias.bytes_after) == (None, "fewer than 2 axes", 20, 20)
    assert metrics.bytes_before == a.bytes_before + b.bytes_before + 20
    assert metrics.bytes_after == nbytes + 20


def test_payload_counts_real_weights_and_effective_bits_also_the_padding():
    leaf = np.where(np.arange(65) % 2, 0.5, -0.5).astype(np.float32).reshape(65, 1)
    total = measured({"w": leaf}, all_leaves(Uniform(64)))[0].total
    # A block of 64 wide weights, and one narrow weight in a row of 32 bytes.
    assert total.payload_bits == (64 * 8 + 4) / 65
    assert total.header_bits == 8 * (2 * 4 + 1) / 65
    assert total.effective_bits == 8 * (64 + 32 + 2 * 4 + 1 + SEAL.nbytes) / 65
    assert total.wide_share == 0.5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_error_is_that_of_the_weights_that_a_model_gets(dtype):
    tree = {"w": weights((40, 50), 3, dtype=dtype)}
    metrics, decoded = measured(tree, all_leaves(Uniform(64)))
    assert metrics.leaves[0].dtype == str(np.dtype(dtype))
    assert metrics.bytes_before == 2000 * np.dtype(dtype).itemsize
    assert_errors(metrics.total, [tree["w"]], [decoded["w"]])


@given(st.integers(0, 10**6), st.integers(-30, 30), st.integers(-30, 30))
@settings(deadline=None, max_examples=20)
def test_errors_at_every_scale(seed, exponent_a, exponent_b):
    tree = {"a": weights((8, 40), seed, 10.0**exponent_a), "b": weights((8, 40), seed + 1, 10.0**exponent_b)}
    metrics, decoded = measured(tree, all_leaves(WIDE_ONLY))
    a, b = metrics.leaves
    assert a.measures is not None
    assert b.measures is not None
    assert_errors(a.measures, [tree["a"]], [decoded["a"]])
    assert_errors(b.measures, [tree["b"]], [decoded["b"]])
    assert_errors(metrics.total, tree.values(), decoded.values())


@pytest.mark.parametrize(("scale", "threshold", "low", "high"), [(1e4, 500, 0.1, 0.9), (1e-30, 0.05, 0, 0)])
def test_two_widths_at_extreme_scales(scale, threshold, low, high):
    tree = {"w": weights((40, 50), 4, scale)}
    metrics, decoded = measured(tree, all_leaves(Uniform(64, threshold=threshold, header_dtype="float32")))
    assert_errors(metrics.total, [tree["w"]], [decoded["w"]])
    assert low <= metrics.total.wide_share <= high
    assert metrics.total.header_bits == 8 * (32 * 8 + 4) / 2000


def test_a_codec_with_more_error_than_signal():
    tree = {"w": weights((8, 40), 5)}
    codec = Uniform(32, 1, 2, threshold=math.inf)
    metrics, decoded = measured(tree, all_leaves(codec))
    assert metrics.total.sqnr_db < 3
    assert_errors(metrics.total, [tree["w"]], [decoded["w"]])


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_exact_weights_have_no_error_and_no_infinity_in_json(value):
    metrics, _ = measured({"w": np.full((8, 40), value, np.float32)}, all_leaves(Uniform(32)))
    total = metrics.total
    assert (total.rmse, total.relative_rmse, total.largest_error, total.sqnr_db) == (0, 0, 0, math.inf)
    record = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert record["total"]["sqnr_db"] is None
    assert record["leaves"][0]["measures"]["sqnr_db"] is None


def test_zero_leaf_counts_in_the_totals():
    tree = {"a": weights((8, 40), 6), "b": np.zeros((8, 40), np.float32)}
    metrics, decoded = measured(tree, all_leaves(Uniform(32)))
    assert_errors(metrics.total, tree.values(), decoded.values())
    assert metrics.total.weights == 640


def test_leaf_without_weights():
    tree = {"w": np.zeros((0, 4), np.float32), "zeros": np.zeros((8, 4), np.float32)}
    metrics, _ = measured(tree, all_leaves(Uniform(32), Rule("w", Uniform(32))))
    empty = metrics.leaves[0]
    assert (empty.reason, empty.bytes_after, empty.measures) == ("empty", 0, None)
    assert (metrics.total.weights, metrics.total.rmse) == (32, 0)


def test_json_holds_every_leaf_and_the_totals():
    tree = {"w": weights((8, 40)), "bias": np.zeros(3, np.float32)}
    metrics, _ = measured(tree, all_leaves(Uniform(32)))
    record = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert [leaf["path"] for leaf in record["leaves"]] == ["bias", "w"]
    assert record["leaves"][0]["measures"] is None
    assert record["leaves"][1]["shape"] == [8, 40]
    assert record["total"]["rmse"] == metrics.total.rmse
    assert (record["bytes_before"], record["bytes_after"]) == (metrics.bytes_before, metrics.bytes_after)
