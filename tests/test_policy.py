import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_metrics,
    btc_quantize,
)
from btc_jax.leafspec import LeafSpec
from tests.policy_support import BIG as BIG
from tests.policy_support import as_users_run_it as as_users_run_it
from tests.policy_support import reasons as reasons
from tests.policy_support import rows as rows


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 64)(tokens)
        x = nn.Conv(32, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(8)(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs, dropout):
        self.embed = nnx.Embed(64, 64, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs) if dropout else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Pair(NamedTuple):
    kernel: Any
    scale: Any


def linen_variables():
    return jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros((1, 4, 4), jnp.int32))


def test_default_takes_the_kernels_and_embeddings_of_linen_params():
    assert reasons(linen_variables()["params"]) == {
        "BatchNorm_0/bias": "bias",
        "BatchNorm_0/scale": "norm",
        "Conv_0/bias": "bias",
        "Conv_0/kernel": "default",
        "Dense_0/bias": "bias",
        "Dense_0/kernel": "default",
        "Embed_0/embedding": "default",
    }


def test_default_leaves_linen_state_dense_whatever_its_names():
    variables = linen_variables() | {"cache": {"kernel": BIG}, "intermediates": {"embedding": BIG}}
    found = reasons(variables)
    assert found["batch_stats/BatchNorm_0/mean"] == found["batch_stats/BatchNorm_0/var"] == "batch_stats"
    assert (found["cache/kernel"], found["intermediates/embedding"]) == ("cache", "intermediates")
    assert found["params/Conv_0/kernel"] == "default"


def test_a_rule_overrides_size_name_and_state():
    tree = {"batch_stats": {"mean": BIG}, "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert reasons(tree, Policy(rules=(Rule("*", Uniform()),))) == {"batch_stats/mean": "rule 1", "bias": "rule 1"}


def test_nnx_paths_end_with_the_layer_and_not_with_value():
    state = nnx.split(NNXNet(nnx.Rngs(0), dropout=False))[1]
    assert reasons(state) == {
        "embed/embedding": "default",
        "layers/0/bias": "bias",
        "layers/0/kernel": "default",
        "layers/1/bias": "bias",
        "layers/1/kernel": "default",
        "norm/bias": "bias",
        "norm/mean": "statistics",
        "norm/scale": "norm",
        "norm/var": "statistics",
    }


def test_nnx_state_with_the_random_keys_of_dropout():
    state = nnx.split(NNXNet(nnx.Rngs(0), dropout=True))[1]
    found = reasons(state)
    assert found["dropout/rngs/count"] == "integer"
    assert "key" in found["dropout/rngs/key"]
    leaves = btc_metrics(state, btc_quantize(state)).leaves
    assert {leaf.path for leaf in leaves if leaf.measures} == {"embed/embedding", "layers/0/kernel", "layers/1/kernel"}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ([{"kernel": BIG}, {"kernel": BIG}], {"0/kernel": "default", "1/kernel": "default"}),
        (({"w": BIG}, [{"embedding": BIG}]), {"0/w": "default", "1/0/embedding": "default"}),
        (Layer(BIG, jnp.zeros(3)), {"kernel": "default", "bias": "bias"}),
        ({"a": Pair(BIG, 1.0)}, {"a/kernel": "default", "a/scale": "not an array"}),
        (BIG, {"": "default"}),
    ],
)
def test_containers_of_any_kind(tree, expected):
    assert reasons(tree) == expected


def test_an_item_of_a_list_has_no_name_and_is_decided_by_its_axes():
    vector = jax.ShapeDtypeStruct((8192,), jnp.float32)
    assert reasons([BIG, vector, {"bias": [BIG]}]) == {"0": "default", "1": "fewer than 2 axes", "2/bias/0": "bias"}


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "reason"),
    [
        ("a/kernel", (64, 64), "float32", "default"),
        ("a/kernel", (64, 64), "bfloat16", "default"),
        ("a/kernel", (64, 64), "float16", "default"),
        ("a/kernel", (4096,), "float32", "fewer than 2 axes"),
        ("a/kernel", (), "float32", "fewer than 2 axes"),
        ("a/kernel", (8, 8), "float32", "default"),
        ("a/kernel", (3, 3), "float32", "would not become smaller"),
        ("a/kernel", (8, 8), "bfloat16", "would not become smaller"),
        ("a/kernel", (0, 64), "float32", "empty"),
        ("a/kernel", (2**20, 2**20), "float32", "default"),
        ("a/bias", (64, 64), "float32", "bias"),
        ("a/bias", (64,), "float32", "bias"),
        ("a/my_kernel", (64, 64), "float32", "default"),
        ("a/kernel", (64, 64), "int8", "integer"),
        ("a/kernel", (64, 64), "uint32", "integer"),
        ("a/kernel", (64, 64), "bool", "bool"),
        ("a/kernel", (64, 64), "complex64", "complex"),
    ],
)
def test_reason_of_a_leaf(path, shape, dtype, reason):
    (decision,) = Policy().decide([LeafSpec(path, shape, jnp.dtype(dtype))])
    assert (decision.reason, decision.codec) == (reason, Uniform() if reason == "default" else None)


def test_packed_leaves_stay_as_they_are_even_under_a_rule():
    packed = btc_quantize({"kernel": np.zeros((64, 64), np.float32)})
    assert reasons(packed) == {"kernel": "already quantized"}
    everything = Policy(rules=(Rule("*", Uniform(32)),))
    assert btc_quantize(packed, policy=everything)["kernel"] is packed["kernel"]


def test_narrower_defaults():
    tree = {"w": BIG, "wide": {"kernel": BIG}, "b": jax.ShapeDtypeStruct((8192,), jnp.float32)}
    policy = Policy(names=("w", "b"), min_axes=1, min_size=5000)
    assert reasons(tree, policy) == {"w": "too small", "wide/kernel": "not in names", "b": "default"}
    assert set(reasons(tree, Policy(names=("*",), min_axes=1)).values()) == {"default"}
    assert reasons(tree, Policy(min_axes=1))["b"] == "bias"


def test_one_name_may_be_a_plain_string():
    with as_users_run_it():
        assert Policy(names="w").names == ("w",)  # pyright: ignore[reportArgumentType]


def test_order_follows_the_name_unless_given():
    tree = {"embedding": BIG, "kernel": BIG, "x": {"embedding": BIG, "kernel": BIG}}
    rules = (Rule("x/embedding", Uniform(32)), Rule("x/kernel", Uniform(32), "stored"))
    orders = {path: row.order for path, row in rows(tree, Policy(rules=rules)).items()}
    assert orders == {
        "embedding": "stored",
        "kernel": "output-major",
        "x/embedding": "stored",
        "x/kernel": "stored",
    }


def test_order_of_the_policy_holds_where_the_rule_does_not_say():
    tree = {"embedding": BIG, "kernel": BIG, "other": BIG}
    policy = Policy(order="output-major", rules=(Rule("other", Uniform()),))
    assert {row.order for row in rows(tree, policy).values()} == {"output-major"}
    policy = Policy(order="stored", rules=(Rule("other", Uniform(), "output-major"),))
    assert [rows(tree, policy)[path].order for path in tree] == ["stored", "stored", "output-major"]
