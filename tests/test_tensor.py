import copy
import dataclasses
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from btc_jax import BTCTensor, Multilevel, Uniform, btc_reconstruct, coding, is_packed
from btc_jax.packing import quantize_leaf


def packed(shape=(16, 40), codec=None, order: Any = "output-major", dtype: Any = np.float32):
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal(shape) * rng.choice([0.02, 0.2], shape[-1:])
    return quantize_leaf(leaf.astype(dtype), codec or Uniform(32), order)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(16, 40), (3, 3, 5, 7), (1,), (), (0, 8), (33,)])
def test_looks_like_its_leaf(shape, dtype):
    leaf = jnp.linspace(-0.2, 0.2, int(np.prod(shape))).reshape(shape).astype(dtype)
    tensor = quantize_leaf(leaf, Uniform(32))
    decoded = tensor.dequantize()
    chex.assert_equal_shape_prefix([leaf, decoded], leaf.ndim)
    assert (tensor.shape, tensor.dtype, tensor.ndim, tensor.size) == (leaf.shape, leaf.dtype, leaf.ndim, leaf.size)
    assert decoded.dtype == leaf.dtype
    assert tensor.dequantize(jnp.float32).dtype == jnp.float32
    assert tensor.nbytes == sum(array.nbytes for array in jax.tree.leaves(tensor))


@pytest.mark.parametrize("codec", [Uniform(32), Uniform(7, 3, 5), Uniform(64, threshold=0.0)])
@pytest.mark.parametrize("order", ["output-major", "stored"])
def test_reconstruct_equals_pack_and_unpack(codec, order):
    leaf = packed((6, 50), codec, order).dequantize() * 0.9
    tensor = quantize_leaf(leaf, codec, order)
    np.testing.assert_allclose(
        coding.reconstruct(leaf, coding.Recipe(codec, codec.formats[0], order)),
        tensor.dequantize(),
        rtol=1e-6,
        atol=1e-8,
    )


def test_packing_what_was_unpacked_changes_nothing_more():
    once = packed().dequantize()
    twice = quantize_leaf(once, Uniform(32)).dequantize()
    np.testing.assert_allclose(twice, once, rtol=0, atol=2e-3)


def test_passes_through_jax():
    tensor = packed()
    decoded = tensor.dequantize()
    assert np.array_equal(jax.jit(lambda t: t.dequantize())(tensor), decoded)
    assert np.array_equal(jax.jit(lambda t: t)(tensor).dequantize(), decoded)
    assert np.array_equal(jax.device_put(tensor, jax.devices()[3]).dequantize(), decoded)
    assert isinstance(jax.eval_shape(lambda t: t, tensor), BTCTensor)
    assert jax.eval_shape(lambda t: t, tensor).nbytes == tensor.nbytes
    assert jax.tree.map(np.shape, tensor).shape == tensor.shape
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), tensor, tensor)
    assert np.array_equal(jax.vmap(lambda t: t.dequantize(), in_axes=0)(stacked)[1], decoded)
    assert np.array_equal(copy.deepcopy(tensor).dequantize(), decoded)
    assert np.array_equal(pickle.loads(pickle.dumps(tensor)).dequantize(), decoded)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x")])
def test_packs_sharded_leaves(axis_type, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    leaf = packed((64, 40)).dequantize()
    sharded = jax.device_put(leaf, NamedSharding(mesh, spec))
    tensor = quantize_leaf(sharded, Uniform(32))
    assert all(array.sharding.device_set == sharded.sharding.device_set for array in jax.tree.leaves(tensor))
    assert np.array_equal(tensor.dequantize(), quantize_leaf(leaf, Uniform(32)).dequantize())


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w,
        lambda w, x: w.T @ x.T,
        lambda w, x: jnp.dot(x, w),
        lambda w, x: jnp.asarray(w)[3],
        lambda w, x: w[2:5, ::2],
        lambda w, x: 2.0 * w + w / 3.0 - w * w,
        lambda w, x: 1.0 - (-w),
        lambda w, x: abs(w) ** 2.0,
        lambda w, x: w.astype(jnp.bfloat16),
        lambda w, x: w.reshape(-1).sum(),
        lambda w, x: np.asarray(x) @ w,
        lambda w, x: np.asarray(w),
        lambda w, x: len(w),
    ],
)
def test_calculates_as_its_array_would(use):
    tensor, x = packed(), jnp.ones((3, 16))
    np.testing.assert_allclose(use(tensor, x), use(tensor.dequantize(), x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda q: optax.adam(1e-3).init(q),
        lambda q: jax.jit(optax.adam(1e-3).init)(q),
        lambda q: optax.sgd(1e-3, momentum=0.9).init(q),
        lambda q: jax.tree.map(jnp.zeros_like, q),
        lambda q: jax.tree.map(np.zeros_like, q),
    ],
)
@pytest.mark.parametrize("codec", [Uniform(32), Uniform(32, threshold=0.0), Uniform(32, header_dtype="float32")])
def test_optimizer_states_are_refused(make, codec):
    for leaf in (packed(codec=codec), quantize_leaf(np.zeros((8, 8), np.float32), codec)):
        with pytest.raises(TypeError, match=r"zeros, as the init of an optimizer.*training\.md"):
            make({"kernel": leaf})


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.astype(jnp.bfloat16),
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    ],
)
def test_casting_leaves_is_refused(cast):
    with pytest.raises(TypeError, match=r"\(16, 40\).*bfloat16\[.*btc_dequantize"):
        jax.tree.map(cast, {"kernel": packed()})


