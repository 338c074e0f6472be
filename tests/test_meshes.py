"""Leaves on meshes of 8 devices, with Auto and Explicit axes: as from one device, or piece by piece in place."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_allocate,
    btc_dequantize,
    btc_metrics,
    btc_plan,
    btc_quantize,
    btc_reconstruct,
    is_packed,
)

KERNEL = (np.random.default_rng(0).standard_normal((64, 128)) * np.geomspace(0.02, 0.2, 128)).astype(np.float32)
PARAMS = {"kernel": KERNEL, "bias": np.zeros(128, np.float32)}
SPECS = [PartitionSpec(), PartitionSpec(None, "x"), PartitionSpec("y", "x")]
TARGETS = [{}, {"bits": 4.5}, {"size": 6000}, {"rmse": 2e-3}, {"sqnr_db": 25.0}]
AXES = [AxisType.Auto, AxisType.Explicit]


@functools.cache
def on_one_device(target, pieces=None):
    """The tree packed on one device, in as many pieces as it has shards on a mesh."""
    rules = (Rule("kernel", pieces=pieces),)
    return btc_quantize(PARAMS, policy=Policy(rules=rules), **dict(target))


def shards_of(spec):
    """Of the kernel, along both axes."""
    return tuple({"x": 4, "y": 2, None: 1}[name] for name in (*spec, None, None)[:2])


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def on_mesh(mesh, spec):
    kernel = jax.device_put(KERNEL, NamedSharding(mesh, spec))
    return {"kernel": kernel, "bias": jax.device_put(PARAMS["bias"], NamedSharding(mesh, PartitionSpec()))}


def inside(mesh, set_mesh):
    return jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext()


def assert_same_arrays(found, expected):
    a, b = (jax.tree.leaves_with_path(tree) for tree in (found, expected))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("set_mesh", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", AXES, ids=str)
def test_a_sharded_tree_is_packed_as_one_on_one_device(kind, spec, set_mesh):
    mesh = mesh_of(kind)
    for target in TARGETS:
        expected = on_one_device(tuple(target.items()), shards_of(spec))
        with inside(mesh, set_mesh):
            params = on_mesh(mesh, spec)
            found = btc_quantize(params, **target)
            assert_same_arrays(found, expected)
            place = NamedSharding(mesh, spec)
            assert all(array.sharding.is_equivalent_to(place, array.ndim) for array in jax.tree.leaves(found["kernel"]))
            decoded = btc_dequantize(found)["kernel"]
            assert decoded.sharding.is_equivalent_to(place, 2)
        np.testing.assert_allclose(decoded, btc_dequantize(expected)["kernel"], rtol=1e-6)


@pytest.mark.parametrize("set_mesh", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
@pytest.mark.parametrize("kind", AXES, ids=str)
def test_all_else_works_on_a_sharded_tree(kind, spec, set_mesh):
    mesh = mesh_of(kind)
    cut = Policy(rules=(Rule("kernel", pieces=shards_of(spec)),))
    policy = btc_allocate(PARAMS, policy=cut, bits=4.5)
    expected = btc_quantize(PARAMS, policy=policy)
    with inside(mesh, set_mesh):
        params = on_mesh(mesh, spec)
        assert btc_allocate(params, bits=4.5) == policy
        assert btc_plan(params, policy=policy, measure=True).bytes_max == expected["kernel"].nbytes + 512
        packed = btc_quantize(params, policy=policy)
        assert btc_metrics(params, packed, policy=policy) == btc_metrics(PARAMS, expected, policy=policy)
        for reconstruct in (btc_reconstruct, jax.jit(btc_reconstruct, static_argnames="policy")):
            kernel = reconstruct(params, policy=policy)["kernel"]
            np.testing.assert_allclose(kernel, expected["kernel"].dequantize(), rtol=1e-5, atol=1e-7)
            if kind == AxisType.Explicit:
                assert kernel.sharding.is_equivalent_to(params["kernel"].sharding, 2)


@pytest.mark.parametrize("set_mesh", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("kind", AXES, ids=str)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_packed_tree_meets_sharded_activations(kind, set_mesh, jitted):
    mesh = mesh_of(kind)
    packed = btc_quantize(PARAMS, bits=4.5)
    with inside(mesh, set_mesh):
        replicated = jax.device_put(packed, NamedSharding(mesh, PartitionSpec()))
        x = jax.device_put(np.ones((8, 64), np.float32), NamedSharding(mesh, PartitionSpec("x")))

        def apply(packed, x):
            return x @ packed["kernel"]

        function = jax.jit(apply) if jitted else apply
        expected = np.ones((8, 64), np.float32) @ np.asarray(packed["kernel"])
        found = function(replicated, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert found.sharding.spec[0] == "x" or kind == AxisType.Auto
        if jitted:  # like dense leaves, which eager operations do not mix with leaves of other devices
            np.testing.assert_allclose(function(packed, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", [Uniform(64), Uniform(64, threshold=0.0), None])
def test_packed_arrays_are_bound_to_a_device_only_if_the_leaf_is(codec):
    policy = Policy(codec) if codec else btc_allocate(PARAMS, bits=4.5)
    for leaf, committed in (
        (KERNEL, False),
        (jnp.asarray(KERNEL), False),
        (jax.device_put(KERNEL, jax.devices()[3]), True),
    ):
        packed = btc_quantize({"kernel": leaf}, policy=policy)["kernel"]
        assert is_packed(packed)
        assert packed.committed is committed
        assert [array.committed for array in jax.tree.leaves(packed)] == [committed] * len(jax.tree.leaves(packed))
        decoded = packed.dequantize()
        assert decoded.committed is committed
        assert decoded.devices() == {jax.devices()[3 if committed else 0]} == packed.sharding.device_set


def test_positional_placements_are_gathered_too():
    one = SingleDeviceSharding(jax.devices()[5])
    packed = btc_quantize({"kernel": jax.device_put(KERNEL, one)}, bits=4.5)["kernel"]
    assert {array.sharding for array in jax.tree.leaves(packed)} == {one}


@pytest.mark.parametrize("set_mesh", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("target", [{}, {"bits": 4.5}], ids=str)
@pytest.mark.parametrize("kind", AXES, ids=str)
def test_a_leaf_that_a_shard_map_closes_over(kind, target, set_mesh):
    mesh, spec = mesh_of(kind), PartitionSpec("x")
    with inside(mesh, set_mesh):
        packed = btc_quantize(on_mesh(mesh, PartitionSpec()), **target)["kernel"]
        x = jax.device_put(np.ones((8, 64), np.float32), NamedSharding(mesh, spec))
        mapped = jax.shard_map(lambda x: x @ packed, mesh=mesh, in_specs=spec, out_specs=spec)
        expected = np.ones((8, 64), np.float32) @ np.asarray(jax.device_get(packed).dequantize())
        for function in (mapped, jax.jit(mapped)):
            np.testing.assert_allclose(function(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("set_mesh", [False, True], ids=["", "set_mesh"])
@pytest.mark.parametrize("kind", AXES, ids=str)
def test_a_mesh_of_one_device(kind, set_mesh):
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(kind, kind), devices=jax.devices()[:1])
    with inside(mesh, set_mesh):
        params = on_mesh(mesh, PartitionSpec("x", "y"))
        packed = btc_quantize(params, bits=4.5)
        assert packed["kernel"].pieces == (1, 1)
        assert np.array_equal(packed["kernel"], btc_quantize(PARAMS, bits=4.5)["kernel"])
        assert packed["kernel"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("x", "y")), 2)
        assert np.array_equal(jax.device_put(packed["kernel"], packed["kernel"].sharding), packed["kernel"])
        assert btc_metrics(params, packed).leaves[1].path == "kernel"
