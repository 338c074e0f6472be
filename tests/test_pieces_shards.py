"""Leaves that are sharded over a mesh, packed shard by shard."""

import contextlib
import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_dequantize,
    btc_quantize,
    btc_reconstruct,
    load,
    save,
)
from btc_jax.packing import quantize_leaf
from btc_jax.pieces import Cut
from btc_jax.policy import BTCPolicyError
from tests.pieces_support import LAYERS as LAYERS
from tests.pieces_support import packed_stack as packed_stack
from tests.pieces_support import scanned as scanned
from tests.pieces_support import stack as stack
from tests.test_search_failures import as_users_run_it
from tests.test_tiles import compilations

KINDS = [AxisType.Auto, AxisType.Explicit]


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")


def collectives(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    return {name for name in COLLECTIVES if f"{name}(" in text or f"{name}-start(" in text}


def mesh_of(kind, shape=(2, 4)):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind), devices=devices)


def nbytes_of_device(tree, device):
    shards = (shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("spec", [("data", "model"), (None, "model"), (("data", "model"),), ("data",)], ids=str)
@pytest.mark.parametrize("codec", [None, Uniform(64)], ids=str)
def test_shards_are_packed_where_they_lie(kind, spec, codec):
    mesh = mesh_of(kind)
    place = NamedSharding(mesh, PartitionSpec(*spec))
    leaf = jax.device_put(stack(128, 256), place)
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        packed = btc_quantize({"k": leaf}, codec, **({} if codec else {"bits": 4.5}))["k"]
        for array in jax.tree.leaves(packed):
            assert array.sharding.is_equivalent_to(place, array.ndim)
        device = jax.devices()[0]
        dense = nbytes_of_device(leaf, device)
        assert nbytes_of_device(packed, device) <= (0.16 if codec is None else 0.28) * dense
        decoded = packed.dequantize()
        assert decoded.sharding.is_equivalent_to(place, 2)
        assert not collectives(lambda q: q.dequantize(), packed)
        jitted = jax.jit(lambda q: q.dequantize())(packed)
    assert np.array_equal(jitted, decoded)
    for shard in leaf.addressable_shards:
        if codec is not None:
            alone = quantize_leaf(np.asarray(shard.data), codec).dequantize()
            assert np.array_equal(alone, np.asarray(decoded)[shard.index])


@pytest.mark.parametrize("devices", [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_pieces_decode_the_same_on_any_number_of_devices(devices):
    packed = btc_quantize({"k": stack(128, 256)}, policy=Policy(rules=(Rule("k", pieces=(2, 4)),)), bits=4.5)["k"]
    expected = packed.dequantize()
    place = NamedSharding(mesh_of(AxisType.Auto, devices), PartitionSpec("data", "model"))
    moved = jax.device_put(packed, place)  # the spec of the model is a prefix of the packed leaf
    found = moved.dequantize()
    assert found.sharding.is_equivalent_to(place, 2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=np.spacing(np.abs(np.asarray(expected)).max()))


def test_a_sharded_leaf_is_decoded_and_reconstructed_by_one_program():
    place = NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("data", "model"))
    trees = [{"k": jax.device_put(stack(64, 128), place)} for _ in range(2)]
    packed = [btc_quantize(tree, Uniform(threshold=0.0)) for tree in trees]
    packed[0]["k"].dequantize()
    btc_reconstruct(trees[0], Uniform(threshold=0.0))
    with compilations() as count:
        packed[1]["k"].dequantize()
        btc_reconstruct(trees[1], Uniform(threshold=0.0))
    assert not count


def test_tensor_parallel_products_need_no_weights_from_elsewhere():
    mesh = mesh_of(AxisType.Auto)
    place, rows = NamedSharding(mesh, PartitionSpec(None, "model")), NamedSharding(mesh, PartitionSpec("data"))
    packed = btc_quantize({"k": jax.device_put(stack(64, 256), place)}, bits=4.5)["k"]
    x = jax.device_put(np.ones((8, 64), np.float32), rows)
    function = jax.jit(lambda q, x: x @ q, in_shardings=(place, rows))
    assert np.allclose(function(packed, x), np.ones((8, 64), np.float32) @ np.asarray(packed), atol=1e-4)
    assert not collectives(lambda q, x: x @ q, packed, x)


def test_stacks_of_sharded_layers():
    mesh = mesh_of(AxisType.Auto)
    place = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    leaf = jax.device_put(stack(4, 64, 64), place)
    packed = packed_stack(leaf)
    assert (packed.pieces, packed.piece) == ((4, 2, 4), (32, 16))
    assert packed.dequantize().sharding.is_equivalent_to(place, 3)
    x = jnp.ones((2, 64))
    assert np.allclose(jax.jit(scanned)(packed, x), scanned(np.asarray(packed), x), atol=1e-5)


def test_boxes_of_linen_inside_a_mesh():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(256, kernel_init=init, use_bias=False)(x)

    mesh, model, x = mesh_of(AxisType.Auto), Boxed(), jnp.ones((8, 64))
    with jax.set_mesh(mesh):
        params = model.init(jax.random.key(0), x)["params"]
        place = NamedSharding(mesh, PartitionSpec(None, "model"))
        params = jax.device_put(params, place)
        packed = btc_quantize(params, bits=4.5)
        assert packed["Dense_0"]["kernel"].value.pieces == (1, 4)
        found = jax.jit(model.apply)({"params": packed}, x)
        expected: Any = model.apply({"params": btc_dequantize(packed)}, x)
        assert np.allclose(found, expected, atol=1e-5)


def test_a_file_lands_on_a_mesh_in_shards(tmp_path):
    mesh = mesh_of(AxisType.Auto)
    place = NamedSharding(mesh, PartitionSpec("data", "model"))
    packed = btc_quantize({"k": jax.device_put(stack(64, 128), place), "b": np.ones((8, 4, 2), np.int32)}, bits=4.5)
    save(tmp_path / "q.safetensors", packed)
    again = load(tmp_path / "q.safetensors", device=lambda path: place if path == "k" else None)["k"]
    assert all(array.sharding.is_equivalent_to(place, array.ndim) for array in jax.tree.leaves(again))
    assert np.array_equal(again.dequantize(), packed["k"].dequantize())


def test_an_abstract_tree_says_where_leaves_go(tmp_path):
    mesh = mesh_of(AxisType.Auto)
    place, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data", "model"), ()))
    tree = {"k": jax.device_put(stack(64, 128), place), "b": jax.device_put(np.ones(3, np.float32), whole)}
    packed = btc_quantize(tree, bits=4.5)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), packed)
    assert jax.tree.structure(abstract) == jax.tree.structure(packed)
    save(tmp_path / "q.safetensors", packed)
    for like in (packed, abstract):
        again = load(tmp_path / "q.safetensors", like=like)
        assert again["b"].sharding == whole
        assert all(array.sharding.is_equivalent_to(place, array.ndim) for array in jax.tree.leaves(again["k"]))
        assert np.array_equal(again["k"].dequantize(), packed["k"].dequantize())
    like = {"k": jax.ShapeDtypeStruct((64, 128), np.float32, sharding=place), "b": np.ones(3, np.float32)}
    dense = load(tmp_path / "q.safetensors", like=like, dense=True)
    assert dense["k"].sharding == place


