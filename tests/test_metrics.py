import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from btc_jax import Policy, Rule, Uniform, btc_dequantize, btc_metrics, btc_quantize
from btc_jax.policy import BTCPolicyError
from btc_jax.seal import SEAL
from tests import oracle

DATA = Path(__file__).parents[2] / "shared" / "data"
WIDE_ONLY = Uniform(32, threshold=0.0, header_dtype="float32")


def weights(shape, seed=0, scale=1.0, dtype=np.float32):
    """Weights in smooth and rough runs, so that about half of the blocks are wide at a scale of 1."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    spread = np.repeat(rng.choice([0.01, 0.2], size // 64 + 1), 64)[:size]
    flat = scale * rng.standard_normal(size) * spread
    output_major = flat.reshape(shape[-1], shape[-2], *shape[:-2])
    return np.moveaxis(np.moveaxis(output_major, 1, -1), 0, -1).astype(dtype)


def all_leaves(codec, *rules, **fields):
    return Policy(codec, rules, names=("*",), min_size=0, **fields)


def measured(tree, policy):
    """The tree's metrics, and the decoded weights as seen by a model."""
    packed = btc_quantize(tree, policy=policy)
    return btc_metrics(tree, packed, policy=policy), btc_dequantize(packed)


def exact_errors(originals, decoded):
    """The error measures, in float64."""
    w = np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in originals])
    e = w - np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in decoded])
    signal, noise = np.sum(w**2), np.sum(e**2)
    return {
        "rmse": np.sqrt(np.mean(e**2)),
        "relative_rmse": np.sqrt(noise / signal),
        "sqnr_db": 10 * np.log10(signal / noise),
        "largest_error": np.abs(e).max(),
    }


def assert_errors(measures, originals, decoded):
    for name, value in exact_errors(originals, decoded).items():
        np.testing.assert_allclose(getattr(measures, name), value, rtol=2e-6, err_msg=name)


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


def test_dense_leaves_are_listed_with_their_reasons():
    packed = btc_quantize({"w": weights((8, 40))}, policy=all_leaves(Uniform(32)))["w"]
    tree = {"kernel": weights((64, 64)), "small": {"kernel": weights((4, 4))}, "steps": np.arange(3)}
    tree |= {"head": {"kernel": weights((64, 64))}, "rate": 0.5, "packed": packed}
    metrics, _ = measured(tree, Policy(rules=(Rule("head/*", None),)))
    assert {leaf.path: leaf.reason for leaf in metrics.leaves} == {
        "head/kernel": "rule 1",
        "kernel": "default",
        "packed": "already quantized",
        "rate": "not an array",
        "small/kernel": "would not become smaller",
        "steps": "integer",
    }
    assert [leaf.path for leaf in metrics.leaves if leaf.measures] == ["kernel"]
    assert metrics.total.weights == 4096
    dense = [leaf for leaf in metrics.leaves if leaf.measures is None]
    assert [leaf.bytes_after for leaf in dense] == [16384, packed.nbytes, 0, 64, 24]
    assert all(leaf.bytes_before == leaf.bytes_after for leaf in dense)


def test_codec_argument_is_short_for_a_policy():
    tree = {"kernel": weights((64, 64))}
    packed = btc_quantize(tree, Uniform(32))
    assert btc_metrics(tree, packed, Uniform(32)) == btc_metrics(tree, packed, policy=Policy(Uniform(32)))


def test_figures_come_from_the_packed_leaf_and_not_from_the_policy():
    tree = {"kernel": weights((64, 64))}
    total = btc_metrics(tree, btc_quantize(tree, WIDE_ONLY)).total
    assert total.header_bits == 64 / 32


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda q: q | {"extra": np.zeros(3)}, ("extra", "one of")),
        (lambda q: {"kernel": q["kernel"]}, ("bias", "one of")),
        (lambda q: q | {"bias": np.zeros(3, np.float32)}, ("bias", "(7,)", "(3,)")),
        (lambda q: q | {"bias": 1.0}, ("bias", "(7,)")),
        (lambda q: q | {"kernel": 1.0}, ("kernel", "(64, 64)")),
        (lambda q: q | {"kernel": btc_quantize(weights((16, 256)), policy=Policy(names=("*",)))}, ("kernel", "256")),
    ],
)
def test_trees_that_differ_are_refused_by_name(change, parts):
    tree = {"kernel": weights((64, 64)), "bias": np.zeros(7, np.float32)}
    other = change(dict(btc_quantize(tree)))
    with pytest.raises(ValueError, match="tree") as caught:
        btc_metrics(tree, other)
    assert all(part in str(caught.value) for part in parts)
    assert " 0 other" not in str(caught.value)


