"""A packed leaf behaves like the array that it decodes to, and says what to do where it cannot."""

import operator
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import checkify

from btc_jax import Multilevel, Uniform, btc_dequantize, btc_quantize, is_packed, seal
from btc_jax.packing import quantize_leaf

CODECS = [Uniform(32, threshold=0.0), Multilevel(slope=0.004)]


def leaf(codec=CODECS[0], shape=(6, 16)) -> Any:  # type checkers know only JAX's arrays
    return quantize_leaf(np.random.default_rng(0).standard_normal(shape).astype(np.float32), codec)


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


# Not delegated.


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: jax.tree.map(lambda a, b: a + b, t, t),
        lambda t: jax.tree.map(lambda a: a[::-1], t),
        lambda t: jax.tree.map(jnp.ones_like, t),
        lambda t: jax.tree.map(lambda a: a + jnp.ones_like(a), t),
        lambda t: jax.tree.map(lambda a: a * jnp.asarray(2, a.dtype), t),
        lambda t: jax.tree.map(lambda a: -a, t),
        lambda t: jax.tree.map(jnp.sort, t),
        lambda t: jax.tree.map(lambda a: jnp.roll(a, 1), t),
        lambda t: jax.tree.map(lambda a, b: (a + b) // jnp.asarray(2, a.dtype), t, t),
        lambda t: jax.tree.map(lambda a: jnp.full_like(a, 7), t),
        lambda t: jax.tree.map(jnp.abs, t),
        lambda t: jax.tree.map(lambda a: jnp.maximum(a, jnp.zeros_like(a)), t),
        lambda t: jax.tree.map(jnp.round, t),
        lambda t: jax.tree.map(lambda a: jnp.where(jnp.abs(a).astype(jnp.float32) < 0.05, jnp.zeros_like(a), a), t),
        lambda t: jax.tree.map(lambda a: jnp.clip(a, jnp.asarray(0, a.dtype), jnp.asarray(20, a.dtype)), t),
        lambda t: jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), t),
        lambda t: jax.tree.map(lambda a: only_floating(a, lambda a: a + jnp.asarray(0.01, a.dtype)), t),
        lambda t: jax.tree.map(lambda a: only_floating(a, lambda a: a * jnp.asarray(0.9, a.dtype)), t),
        lambda t: jax.tree.map(lambda a: np.asarray(a)[..., :1], t),
        lambda t: jax.tree.map(lambda a: a.reshape(-1), t),
        lambda t: jax.tree.map(lambda a: a.astype(jnp.int32), t),
        lambda t: jax.tree.map(lambda a: a[None], t)["kernel"].dequantize(),
        lambda t: jax.tree.map(lambda *a: jnp.stack(a), t, t)["kernel"].dequantize(),
        lambda t: jax.tree.map(lambda *a: jnp.concatenate(a), t, t),
    ],
)
def test_a_leaf_changed_by_a_tree_function_is_refused(change, codec):
    with pytest.raises(TypeError, match=r"packed lea.*\(6, 16\).*btc_dequantize"):
        change({"kernel": leaf(codec)})


def only_floating(array, function):
    return function(array) if jnp.issubdtype(array.dtype, jnp.floating) else array


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "function", [lambda a: a + a, lambda a: a[::-1], jnp.ones_like, lambda a: only_floating(a, jnp.abs)]
)
def test_a_leaf_changed_under_jit_decodes_to_nan(function, codec):
    q = leaf(codec)
    for use in (lambda t: jax.tree.map(function, t).dequantize(), lambda t: jax.tree.map(function, t) @ jnp.ones(16)):
        assert np.isnan(jax.jit(use)(q)).all()
        assert np.isnan(jax.jit(lambda use=use: use(q))()).all()


class Pending:
    """What the seal needs of an array whose values a device may still be computing."""

    is_fully_addressable, is_fully_replicated = True, False

    def __init__(self, ready):
        self.ready = ready

    def is_deleted(self):
        return False

    def is_ready(self):
        return self.ready

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "the seal was waited for"
        return np.ones(2, np.float16)