def test_orbax_restores_shards_into_an_abstract_tree(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    place = NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("data", "model"))
    packed = btc_quantize({"k": jax.device_put(stack(64, 128), place)}, bits=4.5)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), packed)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", packed)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "step", abstract)["k"]
    assert all(array.sharding.is_equivalent_to(place, array.ndim) for array in jax.tree.leaves(again))
    assert np.array_equal(again.dequantize(), packed["k"].dequantize())


def test_sisters_of_pieces_share_shapes():
    policy = Policy(rules=(Rule("kernel", stack=0),))
    model = btc_quantize({"kernel": stack(LAYERS, 64, 64)}, policy=policy, bits=4.5, room=0.01)
    sister = btc_quantize({"kernel": stack(LAYERS, 64, 64)}, like=model)
    assert jax.tree.structure(model) == jax.tree.structure(sister)
    assert [x.shape for x in jax.tree.leaves(model)] == [x.shape for x in jax.tree.leaves(sister)]


def test_cuts_that_cannot_be():
    tree = {"kernel": stack(6, 64, 64)}

    def refused(message, error=ValueError, tree=tree, **rule):
        with as_users_run_it(), pytest.raises(error, match=message):
            btc_quantize(tree, policy=Policy(rules=(Rule("kernel", **rule),)))

    refused(r"kernel: axis 1 cannot be cut into 5 pieces, since it has 64 elements", pieces=(1, 5, 1))
    refused(r"kernel has the shape \[6, 64, 64\], and \(2, 2\) pieces are asked for", pieces=(2, 2))
    refused(r"says that kernel is a stack along \(3,\), and its shape is \[6, 64, 64\]", BTCPolicyError, stack=3)
    refused("stack is 'layers'; it is an axis, or a tuple", BTCPolicyError, stack="layers")
    refused("stack is 1.5", BTCPolicyError, stack=1.5)
    refused(r"stack is \(0, 0\)", BTCPolicyError, stack=(0, 0))
    refused("pieces is .*; it is a tuple of numbers of 1 or more", BTCPolicyError, pieces=(0, 1, 1))
    sharded = jax.device_put(
        np.ones((64, 64), np.float32), NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("model"))
    )
    many = {"kernel": np.zeros((2**17, 4), np.float32)}
    refused("kernel would be cut into 131,072 pieces; 65,536 are the most", tree=many, stack=0)
    refused(r"axis 0 cannot be cut into 2 pieces, since it lies in 4 shards", tree={"kernel": sharded}, pieces=(2, 1))


