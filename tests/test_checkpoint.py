"""Saved trees are restored: containers, dtypes, codecs, devices; and files follow the specification."""

from collections import OrderedDict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from btc_jax import (
    Policy,
    Uniform,
    btc_dequantize,
    btc_quantize,
    is_packed,
    load,
    open_checkpoint,
    save,
    verify,
)
from btc_jax.checkpoint import BTCFormatError, BTCTreeWarning
from tests.checkpoint_support import file as file
from tests.checkpoint_support import params as params
from tests.checkpoint_support import same as same
from tests.golden import make

ALL = Policy(Uniform(32), names=("*",), min_size=0)


SMALL = Policy(Uniform(32), min_size=0)


@pytest.mark.parametrize("name", make.TREES)
def test_golden_files_are_read_and_written_again(name, tmp_path):
    golden = sorted((make.FOLDER / name).iterdir())
    written = make.write(tmp_path, name)
    assert [file.name for file in written] == [file.name for file in golden]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(written, golden, strict=True))
    path = make.FOLDER / name / f"{name}.safetensors"
    assert verify(path).ok
    loaded = load(path)
    again = tmp_path / "again" / f"{name}.safetensors"
    again.parent.mkdir()
    make.write_tree(again.parent, name, loaded)
    for part in golden:
        assert (again.parent / part.name).read_bytes() == part.read_bytes()


def test_golden_values(tmp_path):
    loaded = load(make.FOLDER / "dense" / "dense.safetensors")
    same(loaded, make.dense())
    codecs, original = load(make.FOLDER / "shards" / "shards.safetensors"), make.codecs()
    same(codecs, original)
    for name, leaf in codecs.items():
        assert np.array_equal(leaf.dequantize(), original[name].dequantize()), name
    assert float(jnp.abs(codecs["zeros"].dequantize()).max()) == 0


class Point(make.Point):
    pass


@struct.dataclass
class Layer:
    kernel: Any
    name: str = struct.field(pytree_node=False, default="a")


def test_containers(file):
    more = {"layer": Layer(kernel=np.ones(3)), "ordered": OrderedDict(b=1, a=2), "nothing": None}
    with pytest.warns(BTCTreeWarning, match=r"layer.*Layer.*point.*Point"):
        save(file, make.containers() | more)
    loaded, wanted = load(file), make.containers()
    assert loaded["list"][1:] == [(np.int32(2),), [], ()]
    assert type(loaded["point"]).__name__ == "Point"
    assert loaded["point"]._fields == ("x", "y")
    same(loaded["point"].y, wanted["point"].y)
    assert isinstance(loaded["state"], nnx.State)
    assert isinstance(loaded["state"]["layer"]["mean"], nnx.BatchStat)
    same(loaded["state"], wanted["state"])
    assert (loaded["empty"], loaded["nothing"]) == ({}, None)
    assert list(loaded["numbers"]) == [1, 3]
    assert loaded["dots"]["a.b"]["c/d"] == 1
    assert set(loaded["layer"]) == {"kernel"}
    assert loaded["ordered"] == OrderedDict(b=1, a=2)
    assert type(loaded["ordered"]) is OrderedDict


@pytest.mark.parametrize("tree", [None, {}, [], (), 3, "text", np.ones(3), {"a": None}, [[[]], ()]], ids=str)
def test_the_smallest_trees(tree, file):
    save(file, tree)
    loaded = load(file)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    same(loaded, tree)


def test_dtypes(file):
    tree = make.dense()
    save(file, tree)
    loaded = load(file)
    same(loaded, tree)
    assert isinstance(loaded["bfloat16"], jax.Array)
    assert isinstance(loaded["int4"], jax.Array)
    assert isinstance(loaded["int64"], np.ndarray)  # jax would truncate it to 32 bits
    assert isinstance(loaded["complex128"], np.ndarray)
    assert jax.random.normal(loaded["key"]) == jax.random.normal(jax.random.key(7))


@pytest.mark.parametrize("value", [True, False, 0, -1, 2**200, 0.1, float("inf"), float("nan"), 1e-320, "", "ß\n\0"])
def test_python_values(value, file):
    save(file, {"a": value})
    same(load(file), {"a": value})


def test_layouts_in_memory(file):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"transposed": array.T, "strided": array[:, ::2], "fortran": np.asfortranarray(array), "0d": array[0, 0, 0]}
    swapped = {
        "big_endian": array.astype(">f4"),
        "big_complex": array.astype(">c8"),
        "big_int": np.arange(3, dtype=">i2"),
    }
    save(file, views | swapped)
    loaded = load(file)
    for name, view in (views | swapped).items():
        assert np.array_equal(loaded[name], view), name


def test_a_leaf_of_many_axes(file):
    save(file, {"a": np.ones((1,) * 20 + (3,), np.float32)})
    assert load(file)["a"].ndim == 21


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(64)(x))))


