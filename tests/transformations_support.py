"""What the tests of transformations share."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from btc_jax import Multilevel, Policy, Rule, Uniform, btc_quantize, is_packed

SIZE = 32


BATCH = (4, SIZE)


class Subject(NamedTuple):
    """A model as a pure function: `apply(params, x)`, from (4, 32) to (4, 32), with kernels to be packed and biases."""

    params: Any
    apply: Any
    pattern: str


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(SIZE, bias_init=nn.initializers.normal())(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(SIZE, SIZE, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.hidden(x))


def linen():
    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.ones(BATCH))
    return Subject(variables, net.apply, "*/kernel")


def nnx_model():
    graphdef, state = nnx.split(NNXNet(nnx.Rngs(0)))
    return Subject(state, lambda state, x: nnx.merge(graphdef, state)(x), "*/kernel")


def equinox():
    net = eqx.nn.MLP(SIZE, SIZE, SIZE, 0, final_activation=jnp.tanh, key=jax.random.key(0))
    arrays, static = eqx.partition(net, eqx.is_array)
    return Subject(arrays, lambda arrays, x: jax.vmap(eqx.combine(arrays, static, is_leaf=is_packed))(x), "*/weight")


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.Linear(SIZE)(x))))
    return Subject(net.init(jax.random.key(0), jnp.ones(BATCH)), net.apply, "*/w")


def plain():
    scales = jnp.geomspace(0.02, 0.5, SIZE)
    kernel = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) * scales[None]
    params = {"layer": {"kernel": kernel, "bias": jnp.full((1, SIZE), 0.1)}}

    def apply(params, x):
        return jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"])

    return Subject(params, apply, "*/kernel")


SUBJECTS = {"linen": linen, "nnx": nnx_model, "equinox": equinox, "haiku": haiku, "plain": plain}


CODECS = {
    "one": Uniform(32, threshold=0.0),
    "two": Uniform(32, threshold=0.18),
    "leaf": Multilevel(width=4),
    "mixed": Multilevel(slope=0.004),
}


@functools.cache
def subject(kind):
    return SUBJECTS[kind]()


@functools.cache
def packed(kind, width):
    params, _, pattern = subject(kind)
    return btc_quantize(params, policy=Policy(rules=(Rule(pattern, CODECS[width]),), min_size=10**9))


def inputs():
    return jnp.asarray(np.random.default_rng(0).standard_normal(BATCH), jnp.float32)
