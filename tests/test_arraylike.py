"""A packed leaf behaves like the array that it decodes to, and says what to do where it cannot."""

import operator

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from btc_jax import Uniform, btc_dequantize, btc_quantize, is_packed
from btc_jax.packing import quantize_leaf
from tests.arraylike_support import CODECS as CODECS
from tests.arraylike_support import leaf as leaf

METHODS = {
    "all": ((), {"axis": 0}),
    "any": ((), {"axis": 1, "keepdims": True}),
    "argmax": ((), {"axis": 0}),
    "argmin": ((1,), {}),
    "argpartition": ((3,), {"axis": 0}),
    "argsort": ((), {"axis": -1}),
    "astype": ((), {"dtype": jnp.bfloat16}),
    "clip": ((), {"min": -0.5, "max": 0.5}),
    "compress": ((np.array([True, False]),), {"axis": 0, "size": 1}),
    "conj": ((), {}),
    "conjugate": ((), {}),
    "copy": ((), {}),
    "cumprod": ((), {"axis": 0}),
    "cumsum": ((), {"axis": 1, "dtype": jnp.float32}),
    "diagonal": ((), {"offset": 1}),
    "dot": ((jnp.ones((16, 2)),), {}),
    "flatten": ((), {}),
    "max": ((), {"axis": 0, "initial": 0.0}),
    "mean": ((), {"axis": (0, 1), "keepdims": True}),
    "min": ((), {"axis": 0}),
    "nonzero": ((), {"size": 3}),
    "prod": ((), {"axis": 1}),
    "ptp": ((), {"axis": 0}),
    "ravel": ((), {}),
    "repeat": ((2,), {"axis": 1}),
    "reshape": ((-1, 8), {}),
    "round": ((), {"decimals": 1}),
    "sort": ((), {"axis": 0}),
    "squeeze": ((), {}),
    "std": ((), {"axis": 0, "ddof": 1}),
    "sum": ((), {"axis": 0, "keepdims": True}),
    "swapaxes": ((), {"axis1": 0, "axis2": 1}),
    "take": ((jnp.array([1, 2]),), {"axis": 0}),
    "trace": ((), {}),
    "transpose": ((1, 0), {}),
    "var": ((), {"axis": 0}),
    "view": ((), {"dtype": jnp.uint32}),
}


ATTRIBUTES = [
    "T",
    "mT",
    "real",
    "imag",
    "shape",
    "dtype",
    "ndim",
    "size",
    "itemsize",
    "sharding",
    "committed",
    "device",
]


NOT_TRIED = {
    *("addressable_data", "addressable_shards", "at", "byteswap", "choose", "copy_to_host_async", "devices"),
    *("flat", "global_shards", "is_fully_addressable", "is_fully_replicated", "item", "nbytes", "searchsorted"),
    "to_device",
}


def test_every_public_attribute_of_arrays_is_there():
    public = {name for name in dir(jax.Array) if not name.startswith("_")}
    assert public <= set(dir(leaf()))
    assert public <= {*METHODS, *ATTRIBUTES, *NOT_TRIED}  # a new one in JAX needs a line above


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", METHODS)
def test_methods_take_what_those_of_arrays_take(name, codec):
    args, keywords = METHODS[name]
    q = leaf(codec)
    found, expected = (getattr(array, name)(*args, **keywords) for array in (q, q.dequantize()))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if codec is CODECS[0]:
        under_jit = jax.jit(lambda q: getattr(q, name)(*args, **keywords))(q)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), under_jit, expected)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_those_of_the_array(name):
    q = leaf()
    found, expected = getattr(q, name), getattr(q.dequantize(), name)
    assert np.array_equal(found, expected) if isinstance(expected, jax.Array) else found == expected


BINARY = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, divmod),
]


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
def test_operators_calculate_with_the_weights(function):
    q, other = leaf(), jnp.full((6, 16), 0.75)
    w = q.dequantize()
    for a, b in ((q, other), (other, q), (q, q), (q, 2.0), (2.0, q)):
        found = function(a, b)
        expected = function(*(w if x is q else x for x in (a, b)))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_matrix_products_and_unary_operators():
    q = leaf()
    w = q.dequantize()
    np.testing.assert_array_equal(jnp.ones((2, 6)) @ q, jnp.ones((2, 6)) @ w)
    np.testing.assert_array_equal(q @ jnp.ones((16, 2)), w @ jnp.ones((16, 2)))
    for function in (operator.neg, operator.pos, abs, round):
        np.testing.assert_array_equal(function(q), function(w))


