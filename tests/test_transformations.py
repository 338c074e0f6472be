"""Every transformation of JAX x {argument, closed over} x {one width, mixed widths} x every kind of model.

A packed tree must give the same results as its decoded tree, with the same code.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from btc_jax import Multilevel, Policy, Rule, Uniform, btc_dequantize, btc_plan, btc_quantize, is_packed

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


# The transformations of `f(params, x)`: each returns an array.


def grad_of_other_leaves(f, params, x):
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_packed)
    ours = [leaf if leaf.size == SIZE**2 else None for leaf in leaves]
    others = [None if leaf.size == SIZE**2 else leaf for leaf in leaves]

    def loss(others):
        both = [a if b is None else b for a, b in zip(ours, others, strict=True)]
        return jnp.square(f(treedef.unflatten(both), x)).sum()

    return jnp.concatenate([gradient.reshape(-1) for gradient in jax.tree.leaves(jax.grad(loss)(others))])


def exported(f, params, x):
    # Equinox, Haiku and NNX have their own tree nodes; only their arrays are arguments here.
    leaves, treedef = jax.tree.flatten(params)
    function = jax.jit(lambda leaves, x: f(treedef.unflatten(leaves), x))
    return export.deserialize(export.export(function)(leaves, x).serialize()).call(leaves, x)


def exported_closure(f, params, x):
    return export.deserialize(export.export(jax.jit(lambda x: f(params, x)))(x).serialize()).call(x)


def donated(f, params, x):
    function = jax.jit(lambda params, x: (f(params, x), params), donate_argnums=0)
    return function(jax.tree.map(jnp.copy, params), x)[0]


def on_another_device(f, params, x):
    return f(*jax.device_put((params, x), jax.devices()[3]))


def on_a_mesh(kind, f, params, x):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    put = jax.device_put((params, x), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(f)(*put)


def sharded_inputs(f, params, x):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    return jax.jit(f)(params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("x"))))


def shard_mapped(f, params, x):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("x")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    return jax.jit(mapped)(params, x)


ARGUMENT = {
    "eager": lambda f, p, x: f(p, x),
    "jit": lambda f, p, x: jax.jit(f)(p, x),
    "grad of other leaves": grad_of_other_leaves,
    "grad of inputs": lambda f, p, x: jax.grad(lambda x, p: f(p, x).sum())(x, p),
    "jvp": lambda f, p, x: jax.jvp(lambda x: f(p, x), (x,), (x,))[1],
    "vmap": lambda f, p, x: jax.vmap(lambda p, x: f(p, x[None])[0], in_axes=(None, 0))(p, x),
    "scan": lambda f, p, x: lax.scan(lambda c, x: (c, f(c, x[None])[0]), p, x)[1],
    "fori": lambda f, p, x: lax.fori_loop(0, 2, lambda i, c: (c[0], f(*c)), (p, x))[1],
    "while": lambda f, p, x: lax.while_loop(lambda c: c[2] < 2, lambda c: (c[0], f(c[0], c[1]), c[2] + 1), (p, x, 0))[
        1
    ],
    "cond": lambda f, p, x: lax.cond(x[0, 0] < 9, f, lambda p, x: f(p, 2 * x), p, x),
    "switch": lambda f, p, x: lax.switch(jnp.int32(1), [lambda p, x: x, f], p, x),
    "remat": lambda f, p, x: jax.grad(lambda x: jax.checkpoint(f)(p, x).sum())(x),
    "export": exported,
    "donate": donated,
    "device_put": on_another_device,
    "mesh, Auto": functools.partial(on_a_mesh, AxisType.Auto),
    "mesh, Explicit": functools.partial(on_a_mesh, AxisType.Explicit),
    "sharded inputs": sharded_inputs,
    "shard_map": shard_mapped,
}

CLOSURE = {
    "jit": lambda f, p, x: jax.jit(lambda x: f(p, x))(x),
    "nested jit": lambda f, p, x: jax.jit(lambda x: jax.jit(lambda x: f(p, x))(x))(x),
    "grad of inputs": lambda f, p, x: jax.jit(jax.grad(lambda x: f(p, x).sum()))(x),
    "jvp": lambda f, p, x: jax.jit(lambda x: jax.jvp(lambda x: f(p, x), (x,), (x,))[1])(x),
    "vmap": lambda f, p, x: jax.vmap(lambda x: f(p, x[None])[0])(x),
    "scan": lambda f, p, x: lax.scan(lambda c, x: (c, f(p, x[None])[0]), 0, x)[1],
    "scan over itself": lambda f, p, x: lax.scan(lambda c, _: (f(p, c), None), x, None, length=2)[0],
    "fori": lambda f, p, x: lax.fori_loop(0, 2, lambda i, c: f(p, c), x),
    "while": lambda f, p, x: lax.while_loop(lambda c: c[1] < 2, lambda c: (f(p, c[0]), c[1] + 1), (x, 0))[0],
    "cond": lambda f, p, x: lax.cond(x[0, 0] < 9, lambda: f(p, x), lambda: f(p, 2 * x)),
    "switch": lambda f, p, x: lax.switch(jnp.int32(1), [lambda: x, lambda: f(p, x)]),
    "map": lambda f, p, x: lax.map(lambda x: f(p, x[None])[0], x),
    "remat": lambda f, p, x: jax.grad(lambda x: jax.checkpoint(lambda x: f(p, x))(x).sum())(x),
    "export": exported_closure,
    "eval_shape": lambda f, p, x: jnp.zeros(jax.eval_shape(lambda x: f(p, x), x).shape),
    "shard_map": lambda f, p, x: shard_mapped(lambda _, x: f(p, x), 0, x),
    "set_mesh": lambda f, p, x: under_a_mesh(lambda: jax.jit(lambda x: f(p, x))(x)),
}


def under_a_mesh(function):
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        return function()


WIDTHS = {"plain": tuple(CODECS)}
"""Kinds of models differ in how they read a parameter, and codecs in how it is decoded: not every pair is tried."""

CASES = [
    pytest.param(function, kind, width, id=f"{how} {name}-{kind}-{width}")
    for how, functions in (("argument", ARGUMENT), ("closed over", CLOSURE))
    for name, function in functions.items()
    for kind in SUBJECTS
    for width in WIDTHS.get(kind, ("mixed",))
]


@pytest.mark.parametrize(("function", "kind", "width"), CASES)
def test_packed_gives_what_decoded_gives(function, kind, width):
    params, apply, x = packed(kind, width), subject(kind).apply, inputs()
    assert sum(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed))) == 1
    found = function(apply, params, x)
    expected = function(apply, btc_dequantize(params), x)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_the_codecs_have_the_widths_that_they_stand_for():
    counts = {width: [len(set(leaf.widths.tolist())) for leaf in kernels("plain", width)] for width in CODECS}
    assert counts["one"] == counts["leaf"] == [1]
    assert counts["two"] == [2]
    assert min(counts["mixed"]) > 2


def kernels(kind, width):
    return [leaf for leaf in jax.tree.leaves(packed(kind, width), is_leaf=is_packed) if is_packed(leaf)]


# Specific to one library.


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
