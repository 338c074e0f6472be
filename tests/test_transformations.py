"""Every transformation of JAX x {argument, closed over} x {one width, mixed widths} x every kind of model.

A packed tree must give the same results as its decoded tree, with the same code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from btc_jax import btc_dequantize, is_packed
from tests.transformations_support import CODECS as CODECS
from tests.transformations_support import SIZE as SIZE
from tests.transformations_support import SUBJECTS as SUBJECTS
from tests.transformations_support import inputs as inputs
from tests.transformations_support import packed as packed
from tests.transformations_support import plain as plain
from tests.transformations_support import subject as subject


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
