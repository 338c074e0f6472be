"""Lifted transformations of NNX and Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from btc_jax import Policy, Rule, btc_dequantize, btc_plan, btc_quantize
from tests.transformations_support import CODECS as CODECS
from tests.transformations_support import SIZE as SIZE
from tests.transformations_support import NNXNet as NNXNet
from tests.transformations_support import inputs as inputs
from tests.transformations_support import packed as packed


def test_nnx_transformations_of_a_model():
    graphdef, _ = nnx.split(NNXNet(nnx.Rngs(0)))
    model = nnx.merge(graphdef, packed("nnx", "mixed"))
    decoded = nnx.merge(graphdef, btc_dequantize(packed("nnx", "mixed")))
    x = inputs()
    functions = {
        "jit": lambda m: nnx.jit(lambda m, x: m(x))(m, x),
        "jit, closed over": lambda m: nnx.jit(lambda x: m(x))(x),
        "vmap": lambda m: nnx.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(m, x),
        "remat": lambda m: nnx.remat(lambda m, x: m(x))(m, x),
        "cond": lambda m: nnx.cond(True, lambda m, x: m(x), lambda m, x: x, m, x),
        "scan": lambda m: nnx.scan(lambda m, c: m(c), in_axes=(None, nnx.Carry), out_axes=nnx.Carry, length=2)(m, x),
        "grad of biases": lambda m: nnx.grad(
            lambda m: jnp.square(m(x)).sum(), argnums=nnx.DiffState(0, nnx.PathContains("bias"))
        )(m)["hidden"]["bias"][...],
    }
    for name, function in functions.items():
        np.testing.assert_allclose(function(model), function(decoded), rtol=2e-5, atol=2e-6, err_msg=name)


class Lifted(nn.Module):
    """A Dense layer under one of Linen's lifted transformations."""

    how: str

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(SIZE)
        constant = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
        match self.how:
            case "jit":
                return nn.jit(nn.Dense)(SIZE)(x)
            case "remat":
                return nn.remat(nn.Dense)(SIZE)(x)
            case "vmap":
                return nn.vmap(lambda layer, x: layer(x), **constant)(dense, x)
            case "scan":
                scan = nn.scan(
                    lambda layer, c, _: (layer(c), None),
                    variable_broadcast="params",
                    split_rngs={"params": False},
                    length=2,
                )
                return scan(dense, x, None)[0]
            case "cond":
                dense(x)
                return nn.cond(x[0, 0] < 9, lambda layer, x: layer(x), lambda layer, x: x, dense, x)
            case "vjp":
                return nn.vjp(lambda layer, x: layer(x), dense, x, vjp_variables=False)[0]
            case "rnn":
                return nn.RNN(nn.OptimizedLSTMCell(SIZE))(x[None])[0]
            case _:
                return dense(x)


@pytest.mark.parametrize("how", ["jit", "remat", "vmap", "scan", "cond", "vjp", "rnn", "bind"])
@pytest.mark.parametrize("jitted", [False, True])
def test_lifted_transformations_of_linen(how, jitted):
    module, x = Lifted(how), inputs()
    variables = module.init(jax.random.key(0), x)
    rule = Rule("*/kernel", CODECS["mixed"])
    q = btc_quantize(variables, policy=Policy(rules=(rule,), min_size=10**9))
    apply: Any = (lambda variables, x: module.bind(variables)(x)) if how == "bind" else module.apply
    apply = jax.jit(apply) if jitted else apply
    np.testing.assert_allclose(apply(q, x), apply(btc_dequantize(q), x), rtol=2e-5, atol=2e-6)


class Normalized(nn.Module):
    """One of Linen's lifted normalizations, which map over the arrays of a layer's variables, and a plain layer."""

    norm: Any

    @nn.compact
    def __call__(self, x):
        keywords = {"update_stats": False} if self.norm is nn.SpectralNorm else {}
        return nn.Dense(64)(self.norm(nn.Dense(64))(x, **keywords))


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_what_linen_normalizes_stays_dense(norm):
    module: Any = Normalized(norm)
    x = jnp.ones((2, 64))
    variables = module.init(jax.random.key(0), x)
    packed = btc_quantize(variables, bits=4.5)
    reasons = {row.path: row.reason for row in btc_plan(variables, bits=4.5).rows}
    assert reasons["params/Dense_1/kernel"] == "normalized"
    assert reasons["params/Dense_0/kernel"] == "default"
    for apply in (module.apply, jax.jit(module.apply)):
        np.testing.assert_allclose(apply(packed, x), apply(btc_dequantize(packed), x), rtol=1e-5, atol=1e-6)


def test_variables_mapped_by_the_user_say_what_to_do():
    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x):
            twice = nn.map_variables(nn.Dense, "params", lambda v: jax.tree.map(lambda a: a + a, v), init=True)
            return twice(64)(x)

    module, x = Doubled(), jnp.ones((2, 64))
    packed = btc_quantize(module.init(jax.random.key(0), x), bits=4.5)
    with pytest.raises(TypeError, match=r"\(64, 64\).*btc_dequantize"):
        module.apply(packed, x)
    assert jax.jit(lambda v, x: module.apply(btc_dequantize(v), x))(packed, x).shape == (2, 64)
