import dataclasses
import math
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    is_packed,
)
from btc_jax.formats import UniformFormat
from btc_jax.packing import quantize_leaf
from btc_jax.policy import BTCPolicyError


class Pair(NamedTuple):
    kernel: Any
    rest: Any


@flax.struct.dataclass
class Layer:
    kernel: Any
    bias: Any


def kernel(seed=0, shape=(64, 80), dtype=jnp.float32):
    return 0.1 * jax.random.normal(jax.random.key(seed), shape, dtype)


TREES = {
    "dict": lambda: {"a": {"kernel": kernel(), "bias": jnp.zeros(80)}},
    "list": lambda: [{"kernel": kernel()}, {"kernel": kernel(1)}, jnp.ones(3)],
    "tuple": lambda: ({"kernel": kernel(dtype=jnp.bfloat16)}, None, jnp.int32(3)),
    "namedtuple": lambda: Pair(kernel(), {"step": jnp.int32(1), "key": jax.random.key(0)}),
    "dataclass": lambda: {"layer": Layer(kernel(dtype=jnp.float16), jnp.zeros(80))},
    "numpy": lambda: {"kernel": np.asarray(kernel()), "name": "a model", "rate": 0.1},
    "linen": lambda: nn.Dense(80).init(jax.random.key(0), jnp.ones((1, 64))),
    "linen boxed": lambda: nn.Dense(
        80, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    ).init(jax.random.key(0), jnp.ones((1, 64))),
    "nnx state": lambda: nnx.state(nnx.Linear(64, 80, rngs=nnx.Rngs(0))),
    "nnx module": lambda: nnx.Linear(64, 80, rngs=nnx.Rngs(0)),
}


@pytest.fixture(params=TREES)
def tree(request):
    return TREES[request.param]()


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]


def test_round_trip_keeps_structure_shapes_and_dtypes(tree):
    decoded = btc_dequantize(btc_quantize(tree))
    assert jax.tree.structure(decoded) == jax.tree.structure(tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays(decoded), arrays(tree))


def test_memory_is_what_plan_and_report_say(tree):
    packed = btc_quantize(tree)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(packed) if hasattr(leaf, "nbytes"))
    plan = btc_plan(tree, measure=True)
    assert stored == plan.bytes_min == plan.bytes_max == btc_metrics(tree, packed).bytes_after
    assert stored < 0.6 * plan.bytes_before
    bounds = btc_plan(tree)
    assert bounds.bytes_min <= stored <= bounds.bytes_max


def test_reconstruct_under_jit_is_quantize_and_decode(tree):
    if any(not isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(tree)):
        return  # jit takes no strings
    traced = jax.jit(btc_reconstruct)(tree)
    for leaf, expected in zip(arrays(traced), arrays(btc_dequantize(btc_quantize(tree))), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_allclose(leaf.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-6, atol=1e-7)


def test_packing_again_changes_nothing(tree):
    once = btc_quantize(tree)
    twice = btc_quantize(once, Uniform(32))
    for a, b in zip(jax.tree.leaves(once, is_leaf=is_packed), jax.tree.leaves(twice, is_leaf=is_packed), strict=True):
        assert a is b


def test_dense_leaves_are_the_same_objects():
    tree = {"kernel": kernel(), "bias": jnp.zeros(80), "note": "text"}
    packed = btc_quantize(tree)
    assert packed["bias"] is tree["bias"]
    assert packed["note"] is tree["note"]
    assert not is_packed(tree["kernel"])


def test_rules_give_each_leaf_its_codec_and_order():
    tree = {"a": {"kernel": kernel()}, "b": {"kernel": kernel()}, "table": {"embedding": kernel()}}
    rules = (Rule("a/*", None), Rule("re:b/.*", Uniform(32, 2, 4), "stored"))
    packed = btc_quantize(tree, policy=Policy(Uniform(128), rules))
    assert not is_packed(packed["a"]["kernel"])
    assert (packed["b"]["kernel"].format, packed["b"]["kernel"].order) == (UniformFormat(32, (2, 4)), "stored")
    assert (packed["table"]["embedding"].format, packed["table"]["embedding"].order) == (UniformFormat(128), "stored")


def test_decodes_in_another_dtype():
    decoded = btc_dequantize(btc_quantize({"kernel": kernel(), "bias": jnp.zeros(3)}), jnp.bfloat16)
    assert decoded["kernel"].dtype == jnp.bfloat16
    assert decoded["bias"].dtype == jnp.float32


def test_empty_tree():
    with pytest.raises(ValueError, match=r"the tree is empty; pass .*params"):
        btc_quantize({})


def test_nothing_to_quantize():
    tree = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "step": jnp.int32(0)}
    with pytest.raises(BTCPolicyError, match=r"all 3 stay dense .*1 x would not become smaller.*Policy\(.*btc_plan"):
        btc_quantize(tree)


def test_two_leaves_with_one_path():
    with pytest.raises(ValueError, match=r"two leaves have the path 'a/kernel'"):
        btc_quantize({"a": {"kernel": kernel()}, "a/kernel": kernel()})


def test_both_codec_and_policy():
    with pytest.raises(BTCPolicyError, match="both codec and policy"):
        btc_quantize({"kernel": kernel()}, Uniform(), policy=Policy())


def test_not_finite_names_the_path():
    tree = {"layer_1": {"kernel": kernel().at[3, 4].set(jnp.nan).at[5, 5].set(jnp.inf)}}
    with pytest.raises(ValueError, match=r"^layer_1/kernel: 2 of 5120 weights are NaN or infinite"):
        btc_quantize(tree)


