"""One array at two paths: packed once, counted once, and still one object."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

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
    btc_reconstruct,
    btc_search,
)
from btc_jax.baselines import absmax4, apply_baseline
from btc_jax.tree import flatten

TABLE = 0.1 * jax.random.normal(jax.random.key(0), (300, 64))
OTHER = 0.1 * jax.random.normal(jax.random.key(1), (64, 64))
SCALE = jnp.ones(64)
TIED = {
    "embed": {"embedding": TABLE},
    "head": {"kernel": TABLE},
    "mlp": {"kernel": OTHER, "bias": SCALE},
    "out": {"bias": SCALE},
}
SEPARATE = jax.tree.map(jnp.copy, TIED)
ONE = {key: value for key, value in TIED.items() if key not in ("head", "out")}
TARGETS = [{}, {"bits": 4.5}, {"size": 30_000}, {"sqnr_db": 25.0}]


def stored_bytes(tree):
    """Bytes of all arrays of a tree, counting each object once."""
    return sum(array.nbytes for array in {id(array): array for array in jax.tree.leaves(tree)}.values())


@pytest.mark.parametrize("target", TARGETS)
def test_one_object_before_and_after(target):
    packed = btc_quantize(TIED, **target)
    assert packed["embed"]["embedding"] is packed["head"]["kernel"]
    assert packed["out"]["bias"] is SCALE
    decoded = btc_dequantize(packed)
    assert decoded["embed"]["embedding"] is decoded["head"]["kernel"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_rest_of_the_tree_is_packed_as_without_the_second_path(target):
    packed, expected = btc_quantize(TIED, **target), btc_quantize(ONE, **target)
    for path in (("embed", "embedding"), ("mlp", "kernel")):
        a, b = packed[path[0]][path[1]], expected[path[0]][path[1]]
        assert (a.nbytes, a.order, a.format) == (b.nbytes, b.order, b.format)
        np.testing.assert_array_equal(a.dequantize(), b.dequantize())


def test_arrays_that_are_only_equal_stay_separate():
    packed = btc_quantize(SEPARATE, bits=4.5)
    assert packed["embed"]["embedding"] is not packed["head"]["kernel"]
    assert (packed["embed"]["embedding"].order, packed["head"]["kernel"].order) == ("stored", "output-major")
    assert not any(row.tied_to for row in btc_plan(SEPARATE).rows)


@pytest.mark.parametrize("target", TARGETS)
def test_plan_and_metrics_count_it_once(target):
    packed = btc_quantize(TIED, **target)
    plan, metrics = btc_plan(TIED, measure=True, **target), btc_metrics(TIED, packed)
    assert plan.bytes_before == metrics.bytes_before == stored_bytes(TIED) < stored_bytes(SEPARATE)
    assert plan.bytes_min == plan.bytes_max == metrics.bytes_after == stored_bytes(packed)
    assert metrics.total.weights == TABLE.size + OTHER.size
    expected = btc_metrics(ONE, btc_quantize(ONE, **target))
    assert metrics.total == expected.total
    assert metrics.bytes_after == expected.bytes_after


def test_rows_say_what_a_leaf_is_tied_to():
    found = {row.path: (row.reason, row.tied_to, row.bytes_before, row.bytes_max) for row in btc_plan(TIED).rows}
    assert found["head/kernel"] == ("tied to embed/embedding", "embed/embedding", 0, 0)
    assert found["out/bias"] == ("tied to mlp/bias", "mlp/bias", 0, 0)
    assert found["embed/embedding"][:2] == ("default", "")
    leaves = {leaf.path: leaf for leaf in btc_metrics(TIED, btc_quantize(TIED)).leaves}
    assert (leaves["head/kernel"].reason, leaves["head/kernel"].measures) == ("tied to embed/embedding", None)
    assert leaves["head/kernel"].bytes_before == leaves["head/kernel"].bytes_after == 0


def test_the_report_does_not_call_it_dense():
    console = Console(width=200, file=io.StringIO())
    console.print(btc_metrics(TIED, btc_quantize(TIED)))
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    (line,) = [line for line in lines if "head/kernel" in line]
    assert "tied to embed/embedding" in line
    assert "dense" not in line


@pytest.mark.parametrize("rule", [Rule("head/*", None), Rule("head/*", Uniform(32))])
def test_a_rule_that_tells_them_apart_separates_them(rule):
    policy = Policy(Uniform(), rules=(rule,))
    packed = btc_quantize(TIED, policy=policy)
    metrics, plan = btc_metrics(TIED, packed, policy=policy), btc_plan(TIED, policy=policy, measure=True)
    assert packed["embed"]["embedding"] is not packed["head"]["kernel"]
    assert {row.path: row.tied_to for row in plan.rows}["head/kernel"] == ""
    assert plan.bytes_before == metrics.bytes_before == stored_bytes(TIED)
    assert plan.bytes_max == metrics.bytes_after == stored_bytes(packed)


def test_a_rule_for_both_keeps_them_one():
    for rule in (Rule("*", Uniform(32)), Rule("re:(embed|head)/.*", None)):
        packed = btc_quantize(TIED, policy=Policy(rules=(rule,)))
        assert packed["embed"]["embedding"] is packed["head"]["kernel"]


def test_three_of_a_kind_of_which_one_is_told_apart():
    tree = {name: {"kernel": OTHER} for name in "abcd"}
    policy = Policy(rules=(Rule("re:[bd]/.*", None),))
    found = {row.path: row.reason for row in btc_plan(tree, policy=policy).rows}
    assert found == {
        "a/kernel": "default",
        "b/kernel": "rule 1",
        "c/kernel": "tied to a/kernel",
        "d/kernel": "tied to b/kernel",
    }


def test_a_packed_tree_keeps_its_ties():
    once = btc_quantize(TIED)
    twice = btc_quantize(once, Uniform(32))
    assert twice["embed"]["embedding"] is twice["head"]["kernel"] is once["head"]["kernel"]
    assert btc_plan(once).bytes_before == stored_bytes(once)


def test_an_allocated_policy_keeps_them_one():
    policy = btc_allocate(TIED, bits=4)
    packed, expected = btc_quantize(TIED, policy=policy), btc_quantize(TIED, bits=4)
    assert packed["embed"]["embedding"] is packed["head"]["kernel"]
    assert stored_bytes(packed) == stored_bytes(expected)
    apart = btc_quantize(SEPARATE, policy=policy)
    assert apart["embed"]["embedding"].order == apart["head"]["kernel"].order == "stored"


def test_reconstructed_and_baseline_weights_are_one_as_well():
    decoded = btc_reconstruct(TIED)
    assert decoded["embed"]["embedding"] is decoded["head"]["kernel"]
    tree, metrics = apply_baseline(TIED, absmax4())
    assert tree["embed"]["embedding"] is tree["head"]["kernel"]
    assert metrics.total.weights == TABLE.size + OTHER.size
    assert metrics.bytes_before == stored_bytes(TIED)


def test_gradients_of_both_paths_add_up_within_jit():
    @jax.jit
    def loss(table):
        tree = btc_reconstruct({"embed": {"embedding": table}, "head": {"kernel": table}})
        return tree["embed"]["embedding"].sum() + 2 * tree["head"]["kernel"].sum()

    np.testing.assert_array_equal(jax.grad(loss)(TABLE), jnp.full_like(TABLE, 3.0))


def test_search_counts_it_once():
    result = btc_search(TIED, bits=(3, 6), max_rmse=0.02, codec=Multilevel(), progress=False)
    assert result.tree is not None
    assert result.tree["embed"]["embedding"] is result.tree["head"]["kernel"]
    assert all(trial.metrics.total.weights == TABLE.size + OTHER.size for trial in result.trials)


def test_a_tree_that_lost_its_ties_is_measured_as_it_is():
    """As after `jax.device_put`, or in a file from a program that does not keep ties."""
    loose = jax.tree.map(jnp.copy, btc_quantize(TIED))
    metrics = btc_metrics(TIED, loose)
    assert (metrics.bytes_before, metrics.bytes_after) == (stored_bytes(TIED), stored_bytes(loose))
    assert metrics.total.weights == 2 * TABLE.size + OTHER.size
    tied = btc_metrics(SEPARATE, btc_quantize(TIED))
    assert (tied.bytes_before, tied.bytes_after) == (stored_bytes(SEPARATE), stored_bytes(btc_quantize(TIED)))


def test_shapes_are_not_taken_for_one_array():
    big = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    plan = btc_plan({"a": {"kernel": big}, "b": {"kernel": big}})
    assert (plan.bytes_before, [row.tied_to for row in plan.rows]) == (2 * 16384, ["", ""])


def test_numpy_arrays_and_nnx_variables():
    array = np.asarray(TABLE)
    packed = btc_quantize({"x": array, "y": array})
    assert packed["x"] is packed["y"]

    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Param(TABLE)
            self.head = nnx.Param(TABLE)

    state = nnx.state(Tied())
    first, second = flatten(btc_quantize(state))[1]
    assert first is second


def test_rules_of_another_order_keep_tied_leaves_apart():
    w = jax.random.normal(jax.random.key(0), (64, 64))
    policy = Policy(rules=(Rule("c", Multilevel(), "stored"),))
    packed = btc_quantize({"a": w, "c": w}, policy=policy, bits=4)
    assert (packed["a"].order, packed["c"].order) == ("output-major", "stored")


def test_the_larger_weight_of_tied_leaves_counts():
    keys = jax.random.split(jax.random.key(0))
    tree = {"a": (w := jax.random.normal(keys[0], (64, 64))), "c": w, "d": jax.random.normal(keys[1], (64, 64))}
    one, other = (
        btc_quantize(tree, policy=Policy(rules=(Rule(name, weight=50.0),)), bits=4)["a"] for name in ("a", "c")
    )
    assert one.nbytes == other.nbytes > btc_quantize(tree, bits=4)["a"].nbytes