def test_shards_are_no_stack():
    packed = btc_quantize({"k": stack(64, 64)}, policy=Policy(rules=(Rule("k", pieces=(4, 1)),)))["k"]
    with pytest.raises(TypeError, match=r"lost an axis along which it is cut into shards.*Rule\(pattern, stack=0\)"):
        jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, packed)


@pytest.mark.parametrize(
    ("pieces", "stacks"),
    [([7, 1, 1], [0]), ([6, 1], [0]), ([6, 1, 1], [3]), ([6, 1, 1], [0, 0]), ([6, 0, 1], [0]), ([6, 1, 1], "0")],
)
def test_forged_cuts_are_refused(tmp_path, pieces, stacks):
    from btc_jax.checkpoint.errors import BTCFormatError
    from btc_jax.checkpoint.manifest import _cut

    with pytest.raises(BTCFormatError, match="leaf 'k' is cut into"):
        _cut([pieces, stacks], (6, 64, 64), 10**6, "k")
    assert _cut([[6, 1, 2], [0]], (6, 64, 64), 10**6, "k") == [[6, 1, 2], [0]]
    with pytest.raises(BTCFormatError, match="leaf 'k' is cut into"):
        _cut([[6, 1, 2], [0]], (6, 64, 64), 47, "k")
    with pytest.raises(BTCFormatError, match="leaf 'k' is cut into"):
        _cut([[2**17], []], (2**17,), 2**40, "k")


def test_changed_pieces_are_noticed():
    packed = packed_stack(stack(3, 32, 32))
    with pytest.raises(TypeError, match="was changed"):
        jax.tree.map(lambda array: array + 1, packed).dequantize()
    rows = [np.asarray(plane).copy() for plane in packed.planes]
    rows[-1][...] = 0xFFFFFFFF
    with pytest.raises(TypeError, match=r"was changed: its plane \d has \d+ rows with codes"):
        dataclasses.replace(packed, planes=tuple(rows)).dequantize()


def test_every_grid_has_its_own_places():
    assert list(Cut((2, 1, 2)).indices()) == list(itertools.product(range(2), range(1), range(2)))