def test_trees_that_changed_places_are_refused():
    tree = {"kernel": weights((64, 64)), "bias": np.zeros(7, np.float32)}
    packed = btc_quantize(tree)
    for first, second in ((packed, tree), (packed, packed), (tree, tree), (packed, btc_dequantize(packed))):
        with pytest.raises(ValueError, match=r"btc_metrics\(params, quantized\)"):
            btc_metrics(first, second)
    with pytest.raises(ValueError, match="kernel is packed in the first tree"):
        btc_metrics(packed, tree)


def test_a_tree_that_was_partly_packed_before_is_measured_for_the_rest():
    tree = {"a": {"kernel": weights((64, 64))}, "z": {"kernel": weights((64, 65), 1)}}
    partly = btc_quantize(tree, policy=Policy(rules=(Rule("z/*", None),)))
    metrics = btc_metrics(partly, btc_quantize(partly))
    assert [leaf.path for leaf in metrics.leaves if leaf.measures] == ["z/kernel"]


def test_policy_that_does_not_fit_says_which_one_is_needed():
    tree = {"kernel": weights((64, 64))}
    with pytest.raises(BTCPolicyError, match=r"matches no leaf.*policy that the tree was quantized with"):
        btc_metrics(tree, btc_quantize(tree), policy=Policy(rules=(Rule("head", None),)))


def test_reasons_fit_the_tree_even_where_the_policy_does_not():
    tree = {"w": weights((8, 40)), "kernel": weights((64, 64))}
    packed = btc_quantize(tree, policy=all_leaves(Uniform(32), Rule("kernel", None)))
    kernel, w = btc_metrics(tree, packed).leaves
    assert w.measures is not None
    assert w.reason != "w"
    assert kernel.measures is None
    assert kernel.reason != "default"


# Networks on which the paper's codec was measured independently of this package.

TABLE = [
    # depth, block size, payload bits, effective bits, rmse, share of wide blocks
    (20, 32, 7.4395, 8.4708, 0.00105, 0.8599),
    (20, 64, 7.5325, 8.0482, 0.00113, 0.8831),
    (20, 256, 7.6184, 7.7474, 0.00146, 0.9047),
    (56, 64, 5.9739, 6.4895, 0.00241, 0.4935),
    (56, 256, 6.2570, 6.3860, 0.00298, 0.5644),
]


@functools.cache
def network(depth):
    """All weights of a CIFAR-10 ResNet in PyTorch's layout."""
    path = DATA / f"cifar10_resnet{depth}.safetensors"
    if not path.exists():
        pytest.skip(f"no real weights: {path} is absent")
    return {name: leaf for name, leaf in load_file(path).items() if leaf.ndim > 1}


def joined(tree):
    """The same blocks in three leaves, to compile less: kernels of whole blocks are merged into one."""
    whole = [leaf.reshape(-1, 1, 3, 3) for leaf in tree.values() if leaf.size % 256 == 0]
    return {name: leaf for name, leaf in tree.items() if leaf.size % 256} | {"whole": np.concatenate(whole)}


def flax_layout(tree):
    return {name: leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T for name, leaf in tree.items()}


@pytest.fixture
def hasty_compiler():
    """Compiling takes longer than computing here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_row_of_the_table(total, payload, effective, rmse, share):
    assert round(total.payload_bits, 4) == payload
    assert round(total.wide_share, 4) == share
    assert effective - 1e-4 <= total.effective_bits <= effective + 0.01
    assert total.rmse == pytest.approx(rmse, rel=0.03)


@pytest.mark.usefixtures("hasty_compiler")
@pytest.mark.parametrize(("depth", "block_size", "payload", "effective", "rmse", "share"), TABLE)
def test_real_weights_in_both_layouts(depth, block_size, payload, effective, rmse, share):
    tree = joined(network(depth))
    torch, _ = measured(tree, all_leaves(Uniform(block_size), order="stored"))
    flax, _ = measured(flax_layout(tree), all_leaves(Uniform(block_size), order="output-major"))
    assert_row_of_the_table(torch.total, payload, effective, rmse, share)
    assert (flax.total.payload_bits, flax.total.wide_share) == (torch.total.payload_bits, torch.total.wide_share)
    assert flax.total.rmse == pytest.approx(torch.total.rmse, rel=1e-5)


@pytest.mark.usefixtures("hasty_compiler")
def test_real_weights_leaf_by_leaf():
    tree = flax_layout(network(20)) | {"bn1.weight": np.ones(16, np.float32)}
    metrics, decoded = measured(tree, all_leaves(Uniform(64), order="output-major"))
    assert_row_of_the_table(metrics.total, *TABLE[1][2:])
    taken = [leaf.path for leaf in metrics.leaves if leaf.measures]
    assert taken == sorted(network(20))
    assert_errors(metrics.total, [tree[name] for name in taken], [decoded[name] for name in taken])