def test_equality_is_of_weights_and_a_leaf_is_unhashable():
    a, b = leaf(), leaf()

    assert bool((a == b).all())
    assert not bool((a != b).any())
    assert (a == b).shape == (6, 16)
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_numpy_and_jnp_functions():
    q = leaf()
    w = np.asarray(q.dequantize())
    assert np.mean(q) == jnp.mean(q.dequantize())
    assert np.array_equal(np.sum(q, axis=0), jnp.sum(q.dequantize(), axis=0))
    assert np.array_equal(jnp.reshape(q, -1), w.reshape(-1))
    assert np.array_equal(jnp.concatenate([q, q]), np.concatenate([w, w]))
    assert np.array_equal(jnp.where(jnp.ones((6, 16), bool), q, 0.0), w)
    assert np.array_equal(np.array(q, dtype=np.float64), w.astype(np.float64))
    assert np.array_equal(np.array(q, copy=None), w)
    assert np.array_equal(np.array(q, copy=True), w)
    assert type(np.array(q, copy=False)) is type(np.array(q.dequantize(), copy=False)) is np.ndarray


def test_numbers():
    q = quantize_leaf(np.float32(0.5), Uniform(4))
    assert (float(q), complex(q), q.item(), bool(q), f"{float(q):.1f}") == (0.5, 0.5, 0.5, True, "0.5")
    with pytest.raises(TypeError, match="integer"):
        operator.index(q)


def test_what_a_shape_answers_is_not_decoded(monkeypatch):
    q = leaf()
    scalar = quantize_leaf(np.float32(0.5), Uniform(4))
    monkeypatch.setattr(type(q), "dequantize", lambda *_: pytest.fail("decoded"))
    assert (len(q), q.ndim, q.size, q.itemsize, q.shape, np.shape(q), np.ndim(q)) == (6, 2, 96, 4, (6, 16), (6, 16), 2)
    assert jnp.shape(q) == (6, 16)
    assert q.devices() == {jax.devices()[0]}
    with pytest.raises(ValueError, match=r"\(6, 16\).*any\(\)"):
        bool(q)
    with pytest.raises(TypeError, match="without axes"):
        len(scalar)


def test_assignment_is_refused_as_for_arrays():
    with pytest.raises(TypeError, match="immutable"):
        leaf()[0] = 1.0
    assert leaf().at[0].set(0.0)[0].sum() == 0


class WeightStandardized(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (64, 64)))

    def __call__(self, x):
        k = self.kernel
        return x @ ((k - k.mean(axis=0, keepdims=True)) / k.std(axis=0, keepdims=True))


@pytest.mark.parametrize("target", [{}, {"bits": 4.5}])
def test_a_layer_that_standardizes_its_weights(target):
    graphdef, state = nnx.split(WeightStandardized(nnx.Rngs(0)))
    packed = btc_quantize(state, **target)
    x = jnp.ones((2, 64))
    found, expected = (nnx.merge(graphdef, tree)(x) for tree in (packed, btc_dequantize(packed)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


LAX = {
    "dot": lambda q: lax.dot(jnp.ones((2, 6)), q),
    "add": lambda q: lax.add(q, q),
    "transpose": lambda q: lax.transpose(q, (1, 0)),
    "exp": lambda q: lax.exp(q),
    "conv": lambda q: lax.conv_general_dilated(jnp.ones((1, 16, 9)), q[:, :, None], (1,), "SAME"),
    "gather": lambda q: lax.dynamic_slice(q, (1, 2), (3, 4)),
    "scan over rows": lambda q: lax.scan(lambda c, x: (c + x, None), jnp.zeros(16), q[...])[0],
}


@pytest.mark.parametrize("name", LAX)
def test_functions_of_lax(name):
    function, q = LAX[name], leaf(CODECS[1])
    expected = function(q.dequantize())
    for found in (function(q), jax.jit(function)(q), jax.jit(lambda: function(q))()):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_layers_that_call_lax(codec):
    x = jnp.ones((3, 8, 8))
    conv = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0))
    kernel = quantize_leaf(conv.weight, codec, order="stored")
    packed = eqx.tree_at(lambda layer: layer.weight, conv, kernel, is_leaf=is_packed)
    for found in (packed(x), eqx.filter_jit(packed)(x), jax.jit(lambda x: packed(x))(x)):
        np.testing.assert_allclose(found, btc_dequantize(packed)(x), rtol=1e-5, atol=1e-6)
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2D(8, 3)(x)))
    x = jnp.ones((1, 8, 8, 3))
    params = net.init(jax.random.key(0), x)
    params = {"conv2_d": {**params["conv2_d"], "w": quantize_leaf(params["conv2_d"]["w"], codec)}}
    for found in (net.apply(params, x), jax.jit(net.apply)(params, x), jax.jit(lambda x: net.apply(params, x))(x)):
        np.testing.assert_allclose(found, net.apply(btc_dequantize(params), x), rtol=1e-5, atol=1e-6)
