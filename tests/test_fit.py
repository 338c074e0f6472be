"""Trees packed like another: equal structures and shapes, so that compiled functions are shared."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import btc_jax
from btc_jax import Multilevel, Policy, Rule, Uniform, btc_metrics, btc_quantize, is_packed, load, save
from btc_jax.packing import quantize_leaf

TARGETS = {
    "bits": {"bits": 4.5},
    "few bits": {"bits": 1.5},
    "paper": {"codec": Uniform(threshold=0.98)},
    "auto": {"codec": Uniform(32, threshold="auto")},
    "one width": {"codec": Multilevel(width=4)},
    "one width a leaf": {"codec": Multilevel(width="leaf"), "bits": 4},
}


def params(seed, scale=1.0) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"a": (128, 96), "b": (3, 3, 16, 32), "c": (70, 61)}
    tree = {path: {"kernel": scale * rng.standard_normal(shape).astype(np.float32)} for path, shape in shapes.items()}
    return tree | {"bias": np.ones(3, np.float32)}


def packed_pair(target):
    model = btc_quantize(params(0), room=0.01, **TARGETS[target])
    return model, btc_quantize(params(1, 0.7), like=model)


def shapes_of(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("target", TARGETS)
def test_sisters_share_structure_shapes_and_bits(target):
    model, sister = packed_pair(target)
    assert jax.tree.structure(model) == jax.tree.structure(sister)
    assert shapes_of(model) == shapes_of(sister)
    first, second = (
        btc_metrics(params(seed, scale), tree).total for seed, scale, tree in ((0, 1.0, model), (1, 0.7, sister))
    )
    assert first.effective_bits == second.effective_bits
    assert second.sqnr_db > first.sqnr_db - 0.5


@pytest.mark.parametrize("target", TARGETS)
def test_one_trace_serves_all(target):
    model, sister = packed_pair(target)
    traces = []

    @jax.jit
    def f(tree):
        traces.append(tree)
        return btc_jax.btc_dequantize(tree)

    for tree in (model, sister):
        for path in "abc":
            assert np.array_equal(f(tree)[path]["kernel"], tree[path]["kernel"].dequantize())
    assert len(traces) == 1


@pytest.mark.parametrize("target", ["bits", "paper", "one width"])
def test_closed_over_mapped_and_scanned(target):
    model, sister = ((tree["a"]["kernel"]) for tree in packed_pair(target))
    expected, x = [leaf.dequantize() for leaf in (model, sister)], jnp.ones((2, 128))
    assert np.array_equal(jax.jit(lambda: sister.dequantize())(), expected[1])
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), model, sister)
    assert np.array_equal(jax.vmap(lambda leaf: leaf.dequantize())(stack), jnp.stack(expected))
    _, scanned = jax.lax.scan(lambda carry, leaf: (carry, carry @ leaf.dequantize()), x, stack)
    for found, weights in zip(scanned, expected, strict=True):
        np.testing.assert_allclose(found, x @ weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["bits", "few bits", "paper"])
def test_room_is_counted_in_memory_and_not_in_files(tmp_path, target):
    model, sister = packed_pair(target)
    for name, tree in (("model", model), ("sister", sister)):
        save(tmp_path / name, tree)
    loaded = load(tmp_path / "sister")
    for path in "abc":
        leaf, exact = sister[path]["kernel"], loaded[path]["kernel"]
        assert leaf.nbytes == model[path]["kernel"].nbytes == sum(array.nbytes for array in jax.tree.leaves(leaf))
        assert exact.nbytes <= leaf.nbytes
        assert np.array_equal(exact.dequantize(), leaf.dequantize())
        assert np.array_equal(exact.widths, leaf.widths)
    again = btc_quantize(loaded, like=model)
    assert shapes_of(again) == shapes_of(model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(sister), strict=True):
        assert np.array_equal(a, b)
    save(tmp_path / "again", again)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "sister").read_bytes()


def test_room_is_small_in_large_leaves(tmp_path):
    kernels = [np.random.default_rng(seed).standard_normal((1024, 600)).astype(np.float32) for seed in (0, 1)]
    exact = btc_quantize({"kernel": kernels[0]}, bits=4.5)
    model = btc_quantize({"kernel": kernels[0]}, bits=4.5, room=0.01)
    assert exact["kernel"].nbytes < model["kernel"].nbytes <= 1.01 * exact["kernel"].nbytes
    leaf = btc_quantize({"kernel": kernels[1]}, like=model)["kernel"]
    save(tmp_path / "m", {"kernel": leaf})
    assert leaf.nbytes <= 1.01 * load(tmp_path / "m")["kernel"].nbytes
    kernels[1][:300] = 0
    with pytest.raises(ValueError, match=r"few blocks fit .* room=0\.01"):
        btc_quantize({"kernel": kernels[1]}, like=exact)


def test_a_plane_of_all_blocks_has_room_for_each_in_its_place():
    rng = np.random.default_rng(0)
    loud, quiet = rng.standard_normal((64, 64)).astype(np.float32), np.zeros((64, 64), np.float32)
    quiet[:] = 0.01 * loud
    model = quantize_leaf(loud, Uniform(32, threshold=0.001))
    assert len(model.planes[1]) == model.num_blocks
    partly = quantize_leaf(loud, Uniform(32, threshold=0.85))
    assert 0.8 * 128 < (np.asarray(partly.widths) == 8).sum() < partly.num_blocks
    for leaf in (quiet, partly):
        packed = btc_quantize({"kernel": leaf}, like={"kernel": model})["kernel"]
        assert packed.planes[1].shape == model.planes[1].shape
        assert np.array_equal(packed.dequantize(), jax.jit(lambda leaf: leaf.dequantize())(packed))
    assert np.array_equal(packed.dequantize(), partly.dequantize())


def test_models_run_without_another_trace():
    dense = nn.Dense(48)
    x, traces = jnp.ones((2, 128)), []
    variables = [dense.init(jax.random.key(seed), x) for seed in (0, 1)]
    model = btc_quantize(variables[0], bits=4.5)

    @jax.jit
    def apply(variables):
        traces.append(variables)
        return dense.apply(variables, x)

    for tree in (model, btc_quantize(variables[1], like=model)):
        np.testing.assert_allclose(apply(tree), np.asarray(dense.apply(tree, x)), rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_states_of_nnx():
    states = [nnx.state(nnx.Linear(128, 48, rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    model = btc_quantize(states[0], bits=4.5)
    sister = btc_quantize(states[1], like=model)
    assert jax.tree.structure(model) == jax.tree.structure(sister)
    assert shapes_of(model) == shapes_of(sister)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    kernels = [jax.random.normal(jax.random.key(seed), (128, 64)) for seed in (0, 1)]
    placed = [jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("x"))) for kernel in kernels]
    model = btc_quantize({"kernel": placed[0]}, bits=4.5)
    with jax.set_mesh(mesh):
        leaf = btc_quantize({"kernel": placed[1]}, like=model)["kernel"]
    assert leaf.planes[0].sharding.spec == PartitionSpec("x")
    assert [plane.shape for plane in leaf.planes] == [plane.shape for plane in model["kernel"].planes]
    policy = Policy(rules=(Rule("kernel", pieces=(8, 1)),))
    whole = btc_quantize({"kernel": kernels[0]}, policy=policy, bits=4.5)
    alone = btc_quantize({"kernel": kernels[1]}, like=whole)["kernel"]
    roomy = btc_quantize({"kernel": placed[0]}, bits=4.5, room=0.02)["kernel"]
    assert roomy.nbytes >= model["kernel"].nbytes
    assert np.array_equal(roomy.dequantize(), model["kernel"].dequantize())
    assert np.array_equal(leaf.dequantize(), alone.dequantize())


def test_tied_leaves_stay_one():
    kernel = params(1)["a"]["kernel"]
    one = quantize_leaf(params(0)["a"]["kernel"], Multilevel())
    model = {"a": one, "b": one}
    packed = btc_quantize({"a": kernel, "b": kernel}, like=model)
    assert packed["a"] is packed["b"]


@pytest.mark.parametrize("room", [-0.01, 0.2, float("nan")])
def test_room_that_is_none(room):
    with pytest.raises(ValueError, match=r"room is .*from 0 to 0\.1"):
        btc_quantize(params(0), room=room)


def test_dense_leaves_of_the_model_stay_dense():
    model, sister = (btc_quantize(params(0), bits=4.5), params(1))
    sister = btc_quantize(sister, like=model)
    assert not is_packed(model["bias"])
    assert np.array_equal(sister["bias"], np.ones(3))


@pytest.mark.parametrize(
    ("tree", "more", "message"),
    [
        ({"kernel": np.ones((64, 65), np.float32)}, {}, r"kernel is float32\[64, 65\], and .* float32\[64, 64\]"),
        ({"kernel": jnp.ones((64, 64), jnp.bfloat16)}, {}, r"kernel is bfloat16\[64, 64\]"),
        ({"other": np.ones((64, 64), np.float32)}, {}, "'kernel' is in only one"),
        ({"kernel": np.full((64, 64), np.nan, np.float32)}, {}, "kernel: 4096 of 4096 weights are NaN"),
        ({"kernel": np.ones((64, 64), np.float32)}, {"bits": 4}, "like and bits are given"),
        ({"kernel": np.ones((64, 64), np.float32)}, {"room": 0.01}, "like and room are given"),
        ({"kernel": np.ones((64, 64), np.float32)}, {"policy": Policy()}, "like and policy are given"),
        ({"kernel": np.ones((64, 64), np.float32)}, {"codec": Uniform()}, "like and codec are given"),
    ],
)
def test_what_cannot_be_packed_like_another(tree, more, message):
    model = btc_quantize({"kernel": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}, bits=4)
    with pytest.raises(ValueError, match=message):
        btc_quantize(tree, like=model, **more)


def test_packed_leaves_that_have_no_room():
    leaf = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    few, many = (btc_quantize({"kernel": leaf}, bits=bits) for bits in (3, 5))
    with pytest.raises(ValueError, match=r"kernel has \[.*\] rows in its planes, more than the \[.*\] of the leaf"):
        btc_quantize(many, like=few)
    with pytest.raises(ValueError, match="kernel is packed as UniformFormat"):
        btc_quantize(btc_quantize({"kernel": leaf}), like=few)
    with pytest.raises(TypeError, match="kernel is read on the host"):
        jax.jit(lambda x: btc_quantize({"kernel": leaf}, like=few)["kernel"].dequantize() * x)(1.0)
    with pytest.raises(TypeError, match="kernel is read on the host"):
        jax.jit(lambda x: btc_quantize({"kernel": x}, like=few)["kernel"].dequantize())(leaf)
