"""`fused` gives the function's own results, for every kind of model, with one dense leaf at a time."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import btc_jax
from btc_jax import Multilevel, Uniform, btc_dequantize, btc_quantize, fused, is_packed
from btc_jax.packing import quantize_leaf

KEY = jax.random.key(0)
TARGETS = [{"bits": 4.5}, {"codec": Uniform(threshold=0.03)}, {"codec": Multilevel(width=4)}]


def numbers(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class Attention(nn.Module):
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        x = x + nn.MultiHeadDotProductAttention(4, dtype=self.dtype)(x, x)
        return nn.Dense(64, dtype=self.dtype)(nn.gelu(nn.Dense(256, dtype=self.dtype)(nn.LayerNorm()(x))))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), feature_group_count=64)(x))
        x = nn.relu(nn.Conv(128, (3, 3), feature_group_count=4)(x))
        return nn.Dense(64)(x.mean((1, 2)))


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(500, 64)
        x: Any = nn.RNN(nn.OptimizedLSTMCell(64))(embed(tokens))
        x = nn.RNN(nn.GRUCell(64))(x)
        return embed.attend(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(64)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers()(x, None)[0]


LINEN = {
    "attention": (Attention(), numbers(2, 8, 64)),
    "bfloat16": (Attention(jnp.dtype(jnp.bfloat16)), numbers(2, 8, 64)),
    "convolutions": (Convolutions(), numbers(2, 8, 8, 16)),
    "tokens": (Tokens(), jnp.arange(12).reshape(2, 6)),
    "scanned": (Scanned(), numbers(2, 64)),
}


def check(function, *args, tolerance=1e-5):
    """Check for equal results, with parameters as an argument and closed over."""
    found = jax.jit(fused(function))(*args)
    closed = jax.jit(lambda *rest: fused(lambda *rest: function(args[0], *rest))(*rest))(*args[1:])
    for expected, *others in zip(*map(jax.tree.leaves, (jax.jit(function)(*args), found, closed)), strict=True):
        scale = float(jnp.abs(expected).max())
        for other in others:
            assert other.dtype == expected.dtype
            np.testing.assert_allclose(
                np.asarray(other, np.float32), np.asarray(expected, np.float32), rtol=0, atol=tolerance * scale
            )


@pytest.mark.parametrize("target", TARGETS, ids=["bits", "paper", "width"])
@pytest.mark.parametrize("name", LINEN)
def test_answers_of_linen(name, target):
    model, x = LINEN[name]
    rules = (btc_jax.Rule("*Dense_0/kernel", stack=0),) if name == "scanned" else ()
    policy = btc_jax.Policy(target.get("codec"), rules=rules)
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes bfloat16 with float32
        packed = btc_quantize(model.init(KEY, x), policy=policy, bits=target.get("bits"))
        assert any(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed)))
        check(model.apply, packed, x, tolerance=2**-7 if name == "bfloat16" else 1e-5)


def test_answers_of_nnx_equinox_and_haiku():
    x = numbers(4, 64)

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
            self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attention(self.layers[1](nnx.relu(self.layers[0](x)))[None])

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    check(lambda state, x: nnx.merge(graph, state)(x), btc_quantize(state, bits=4.5), x)

    arrays, rest = eqx.partition(eqx.nn.MLP(64, 64, 128, 2, key=KEY), eqx.is_array)
    packed = btc_quantize(arrays, bits=4.5)
    check(lambda packed, x: jax.vmap(eqx.combine(btc_dequantize(packed), rest))(x), packed, x)

    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 128, 64])(x)))
    packed = btc_quantize(network.init(KEY, x), bits=4.5)
    check(lambda packed, x: network.apply(btc_dequantize(packed), x), packed, x)


W = quantize_leaf(numbers(64, 64) / 8, Multilevel(slope=0.01))
FUNCTIONS = {
    "transposed": lambda w, x: x @ w.T,
    "reshaped": lambda w, x: x @ w.dequantize().reshape(4, 16, 64).reshape(64, 64),
    "twice": lambda w, x: x @ w @ w,
    "alone": lambda w, x: w.sum(0)[None] + 0 * x,
    "returned": lambda w, x: (w.dequantize(), x),
    "bfloat16": lambda w, x: x.astype(jnp.bfloat16) @ w.dequantize(jnp.bfloat16),
    "jit": lambda w, x: jax.jit(jnp.dot)(x, w.dequantize()),
    "scan": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=3),
    "reverse scan": lambda w, x: lax.scan(lambda c, y: (c @ w, c * y), x, jnp.arange(3.0), reverse=True, unroll=2),
    "decoded before the scan": lambda w, x: (
        lambda d: lax.scan(lambda c, _: (jnp.tanh(c @ d), None), x, None, length=3)
    )(w.dequantize()),
    "rows": lambda w, x: lax.scan(lambda c, row: (c + row, None), x[0], w.dequantize()),
    "while": lambda w, x: lax.while_loop(
        lambda c: (c[1] < 3) & (c[0] @ w < 1e9).all(), lambda c: (c[0] @ w, c[1] + 1), (x, 0)
    ),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x @ w.T, x),
    "switch of a decoded leaf": lambda w, x: lax.switch(
        1, [lambda w, x: x, lambda w, x: x @ w], w.dequantize(), x
    ),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x),
    "checkpoint of a decoded leaf": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w.dequantize(), x),
    "custom_jvp": lambda w, x: jax.nn.relu(x @ w) + jax.nn.relu(w.dequantize())[:8],
    "custom_vjp": lambda w, x: identity(w.dequantize()) @ x,
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "einsum": lambda w, x: jnp.einsum("bi,ij->jb", x, w.dequantize()),
    "take": lambda w, x: jnp.take(w.dequantize(), jnp.array([3, 63, 0, 3]), axis=0) + x[:4],
    "take columns": lambda w, x: w.dequantize()[:, jnp.array([3, 63])].sum() + x,
    "convolution": lambda w, x: lax.conv_general_dilated(
        x[None], w.dequantize()[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "gradient": lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x),
    "no operand": lambda w, x: (w.dequantize() * 2).mean() + x.mean(),
    "static": lambda w, x: {"a": x @ w, "b": [w.shape[0] * x]},
    "not a number": lambda w, x: (x.at[0].set(jnp.nan) @ w)[1:] @ w,
}  # fmt: skip


@jax.custom_vjp
def identity(x):
    return x


identity.defvjp(lambda x: (x, None), lambda _, g: (g,))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_answers_of_functions(name):
    x = numbers(8, 64, seed=1) if name != "custom_vjp" else numbers(64, 8, seed=1)
    check(FUNCTIONS[name], W, x)


def test_gradients_go_through():
    x, a = numbers(8, 64, seed=1), numbers(64, 4, seed=2)

    def loss(a, w, x):
        return jnp.mean(jnp.square(x @ w + (x @ a) @ a.T))

    expected = jax.jit(jax.value_and_grad(loss))(a, W, x)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5),
        jax.jit(jax.value_and_grad(fused(loss)))(a, W, x),
        expected,
    )
    with pytest.raises(TypeError, match="4096 packed weights have no gradient"):
        jax.grad(fused(lambda w, x: jnp.sum(x @ w)), allow_int=True)(W, x)


def test_what_is_no_array_is_handed_on():
    def f(w, x, *, train, scale=2.0):
        assert train is False
        return scale * (x @ w)

    x = numbers(2, 64)
    np.testing.assert_allclose(fused(f)(W, x, train=False), f(W, x, train=False), rtol=1e-5, atol=1e-6)
    assert fused(f).__name__ == "f"


def temporaries(function, *args):
    analysis: Any = jax.jit(function).lower(*args).compile().memory_analysis()
    return analysis.temp_size_in_bytes


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(8):
            x = nn.relu(nn.Dense(512)(x))
        return x


@pytest.mark.parametrize("target", TARGETS, ids=["bits", "paper", "width"])
def test_two_dense_leaves_at_most(target):
    model, x = Deep(), numbers(4, 512)
    packed = btc_quantize(model.init(KEY, x), **target)
    leaf, activations = 512 * 512 * 4, 2 * x.nbytes
    assert temporaries(fused(model.apply), packed, x) <= 2 * leaf + activations + 2**14
    assert temporaries(model.apply, packed, x) > 2.5 * leaf  # otherwise the test shows nothing


def test_one_equation_decodes_a_leaf():
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(lambda w: w.dequantize())(W).eqns]
    assert names == ["btc_decode"]
    stacked = quantize_leaf(numbers(64, 64), Multilevel(width=4))
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(lambda w: w.dequantize())(stacked).eqns]
    assert names == ["btc_decode"]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_for_other_platforms(platform):
    x = numbers(8, 64)
    for function in (FUNCTIONS["twice"], fused(FUNCTIONS["twice"])):
        assert jax.jit(function).trace(W, x).lower(lowering_platforms=(platform,)).as_text()