def test_under_jit():
    with pytest.raises(TypeError, match=r"^kernel is traced.*btc_reconstruct"):
        jax.jit(btc_quantize)({"kernel": kernel()})


def test_without_values():
    with pytest.raises(TypeError, match=r"^kernel is a ShapeDtypeStruct.*btc_plan"):
        btc_quantize({"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)})


def test_float64_leaves_under_x64():
    with jax.enable_x64(True):
        tree = {"kernel": np.asarray(kernel(), np.float64)}
        decoded = btc_dequantize(btc_quantize(tree))
        assert decoded["kernel"].dtype == jnp.float64
        np.testing.assert_allclose(decoded["kernel"], tree["kernel"], atol=0.03)


def test_plain_dataclasses_registered_by_users():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Mine:
        kernel: Any
        bias: Any

    packed = btc_quantize(Mine(kernel(), jnp.zeros(3)))
    assert is_packed(packed.kernel)
    assert isinstance(btc_dequantize(packed), Mine)


def test_progress_is_no_noise_where_there_is_no_terminal(capfd):
    btc_quantize({"kernel": kernel()}, progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "use",
    [
        lambda w: btc_quantize({"kernel": w}, bits=4.5),
        lambda w: btc_quantize({"kernel": w}),
        lambda w: btc_allocate({"kernel": w}, bits=4.5),
        lambda w: quantize_leaf(w, Uniform(), path="kernel"),
        lambda w: btc_reconstruct({"kernel": w}, Multilevel()),
    ],
)
def test_values_that_a_traced_function_closes_over_are_not_read_on_the_host(use):
    w = jnp.ones((64, 64))
    with pytest.raises(TypeError, match=r"^kernel is .*(btc_reconstruct|btc_allocate)"):
        jax.jit(lambda x: (use(w), x))(1.0)
    assert use(w) is not None


def test_metrics_are_not_measured_while_a_function_is_traced():
    params = {"kernel": jnp.ones((64, 64))}
    packed = btc_quantize(params)
    with pytest.raises(TypeError, match=r"while jax\.jit"):
        jax.jit(lambda x: (btc_metrics(params, packed), x))(1.0)


def test_a_target_for_a_tree_that_is_packed_is_refused():
    packed = btc_quantize({"kernel": jnp.ones((64, 64))})
    with pytest.raises(ValueError, match=r"^bits .*packed already.*btc_dequantize"):
        btc_quantize(packed, bits=8)
    assert btc_quantize(packed)["kernel"] is packed["kernel"]


ONE_WIDTH = [
    Multilevel(width=4),
    Multilevel(width=0),
    Multilevel(64, width=7),
    Uniform(threshold=math.inf),
    Uniform(32, threshold=0),
]


@pytest.mark.parametrize("codec", ONE_WIDTH, ids=repr)
@pytest.mark.parametrize("shape", [(100, 70), (3, 3, 8, 16), (1, 2), (0, 4)])
def test_a_codec_of_one_width_packs_under_jit(codec, shape):
    tree = {"kernel": jax.random.normal(jax.random.key(0), shape), "bias": jnp.ones(3)}
    policy = Policy(codec, rules=(Rule("kernel"),), min_size=0) if 0 not in shape else Policy(codec, rules=(Rule("*"),))
    expected, function = btc_quantize(tree, policy=policy), lambda tree: btc_quantize(tree, policy=policy)
    for packed in (jax.jit(function)(tree), jax.eval_shape(function, tree)):
        assert jax.tree.structure(packed) == jax.tree.structure(expected)
        found, wanted = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), t) for t in (packed, expected))
        assert jax.tree.leaves(found) == jax.tree.leaves(wanted)
    decoded, wanted = (btc_dequantize(t) for t in (jax.jit(function)(tree), expected))
    for found, exact in zip(arrays(decoded), arrays(wanted), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


def test_stacks_of_one_width_pack_under_jit():
    policy = Policy(Multilevel(width=4), rules=(Rule("*", stack=0),))
    tree = {"kernel": jax.random.normal(jax.random.key(1), (3, 64, 64)).astype(jnp.bfloat16)}
    packed = jax.jit(lambda tree: btc_quantize(tree, policy=policy))(tree)
    assert packed["kernel"].pieces == (3, 1, 1)
    expected = btc_quantize(tree, policy=policy)["kernel"]
    np.testing.assert_allclose(packed["kernel"][1].astype(float), expected[1].astype(float), rtol=0.01, atol=1e-5)


def test_weights_that_do_not_fit_decode_to_nan_under_jit():
    def total(tree):
        return btc_quantize(tree, Multilevel(width=4))["kernel"].sum()

    infinite = {"kernel": jnp.full((64, 64), jnp.inf)}
    assert jnp.isnan(jax.jit(total)(infinite))
    with pytest.raises(TypeError, match="NaN, infinite or too large for its header"):
        jax.block_until_ready(jax.jit(lambda tree: btc_quantize(tree, Multilevel(width=4)))(infinite))["kernel"].sum()


def test_a_target_is_not_for_jit():
    with pytest.raises(TypeError, match=r"kernel is traced.*a codec of one width"):
        jax.jit(lambda tree: btc_quantize(tree, bits=4.5))({"bias": jnp.ones(3), "kernel": jnp.ones((64, 64))})
