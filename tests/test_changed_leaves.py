"""Packed leaves whose arrays were changed, moved or stacked."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from btc_jax import Multilevel, Uniform, is_packed, seal
from btc_jax.packing import quantize_leaf
from tests.arraylike_support import CODECS as CODECS
from tests.arraylike_support import leaf as leaf


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