def test_a_seal_that_is_being_computed_is_not_waited_for():
    assert seal.broken_seal(Pending(ready=False)) == []
    assert seal.broken_seal(Pending(ready=True)) == [1.0, 1.0]


@pytest.mark.parametrize("codec", CODECS)
def test_what_moves_leaves_as_they_are_passes(codec):
    q = leaf(codec)
    for function in (
        lambda t: jax.tree.map(lambda a: a, t),
        lambda t: jax.tree.map(jnp.copy, t),
        lambda t: jax.tree.map(np.asarray, t),
        lambda t: jax.device_put(t, jax.devices()[1]),
        jax.jit(lambda t: t),
        lambda t: jax.tree.map(lambda a, b: jnp.where(True, a, b), t, t),
    ):
        np.testing.assert_array_equal(function(q).dequantize(), q.dequantize())
    assert jax.eval_shape(lambda t: t, q).shape == q.shape
    for stand_in in (None, 0, True, jax.ShapeDtypeStruct((1,), np.uint8), "x"):
        jax.tree.map(lambda _, stand_in=stand_in: stand_in, q)


@pytest.mark.parametrize("codec", [Uniform(32, threshold=0.0), Multilevel(width=4)])
def test_stacked_leaves_are_mapped_over(codec):
    members = [
        quantize_leaf(np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32), codec) for i in (0, 1)
    ]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *members)
    assert stack.stack == (2,)
    assert "stack=(2,)" in repr(stack)
    expected = np.stack([member.dequantize() for member in members])
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(stack), expected)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stack)[1], expected)
    for use in (lambda q: q @ jnp.ones(8), lambda q: q[0], np.asarray, lambda q: q.sum(axis=0)):
        with pytest.raises(TypeError, match=r"2 packed leaves of shape \(8, 8\).*jax\.vmap"):
            use(stack)


def test_rows_that_do_not_fit_the_widths_are_refused():
    q = leaf(Multilevel(slope=0.004), (40, 16))
    header = {**q.header, "header": np.roll(np.asarray(q.header["header"]), 1) ^ np.uint8(0b10000000)}
    with pytest.raises(TypeError, match=r"\(40, 16\).*rows.*btc_dequantize"):
        type(q)(q.planes, header, q.shape, q.dtype, q.format, q.order).dequantize()


def test_numpy_on_the_left_leaves_the_operator_to_the_leaf():
    q, x = leaf(), np.ones((3, 6), np.float32)
    for product in (x @ q, np.float64(2) * q, np.float32(2) * q, np.full((6, 16), 2.0, np.float32) * q):
        assert isinstance(product, jax.Array)
        assert product.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(lambda q: np.sqrt(4.0) * q)(q), 2 * q.dequantize())


def test_what_only_concrete_arrays_have():
    q = leaf()
    assert q.tolist() == q.dequantize().tolist()
    assert q.tobytes() == np.asarray(q).tobytes()
    np.testing.assert_array_equal(np.from_dlpack(q), q.dequantize())
    assert is_packed(q.block_until_ready())
    assert q.is_ready()
    assert not q.is_deleted()


def test_a_closed_over_leaf_has_values_as_arrays_have():
    q = leaf(Multilevel(slope=0.004))
    np.testing.assert_array_equal(jax.jit(lambda x: x + np.asarray(q))(np.zeros((6, 16))), q.dequantize())


def test_checkify_finds_no_index_out_of_bounds():
    q = leaf(Multilevel(slope=0.004), (40, 16))
    error, decoded = checkify.checkify(lambda q: q.dequantize(), errors=checkify.all_checks)(q)
    error.throw()
    np.testing.assert_array_equal(decoded, q.dequantize())


@pytest.mark.parametrize("codec", CODECS)
def test_parts_of_a_leaf_that_equinox_makes(codec):
    tree = {"kernel": leaf(codec), "bias": jnp.zeros(16)}
    together = eqx.combine(*eqx.partition(tree, eqx.is_inexact_array))
    np.testing.assert_array_equal(together["kernel"], tree["kernel"])
    with pytest.raises(TypeError, match=r"96 packed weights.*btc_reconstruct"):
        eqx.filter_grad(lambda t: (jnp.ones(6) @ t["kernel"]).sum())(tree)
