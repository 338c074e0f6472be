"""Metrics of whole trees: reasons, differing trees, real weights."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from btc_jax import Policy, Rule, Uniform, btc_dequantize, btc_metrics, btc_quantize
from btc_jax.policy import BTCPolicyError
from tests.metrics_support import WIDE_ONLY as WIDE_ONLY
from tests.metrics_support import all_leaves as all_leaves
from tests.metrics_support import assert_errors as assert_errors
from tests.metrics_support import measured as measured
from tests.metrics_support import weights as weights

DATA = Path(__file__).parents[2] / "shared" / "data"


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
