import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import Multilevel, Policy, Rule, Uniform, btc_metrics, btc_plan, btc_quantize
from btc_jax.codecs import codec_from_json
from btc_jax.formats import UniformFormat
from btc_jax.seal import SEAL
from tests import oracle


def weights(shape, seed=0, dtype=np.float32):
    """Weights in smooth and rough runs, so that about half of the blocks are wide."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    spread = np.repeat(rng.choice([0.01, 0.2], size // 64 + 1), 64)[:size]
    output_major = (rng.standard_normal(size) * spread).reshape(shape[-1], shape[-2], *shape[:-2])
    return np.moveaxis(np.moveaxis(output_major, 1, -1), 0, -1).astype(dtype)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def all_leaves(codec, **fields):
    return Policy(codec, names=("*",), min_size=0, **fields)


def expected_bytes(size, codec, wide, flags=True):
    """Bytes of a leaf with `wide` blocks of 8 bits and the others of 4."""
    blocks = -(-size // codec.block_size)
    half_row = (codec.block_size + 1) // 2
    extremes = 2 * np.dtype(codec.header_dtype).itemsize
    return (blocks + wide) * half_row + blocks * extremes + (-(-blocks // 8) if flags else 0) + SEAL.nbytes


def wide_blocks(leaf, codec):
    return sum(b[0] == 8 for b in oracle.quantize(oracle.output_major(leaf), codec.block_size))


def stored_bytes(tree):
    """Bytes of all arrays of a tree, from jax rather than the package."""
    return sum(np.asarray(array).nbytes for array in jax.tree.leaves(tree))


@pytest.mark.parametrize("block_size", [2, 7, 32, 33, 64, 100, 256])
@pytest.mark.parametrize("size", [1, 31, 64, 4096, 4097])
@pytest.mark.parametrize("header_dtype", ["float16", "float32"])
def test_range_is_that_of_all_blocks_narrow_and_all_wide(size, block_size, header_dtype):
    codec = Uniform(block_size, header_dtype=header_dtype)
    (row,) = btc_plan(jax.ShapeDtypeStruct((size, 1), jnp.bfloat16), policy=all_leaves(codec)).rows
    assert row.bytes_before == 2 * size
    assert row.bytes_min == expected_bytes(size, codec, 0)
    assert row.bytes_max == expected_bytes(size, codec, -(-size // block_size))


@pytest.mark.parametrize(
    ("shape", "codec"),
    [
        ((40, 48), Uniform(32)),
        ((40, 48), Uniform(33)),
        ((3, 3, 11, 13), Uniform(64)),
        ((41, 43), Uniform(101)),
        ((41, 43), Uniform(256, header_dtype="float32")),
        ((5, 3), Uniform(64)),
    ],
)
def test_measured_plan_is_exact_to_the_byte(shape, codec):
    leaf = weights(shape)
    wide = wide_blocks(leaf, codec)
    policy = all_leaves(codec)
    plan, measured = btc_plan(leaf, policy=policy), btc_plan(leaf, policy=policy, measure=True)
    stored = stored_bytes(btc_quantize(leaf, policy=policy))
    assert measured.bytes_min == measured.bytes_max == stored == expected_bytes(leaf.size, codec, wide)
    assert plan.bytes_min <= stored <= plan.bytes_max


def test_measured_plan_metrics_and_tree_agree_on_the_bytes():
    tree = {
        "a": {"kernel": weights((40, 48)), "bias": np.zeros(7, np.float32)},
        "embedding": weights((33, 50), 1, jnp.bfloat16),
        "steps": np.arange(5, dtype=np.int32),
    }
    policy = all_leaves(Uniform(64), rules=(Rule("embedding", Uniform(31)),))
    quantized = btc_quantize(tree, policy=policy)
    metrics = btc_metrics(tree, quantized, policy=policy)
    plan = btc_plan(tree, policy=policy, measure=True)
    assert plan.bytes_min == plan.bytes_max == metrics.bytes_after == stored_bytes(quantized)
    assert plan.bytes_before == metrics.bytes_before == stored_bytes(tree)
    assert [row.bytes_min for row in plan.rows] == [leaf.bytes_after for leaf in metrics.leaves]


@pytest.mark.parametrize(("threshold", "wide"), [(0.0, 60), (math.inf, 0)])
def test_one_width_needs_no_measuring(threshold, wide):
    leaf, codec = weights((40, 48)), Uniform(32, threshold=threshold)
    plan = btc_plan(shapes_of(leaf), policy=all_leaves(codec))
    assert plan.bytes_min == plan.bytes_max == expected_bytes(leaf.size, codec, wide, flags=False)
    assert plan.bytes_min == stored_bytes(btc_quantize(leaf, policy=all_leaves(codec)))


def test_plan_of_shapes_is_that_of_the_arrays():
    tree = {"kernel": weights((64, 65)), "bias": np.full(7, np.nan), "layers": [np.arange(3), weights((2, 2))]}
    tree = jax.tree.map(jnp.asarray, tree)
    assert btc_plan(jax.eval_shape(lambda: tree)) == btc_plan(tree)


def test_values_are_not_looked_at():
    (row,) = btc_plan({"kernel": np.full((64, 64), np.nan, np.float32)}).rows
    assert (row.reason, row.bytes_min) == ("default", expected_bytes(4096, Uniform(), 0))


def test_rows_describe_every_leaf_in_the_order_of_the_tree():
    tree = {"b": {"kernel": weights((64, 64))}, "a": [np.zeros(3, np.int8), 0.5], "c": np.float64(1)}
    rows = btc_plan(tree).rows
    assert [row.path for row in rows] == ["a/0", "a/1", "b/kernel", "c"]
    assert [row.shape for row in rows] == [(3,), (), (64, 64), ()]
    assert [row.dtype for row in rows] == ["int8", "float", "float32", "float64"]
    assert [row.bytes_before for row in rows] == [3, 0, 16384, 8]
    assert [row.codec for row in rows] == [None, None, Uniform(), None]
    assert all(row.bytes_min == row.bytes_max == row.bytes_before for row in rows if row.codec is None)


def test_packed_leaves_keep_their_bytes_codec_and_order():
    policy = all_leaves(Uniform(32), order="stored")
    packed = btc_quantize({"w": weights((40, 48))}, policy=policy)
    (row,) = btc_plan(packed).rows
    assert row.bytes_before == row.bytes_min == row.bytes_max == stored_bytes(packed)
    assert (row.codec, row.order, row.reason, row.dtype) == (
        UniformFormat(32),
        "stored",
        "already quantized",
        "float32",
    )


def test_leaf_without_weights_takes_no_bytes():
    policy = all_leaves(Uniform())
    (row,) = btc_plan({"w": np.zeros((0, 4), np.float32)}, policy=policy, measure=True).rows
    assert (row.reason, row.bytes_before, row.bytes_min, row.bytes_max) == ("empty", 0, 0, 0)


def test_measuring_shapes_without_values_is_refused():
    tree = {"layer": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}
    with pytest.raises(TypeError, match=r"layer/kernel is a ShapeDtypeStruct.*measure"):
        btc_plan(tree, measure=True)


def test_measuring_leaves_shapes_of_dense_leaves_alone():
    tree = {"kernel": weights((64, 64)), "bias": jax.ShapeDtypeStruct((64,), jnp.float32)}
    plan = btc_plan(tree, measure=True)
    codec = Uniform()
    assert plan.bytes_min == plan.bytes_max == 256 + expected_bytes(4096, codec, wide_blocks(tree["kernel"], codec))


def test_json_holds_all_that_the_plan_holds():
    rules = (Rule("b", Uniform(32, threshold=math.inf), "stored"), Rule("c", None))
    tree = {name: jax.ShapeDtypeStruct((64, 64), jnp.float32) for name in ("a", "b", "c")}
    plan = btc_plan(tree, policy=all_leaves(Uniform(), rules=rules))
    record = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    for name in ("bytes_before", "bytes_min", "bytes_max"):
        assert record[name] == sum(leaf[name] for leaf in record["leaves"]) == getattr(plan, name)
    a, b, c = record["leaves"]
    assert (codec_from_json(a["codec"]), codec_from_json(b["codec"]), c["codec"]) == (Uniform(), rules[0].codec, None)
    assert (b["path"], b["shape"], b["dtype"], b["order"], b["reason"]) == (
        "b",
        [64, 64],
        "float32",
        "stored",
        "rule 1",
    )


# What a target implies without reading the values.


MODEL = {
    "embed": {"embedding": jax.ShapeDtypeStruct((512, 64), jnp.float32)},
    "layers": [
        {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), "bias": jax.ShapeDtypeStruct((64,), jnp.float32)}
    ],
}
WEIGHTS, DENSE = 512 * 64 + 64 * 64, 256


def normal(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), tree)


@pytest.mark.parametrize("bits", [2, 4.5, 6.01])
def test_bits_bound_the_total(bits):
    plan = btc_plan(MODEL, bits=bits)
    assert plan.bytes_max == DENSE + math.floor(bits * WEIGHTS / 8)
    assert plan.bytes_before == 512 * 64 * 4 + 64 * 64 * 2 + DENSE
    exact = btc_plan(normal(MODEL), bits=bits, measure=True)
    assert 0.99 * plan.bytes_max < exact.bytes_max <= plan.bytes_max
    assert (exact.target, exact.note) == (plan.target, "")


def test_size_bounds_the_total():
    plan = btc_plan(MODEL, size="25KB")
    assert plan.bytes_max == 25_000
    assert btc_plan(normal(MODEL), size="25KB", measure=True).bytes_max <= 25_000
    assert btc_plan(MODEL, size="1GB").bytes_max == sum(row.bytes_max for row in plan.rows)


def test_without_a_target_an_adaptive_codec_has_its_usual_one():
    plan = btc_plan(MODEL, Multilevel())
    assert plan.bytes_max == DENSE + math.floor(4.5 * WEIGHTS / 8)
    assert btc_plan(normal(MODEL), Multilevel(), measure=True).bytes_max <= plan.bytes_max


def test_usual_bits_are_for_the_leaves_of_adaptive_codecs_only():
    rules = (Rule("embed/*", Uniform(64)),)
    plan = btc_plan(MODEL, policy=Policy(Multilevel(), rules))
    (embedding,) = [row for row in plan.rows if row.path == "embed/embedding"]
    assert plan.bytes_max == embedding.bytes_max + DENSE + math.floor(4.5 * 64 * 64 / 8)


@pytest.mark.parametrize("target", [{"rmse": 0.002}, {"sqnr_db": 30}])
def test_targets_of_error_leave_the_range(target):
    plan = btc_plan(MODEL, **target)
    assert (plan.limit, plan.note) == (None, "")
    assert plan.bytes_max == sum(row.bytes_max for row in plan.rows)
    assert plan.bytes_min <= btc_plan(normal(MODEL), measure=True, **target).bytes_max <= plan.bytes_max


def test_the_note_and_json_name_the_target():
    plan = btc_plan(MODEL, bits=4.5)
    for part in ("bits of 4.5", f"{plan.bytes_max:,} bytes", f"{plan.bytes_before / plan.bytes_max:.2f} times"):
        assert part in plan.note
    assert json.loads(json.dumps(plan.to_json()))["target"] == {"kind": "bits", "value": 4.5, "named": True}
    assert plan.to_json()["bytes_max"] == plan.bytes_max
    assert "25,000" in btc_plan(MODEL, size=25_000).note
    assert btc_plan(MODEL).to_json()["target"] is None


@pytest.mark.parametrize("target", [{"bits": 0.1}, {"bits": 20}, {"size": 400}])
def test_a_target_out_of_reach_is_refused_as_by_btc_quantize(target):
    with pytest.raises(ValueError, match="cannot be reached") as planned:
        btc_plan(MODEL, **target)
    with pytest.raises(ValueError, match="cannot be reached") as quantized:
        btc_quantize(normal(MODEL), **target)
    if "bits" in target:
        assert str(planned.value) == str(quantized.value)


def test_a_target_that_no_codec_adapts_to_is_refused_as_by_btc_quantize():
    for function, tree in ((btc_plan, MODEL), (btc_quantize, normal(MODEL))):
        with pytest.raises(ValueError, match=r"bits=5 .*no leaf has a codec that adapts.*Multilevel\(\)"):
            function(tree, Uniform(), bits=5)


def test_a_target_for_a_tree_without_matrices():
    assert btc_plan({"bias": jax.ShapeDtypeStruct((64,), jnp.float32)}, bits=4.5).bytes_max == 256