def test_gradients_are_refused():
    def loss(params):
        return jnp.sum(params["kernel"].dequantize() ** 2 * params["scale"])

    params = {"kernel": packed(), "scale": jnp.float32(2)}
    with pytest.raises(TypeError, match=r"grad requires real- or complex-valued inputs.*uint32"):
        jax.grad(loss)(params)
    with pytest.raises(TypeError, match=r"640 packed weights.*docs/training.md.*btc_reconstruct"):
        jax.grad(loss, allow_int=True)(params)
    minimum = params["kernel"].header["minimum"]
    with pytest.raises(TypeError, match="640 packed weights"):
        jax.jvp(lambda m: loss({**params, "kernel": with_minimum(params["kernel"], m)}), (minimum,), (minimum,))
    dense_only = jax.grad(lambda scale: loss({**params, "scale": scale}))(params["scale"])
    np.testing.assert_allclose(dense_only, jnp.sum(params["kernel"].dequantize() ** 2), rtol=1e-6)


def with_minimum(tensor, minimum):
    header = {**tensor.header, "minimum": minimum}
    return dataclasses.replace(tensor, header=header)


def test_the_gradient_of_reconstruct_passes_straight_through():
    params = {"kernel": packed((64, 64)).dequantize()}

    def loss(p):
        return jnp.sum(jnp.sin(btc_reconstruct(p)["kernel"]))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    decoded = btc_reconstruct(params)["kernel"]
    np.testing.assert_allclose(value, jnp.sum(jnp.sin(decoded)), rtol=1e-5)
    np.testing.assert_allclose(gradient["kernel"], jnp.cos(decoded), rtol=1e-5)


def test_iterates_over_rows():
    tensor = packed()
    assert np.array_equal(list(tensor), tensor.dequantize())


def test_slicing_by_vmap_is_refused():
    with pytest.raises(ValueError, match=r"seal of type float16\[2\]"):  # by JAX: no array in a leaf has its first axis
        jax.vmap(lambda t: t.dequantize())(packed((64, 64), Uniform(64, threshold=0.0)))


def test_placeholders_have_a_repr():
    assert "bits=unknown" in repr(jax.tree.map(lambda _: True, packed()))


@pytest.mark.parametrize("leaf", [np.arange(8), np.ones(8, bool), np.ones(8, np.complex64)])
def test_what_is_not_floating_is_refused(leaf):
    with pytest.raises(TypeError, match=r"^here is .*only floating"):
        quantize_leaf(leaf, Uniform(4), path="here")


def test_a_traced_leaf_is_refused():
    with pytest.raises(TypeError, match="leaf is traced"):
        jax.jit(lambda x: quantize_leaf(x, Uniform(4)).dequantize())(jnp.ones(8))


def test_a_packed_leaf_stays_as_it_is():
    tensor = packed()
    assert quantize_leaf(tensor, Uniform(64)) is tensor


def test_is_packed_tells_a_packed_leaf():
    assert is_packed(packed())
    assert not is_packed(jnp.ones(3))


@pytest.mark.parametrize("order", ["stored", "stored-taps"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn])
def test_the_largest_weights_of_a_narrow_dtype_stay_finite(dtype, order):
    largest = float(jnp.finfo(dtype).max)
    weights = np.clip(np.random.default_rng(0).standard_normal((32, 16, 3, 3)), -1, 1) * largest
    decoded = quantize_leaf(jnp.asarray(weights, dtype), Multilevel(width=4), order).dequantize()
    assert jnp.abs(decoded.astype(jnp.float32)).max() == largest
    whole = btc_reconstruct({"kernel": jnp.asarray(weights, dtype)}, Multilevel(width=4))["kernel"]
    assert jnp.isfinite(whole.astype(jnp.float32)).all()