def test_linen_variables(file):
    x = jnp.ones((2, 32))
    variables = Net().init(jax.random.key(0), x)
    packed = btc_quantize(variables, policy=SMALL)
    apply: Any = Net().apply
    for tree in (variables, packed, freeze(packed)):
        save(file, tree)
        loaded = load(file)
        assert jnp.array_equal(apply(loaded, x), apply(tree, x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(32, 64, rngs=rngs), nnx.BatchNorm(64, use_running_average=True, rngs=rngs)
        self.dropout, self.last = nnx.Dropout(0.5, deterministic=True, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("pack", [False, True])
def test_nnx_states(file, pack):
    graphdef, state = nnx.split(NNXNet(nnx.Rngs(0)))
    tree = btc_quantize(state, policy=SMALL) if pack else state
    save(file, tree)
    loaded = load(file)
    assert isinstance(loaded, nnx.State)
    same(loaded, tree)
    x = jnp.ones((2, 32))
    assert np.array_equal(nnx.merge(graphdef, loaded)(x), nnx.merge(graphdef, tree)(x))
    again = load(file, like=tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)  # including the tags of its variables
    same(again, tree)


def test_a_deep_tree(file):
    def deep(depth):
        tree = np.float32(1)
        for _ in range(depth):
            tree = {"a": tree}
        return tree

    save(file, deep(50))
    same(load(file), deep(50))
    with pytest.raises(TypeError, match="containers deep"):
        save(file, deep(250))
    same(load(file), deep(50))


def test_like_gives_its_structure(file):
    tree = btc_quantize({"layers": [Layer(kernel=params()), Point(np.ones(3, np.float32), np.int32(2))]}, policy=ALL)
    with pytest.warns(BTCTreeWarning):
        save(file, tree)
    for like in (tree, jax.eval_shape(lambda: btc_dequantize(tree))):
        loaded = load(file, like=like)
        assert isinstance(loaded["layers"][0], Layer)
        assert type(loaded["layers"][1]) is Point
        assert is_packed(loaded["layers"][0].kernel["Dense_0"]["kernel"])
        if like is tree:
            same(loaded, tree)


def test_like_lists_all_that_does_not_fit(file):
    save(file, btc_quantize(params(), policy=ALL) | {"only_saved": np.ones(2), "number": 1})
    like: Any = params()
    like["Dense_0"]["kernel"] = np.ones((3, 3), np.float32)
    like["Dense_1"]["bias"] = np.ones(32, np.int32)
    like |= {"only_wanted": np.ones(3), "number": "text"}
    with pytest.raises(ValueError, match="does not fit `like`") as error:
        load(file, like=like)
    message = str(error.value)
    assert "missing only_wanted" in message
    assert "extra only_saved" in message
    assert "Dense_0/kernel is float32[64, 96], wanted float32[3, 3]" in message
    assert "Dense_1/bias is float32[32], wanted int32[32]" in message
    assert "number is int[], wanted str[]" in message
    assert "Dense_0/bias" not in message
    assert not isinstance(error.value, BTCFormatError)


def test_select(file):
    save(file, btc_quantize(params(), Uniform(32)))
    assert list(load(file, select="*/bias")) == ["Dense_0/bias", "Dense_1/bias"]
    assert set(load(file, select=["Dense_0/*", "*/kernel"])) == {"Dense_0/bias", "Dense_0/kernel", "Dense_1/kernel"}
    with pytest.raises(ValueError, match="matches none of the 4 leaves"):
        load(file, select="nothing")


def test_dense(file):
    tree = btc_quantize(params(), Uniform(32))
    save(file, tree)
    same(load(file, dense=True), btc_dequantize(tree))
    with open_checkpoint(file) as checkpoint:
        assert np.array_equal(checkpoint.read("Dense_0/kernel", dense=True), tree["Dense_0"]["kernel"].dequantize())
        with pytest.raises(KeyError, match="no leaf 'Dense_9'"):
            checkpoint.read("Dense_9")


def test_devices_and_shardings(file):
    tree = btc_quantize(params(), Uniform(32))
    save(file, tree | {"key": jax.random.key(1), "number": 1, "long": np.ones(3)})
    mesh = jax.make_mesh((8,), ("x",))
    device, sharding = jax.devices()[3], NamedSharding(mesh, PartitionSpec("x"))
    for leaf in jax.tree.leaves(load(file, device=device, select=["Dense*", "key"])):
        assert leaf.devices() == {device}
    loaded = load(file, device=SingleDeviceSharding(device))
    assert loaded["key"].devices() == {device}
    loaded = load(file, device=sharding, select="Dense_0/*", dense=True)
    assert loaded["Dense_0/kernel"].sharding == sharding
    assert np.array_equal(loaded["Dense_0/kernel"], tree["Dense_0"]["kernel"].dequantize())
    loaded = load(file, device=sharding, select="Dense_0/*")
    assert loaded["Dense_0/bias"].sharding == sharding
    planes = loaded["Dense_0/kernel"].planes
    assert all(plane.sharding.is_fully_replicated and len(plane.devices()) == 8 for plane in planes)
    loaded = load(file, device=lambda path: device if path.endswith("bias") else None)
    assert loaded["Dense_1"]["bias"].devices() == {device}
    save(file, load(file, device=sharding, select="Dense_0/*", dense=True))
    assert np.array_equal(load(file)["Dense_0/kernel"], tree["Dense_0"]["kernel"].dequantize())
