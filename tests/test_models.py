"""Unmodified models run on packed trees, eager and jitted, with the same results as on the decoded tree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from btc_jax import Policy, btc_dequantize, btc_quantize, is_packed

ANY_SIZE = Policy(min_size=0)


def image(*shape):
    return jax.random.normal(jax.random.key(1), shape)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2)(x)


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(8))(x)


class LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        return nn.Dense(4)(nn.BatchNorm(use_running_average=True)(x).mean((1, 2)))


TOKENS = jnp.arange(6).reshape(2, 3)
LINEN = {
    "dense": (nn.Dense(8), image(2, 16)),
    "dense general": (nn.DenseGeneral((2, 4), axis=(-2, -1)), image(2, 4, 8)),
    "conv 1-D": (nn.Conv(8, (3,)), image(2, 9, 4)),
    "conv 2-D": (nn.Conv(8, (3, 3)), image(2, 9, 9, 4)),
    "conv 3-D": (nn.Conv(8, (3, 3, 3)), image(1, 5, 5, 5, 4)),
    "conv grouped": (nn.Conv(8, (3, 3), feature_group_count=2), image(2, 9, 9, 4)),
    "conv depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), image(2, 9, 9, 4)),
    "conv transposed": (nn.ConvTranspose(8, (3, 3)), image(2, 9, 9, 4)),
    "embed": (nn.Embed(10, 16), TOKENS),
    "attention": (LinenAttention(), image(2, 5, 16)),
    "lstm": (LinenLSTM(), image(2, 5, 4)),
    "batch norm": (LinenBatchNorm(), image(2, 9, 9, 3)),
    "bfloat16": (nn.Dense(8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), image(2, 16)),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    model, x = LINEN[name]
    variables = model.init(jax.random.key(0), x)
    packed = btc_quantize(variables, policy=ANY_SIZE)
    assert any(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed)))
    expected = model.apply(btc_dequantize(packed), x)
    tolerance = 1e-2 if expected.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(model.apply(packed, x), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(jax.jit(model.apply)(packed, x), expected, rtol=tolerance, atol=tolerance)
    if "batch_stats" not in variables:
        np.testing.assert_allclose(
            model.apply({"params": packed["params"]}, x), expected, rtol=tolerance, atol=tolerance
        )


class OwnLayer(nnx.Module):
    """A custom layer that computes with its parameter directly."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (16, 8)))

    def __call__(self, x):
        return x @ self.kernel + (x[:, :8] * self.kernel[0][None]) @ (self.kernel.T @ self.kernel)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Conv(8, 8, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.dropout(self.norm(x)).mean((1, 2)))


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


NNX = {
    "linear": (lambda rngs: nnx.Linear(16, 8, rngs=rngs), image(2, 16)),
    "linear general": (lambda rngs: nnx.LinearGeneral((4, 8), (2, 4), axis=(-2, -1), rngs=rngs), image(2, 4, 8)),
    "conv 1-D": (lambda rngs: nnx.Conv(4, 8, (3,), rngs=rngs), image(2, 9, 4)),
    "conv 3-D": (lambda rngs: nnx.Conv(4, 8, (3, 3, 3), rngs=rngs), image(1, 5, 5, 5, 4)),
    "conv grouped": (lambda rngs: nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs), image(2, 9, 9, 4)),
    "conv depthwise": (lambda rngs: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs), image(2, 9, 9, 4)),
    "embed": (lambda rngs: nnx.Embed(10, 16, rngs=rngs), TOKENS),
    "attention": (lambda rngs: NNXAttention(rngs), image(2, 5, 16)),
    "lstm": (lambda rngs: nnx.RNN(nnx.LSTMCell(4, 8, rngs=rngs)), image(2, 5, 4)),
    "own layer": (lambda rngs: OwnLayer(rngs), image(2, 16)),
    "net": (lambda rngs: NNXNet(rngs), image(2, 9, 9, 3)),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, x = NNX[name]
    graphdef, state = nnx.split(make(nnx.Rngs(0)))
    packed = btc_quantize(state, policy=ANY_SIZE)
    expected = nnx.merge(graphdef, btc_dequantize(packed))(x)
    assert any(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed)))
    model = nnx.merge(graphdef, packed)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(packed, x), expected, rtol=1e-5, atol=1e-5
    )


def test_an_nnx_model_can_be_packed_itself():
    model, x = NNXNet(nnx.Rngs(0)), image(2, 9, 9, 3)
    packed = btc_quantize(model, policy=ANY_SIZE)
    np.testing.assert_allclose(packed(x), btc_dequantize(packed)(x), rtol=1e-5, atol=1e-5)
    assert not is_packed(model.head.kernel.get_value())


def test_an_nnx_optimizer_refuses_packed_leaves():
    optax = pytest.importorskip("optax")
    packed = btc_quantize(NNXNet(nnx.Rngs(0)), policy=ANY_SIZE)
    with pytest.raises(TypeError, match="init of an optimizer"):
        nnx.Optimizer(packed, optax.adam(1e-3), wrt=nnx.Param)


def test_a_packed_layer_under_scan_is_refused():
    stacked = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    model = stacked(16)
    variables = model.init(jax.random.key(0), image(2, 16), None)
    packed = btc_quantize(variables, policy=ANY_SIZE)
    with pytest.raises(TypeError, match=r"an axis of its arrays was mapped over.*Rule\(pattern, stack=0\)"):
        model.apply(packed, image(2, 16), None)


class Scanned(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(self.features)(x), None
