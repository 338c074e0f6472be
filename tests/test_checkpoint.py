"""Saved trees are restored: containers, dtypes, codecs, devices; and files follow the specification."""

import dataclasses
import json
import os
import shutil
import stat
from collections import OrderedDict, namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx, struct
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_dequantize,
    btc_metrics,
    btc_quantize,
    is_packed,
    load,
    open_checkpoint,
    save,
    verify,
)
from btc_jax.checkpoint import BTCFormatError, BTCTreeWarning
from btc_jax.checkpoint import files as files_module
from btc_jax.checkpoint.files import only_writer, temporary_of, whole_file
from btc_jax.packing import quantize_leaf
from tests.golden import make

ALL = Policy(Uniform(32), names=("*",), min_size=0)
SMALL = Policy(Uniform(32), min_size=0)


def same(a: Any, b: Any) -> None:
    """Check that two trees have the same leaves, bit for bit."""
    leaves = [jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)[0] for tree in (a, b)]
    assert [keys for keys, _ in leaves[0]] == [keys for keys, _ in leaves[1]]
    for (_, x), (_, y) in zip(*leaves, strict=True):
        same_leaf(x, y)


def same_leaf(x: Any, y: Any) -> None:
    if is_packed(x):
        assert (x.shape, x.dtype, x.format, x.order) == (y.shape, y.dtype, y.format, y.order)
        same([*x.planes, x.header], [*y.planes, y.header])
    elif isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        assert x.dtype == y.dtype
        assert np.array_equal(jax.random.key_data(x), jax.random.key_data(y))
    elif isinstance(x, jax.Array | np.ndarray | np.generic):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    else:
        assert type(x) is type(y)
        assert x == y or x != x


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "m.safetensors"


def params(sizes=(64, 96, 32)):
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal(shape).astype(np.float32) for shape in pairwise(sizes)]
    return {f"Dense_{i}": {"kernel": k, "bias": np.ones(k.shape[1], np.float32)} for i, k in enumerate(kernels)}


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors, as read by another safetensors reader."""
    with safetensors.safe_open(path, "np") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118


# Golden files


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
    for file in golden:
        assert (again.parent / file.name).read_bytes() == file.read_bytes()


def test_golden_values(tmp_path):
    loaded = load(make.FOLDER / "dense" / "dense.safetensors")
    same(loaded, make.dense())
    codecs, original = load(make.FOLDER / "shards" / "shards.safetensors"), make.codecs()
    same(codecs, original)
    for name, leaf in codecs.items():
        assert np.array_equal(leaf.dequantize(), original[name].dequantize()), name
    assert float(jnp.abs(codecs["zeros"].dequantize()).max()) == 0


# Round trips


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


# Templates, selections, devices


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


# The file


def test_same_content_same_bytes(tmp_path):
    tree = btc_quantize(params(), Uniform(32))
    turned = {name: dict(reversed(layer.items())) for name, layer in reversed(tree.items())}
    on_device = jax.device_put(tree, jax.devices()[2])
    state = nnx.State({"b": nnx.Param(np.ones(2)), "a": nnx.Param(np.zeros(3))})
    turned_state = nnx.State({"a": nnx.Param(np.zeros(3)), "b": nnx.Param(np.ones(2))})
    same_files = {"first": tree, "second": turned, "third": on_device}
    for name, content in (same_files | {"state": state, "turned": turned_state}).items():
        save(tmp_path / name, content)
    first, second, third, one, two = ((tmp_path / name).read_bytes() for name in (*same_files, "state", "turned"))
    assert first == second == third
    assert one == two


@pytest.mark.filterwarnings("ignore::btc_jax.checkpoint.BTCTreeWarning")
@pytest.mark.parametrize("name", ["dense", "codecs", "containers"])
def test_it_is_a_safetensors_file(name, file):
    tree = make.TREES[name][0]()
    size = save(file, tree)
    assert size == file.stat().st_size
    with open_checkpoint(file) as checkpoint, safetensors.safe_open(file, "np") as plain:
        tensors = {t.name: t for record in checkpoint.records.values() for t in record.tensors}
        assert set(plain.keys()) == set(tensors)
        assert set(plain.metadata()) == {"btc_jax", "btc_jax_crc32c"}
        for name, tensor in tensors.items():
            ours = checkpoint.read_tensor(tensor)
            place = checkpoint._files[0].start + checkpoint._files[0].places[name]
            assert place % tensor.numpy_dtype.itemsize == 0
            if tensor.code in ("BF16", "F8_E4M3", "F8_E5M2"):  # not of numpy
                theirs = np.frombuffer(file.read_bytes(), tensor.numpy_dtype, ours.size, place).reshape(tensor.shape)
                assert plain.get_slice(name).get_shape() == list(tensor.shape)
                assert plain.get_slice(name).get_dtype() == tensor.code
            else:
                theirs = plain.get_tensor(name)
            assert (ours.shape, ours.dtype, ours.tobytes()) == (theirs.shape, theirs.dtype, theirs.tobytes()), name


@pytest.mark.parametrize("shards", [None, 10_000])
def test_sizes_agree(shards, file):
    dense = params((64, 128, 96, 32))
    packed = btc_quantize(dense, policy=Policy(Uniform(32), rules=(Rule("Dense_1/*", None),)))
    size = save(file, packed, max_shard_bytes=shards)
    files = sorted(file.parent.iterdir())
    assert size == sum(path.stat().st_size for path in files)
    in_files = sum(tensor_bytes(path) for path in files if path.suffix == ".safetensors")
    of_leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(packed, is_leaf=is_packed))
    with open_checkpoint(file) as checkpoint:
        by_record = sum(record.nbytes for record in checkpoint.records.values())
        assert in_files == of_leaves == checkpoint.nbytes == by_record == verify(file).nbytes
    assert btc_metrics(dense, packed).bytes_after == of_leaves


def test_lazy_reads_read_only_their_bytes(file, monkeypatch):
    save(file, btc_quantize(params(), Uniform(32)))
    read, preadv = [], os.preadv

    def counted(handle, buffers, offset):
        read.append(preadv(handle, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    with open_checkpoint(file) as checkpoint:
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert sum(read) == 8 + header
        for path, record in checkpoint.records.items():
            read.clear()
            checkpoint.read(path)
            assert sum(read) == record.nbytes
    read.clear()
    load(file, select="Dense_0/bias")
    assert sum(read) == 8 + header + 4 * 96


# Several files


def test_shards(tmp_path, file):
    tree = btc_quantize(params((64, 96, 32, 48)), Uniform(32))
    save(file, tree)
    whole = load(file)
    for limit in (1, 2000, 10**9):
        save(file, tree, max_shard_bytes=limit)
        assert not file.exists()
        shards = sorted(tmp_path.glob("*.safetensors"))
        with open_checkpoint(file) as checkpoint:
            sizes = {path: tensor_bytes(path) for path in shards}
            largest = max(record.nbytes for record in checkpoint.records.values())
            assert len(shards) == (6 if limit == 1 else 1 if limit == 10**9 else len(shards))
            assert all(size <= max(limit, largest) for size in sizes.values())
        same(load(file), whole)
        same(load(tmp_path / "m.safetensors.index.json"), whole)
        assert verify(file).ok
        assert set(load(file, select="*bias")) == {f"Dense_{i}/bias" for i in range(3)}
    index = tmp_path / "m.safetensors.index.json"
    weight_map = json.loads(index.read_bytes())["weight_map"]
    for shard in shards:
        with safetensors.safe_open(shard, "np") as plain:
            assert set(plain.keys()) == {name for name, home in weight_map.items() if home == shard.name}
    save(file, tree)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    same(load(file), whole)


def test_checkpoints_side_by_side(tmp_path):
    names = ["m.safetensors", "m-2.safetensors", "n.safetensors", "m[1].safetensors", ".m.safetensors", "m"]
    for round_ in range(2):
        for i, name in enumerate(names):
            save(tmp_path / name, {"a": np.full(9, i + round_), "b": i}, max_shard_bytes=None if name == "m" else 10)
    for i, name in enumerate(names):
        assert load(tmp_path / name)["a"][0] == i + 1
    assert len(os.listdir(tmp_path)) == 3 * 5 + 1


@pytest.mark.parametrize("name", ["m", "m.v1", "m.safetensors.bin", ".safetensors"])
def test_names_for_several_files(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save(tmp_path / name, {"a": 1}, max_shard_bytes=10)
    assert not os.listdir(tmp_path)


def test_the_name_of_an_index_is_no_place_to_save(tmp_path):
    for shards in (None, 10):
        with pytest.raises(ValueError, match=r"without \.index\.json"):
            save(tmp_path / "m.safetensors.index.json", {"a": 1}, max_shard_bytes=shards)
    assert not os.listdir(tmp_path)


def test_too_many_shards_or_leaves(tmp_path, file):
    save(file, {"old": 1})
    many = {f"a{i:04}": np.uint8(1) for i in range(4200)}
    with pytest.raises(ValueError, match="raise max_shard_bytes"):
        save(file, many, max_shard_bytes=1)
    with pytest.raises(ValueError, match="must be 1 or more"):
        save(file, many, max_shard_bytes=0)
    long = {f"{i:04}" * 25_000: np.uint8(1) for i in range(170)}
    with pytest.raises(ValueError, match="split the file with max_shard_bytes"):
        save(file, long)
    with pytest.raises(ValueError, match="save parts of the tree apart"):
        save(file, {f"{i:04}" * 25_000: np.uint8(1) for i in range(340)}, max_shard_bytes=50)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert load(file) == {"old": 1}


# Paths, permissions, other writers


def test_umask_and_links(tmp_path, file):
    (tmp_path / "real").mkdir()
    file.symlink_to(tmp_path / "real" / "file.safetensors")
    before = os.umask(0o027)
    try:
        for shards in (None, 10, None):
            save(str(file), {"a": np.ones(3), "b": 2}, max_shard_bytes=shards)
            assert file.is_symlink()
            assert load(file)["b"] == 2
            assert set(os.listdir(tmp_path)) == {"real", file.name}
            for written in (tmp_path / "real").iterdir():
                assert stat.S_IMODE(written.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_links_of_the_hubs_cache(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save(tmp_path / "made" / "m.safetensors", params(), max_shard_bytes=1000)
    for i, made in enumerate((tmp_path / "made").iterdir()):
        blob = tmp_path / "blobs" / f"{i}abc"
        shutil.copy(made, blob)
        (tmp_path / "snapshot" / made.name).symlink_to(blob)
    same(load(tmp_path / "snapshot" / "m.safetensors"), load(tmp_path / "made" / "m.safetensors"))
    same(load(tmp_path / "snapshot" / "m.safetensors.index.json"), load(tmp_path / "made" / "m.safetensors"))


@pytest.mark.parametrize("shards", [None, 10])
def test_concurrent_writers(file, shards):
    save(file, {"a": 1})
    with only_writer(file), pytest.raises(BlockingIOError, match="another process is writing it"):
        save(file, {"a": 2}, max_shard_bytes=shards)
    assert load(file) == {"a": 1}
    with whole_file(file) as first:
        first.write(b"half")
        with pytest.raises(BlockingIOError, match="another process is writing it"), whole_file(file):
            pass
        assert load(file) == {"a": 1}
        first.seek(0)
        first.truncate()
        first.write(file.read_bytes())
    assert load(file) == {"a": 1}
    save(file, {"a": 3}, max_shard_bytes=shards)
    assert load(file) == {"a": 3}


def test_a_lock_on_a_file_that_moved_away_locks_nothing(file, monkeypatch):
    """The previous writer may finish between the open and the lock; then the open file is the checkpoint itself."""
    fcntl = files_module.fcntl
    save(file, {"a": 1})
    content, flock, moved = file.read_bytes(), fcntl.flock, []
    temporary = temporary_of(file)

    def slow(handle, how):
        if temporary.exists() and not moved:
            temporary.write_bytes(content)
            temporary.rename(file)
            moved.append(handle)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(KeyboardInterrupt), whole_file(file):
        raise KeyboardInterrupt
    assert moved
    assert load(file) == {"a": 1}
    assert os.listdir(file.parent) == [file.name]


# What cannot be stored

WRONG = {
    "object": (TypeError, lambda: {"a": object()}, "a is <object"),
    "function": (TypeError, lambda: {"f": len}, "f is <built-in"),
    "bytes": (TypeError, lambda: {"b": b"abc"}, "b is b'abc'"),
    "text array": (TypeError, lambda: {"t": np.array(["a"])}, "only arrays"),
    "objects": (TypeError, lambda: {"o": np.array([{}], object)}, "only arrays"),
    "dates": (TypeError, lambda: {"d": np.array(["2020-01-01"], "M8[D]")}, "only arrays"),
    "records": (TypeError, lambda: {"r": np.zeros(3, [("x", "f4")])}, "only arrays"),
    "long double": (TypeError, lambda: {"l": np.ones(2, np.longdouble)}, "only arrays"),
    "shape only": (TypeError, lambda: {"s": jax.ShapeDtypeStruct((2,), jnp.float32)}, "s is ShapeDtypeStruct"),
    "long text": (TypeError, lambda: {"s": "x" * 100_000}, "only arrays"),
    "tuple key": (TypeError, lambda: {(1, 2): np.ones(2)}, "neither text nor a whole number"),
    "path up": (ValueError, lambda: {"..": {"..": {"x": 1}}}, "rename it"),
    "root": (ValueError, lambda: {"/etc": 1}, "rename it"),
    "nul": (ValueError, lambda: {"a\0": 1}, "rename it"),
    "metadata": (ValueError, lambda: {"__metadata__": np.ones(2)}, "rename it"),
    "one path": (ValueError, lambda: {"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "path"),
    "one path of numbers": (ValueError, lambda: {"a/b": 1, "a": {"b": 2}}, "path"),
    "axes": (ValueError, lambda: {"a": np.ones((1,) * 40)}, "impossible shape"),
    "empty and huge": (ValueError, lambda: {"a": np.ones((0, 2**31, 2**31), np.uint8)}, "impossible shape"),
    "fields": (ValueError, lambda: namedtuple("Wide", [f"f{i}" for i in range(300)])(*range(300)), "fields"),
}


@pytest.mark.filterwarnings("ignore::btc_jax.checkpoint.BTCTreeWarning")
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("shards", [None, 10])
def test_what_cannot_be_stored_is_named_and_nothing_is_touched(name, shards, file):
    error, tree, message = WRONG[name]
    save(file, {"old": 1}, max_shard_bytes=shards)
    before = {path: path.read_bytes() for path in file.parent.iterdir()}
    with pytest.raises(error, match=message):
        save(file, tree(), max_shard_bytes=shards)
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == before


def test_nothing_there(tmp_path):
    for function in (load, verify, open_checkpoint):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "none.safetensors")
    with pytest.raises(BTCFormatError, match="folder"):
        load(tmp_path)


def test_records(file):
    save(file, {"a": quantize_leaf(jnp.ones((4, 8)), Uniform(8)), "b": 1})
    with open_checkpoint(str(file)) as checkpoint:
        record = checkpoint.records["a"]
        assert (record.kind, record.shape, record.dtype) == ("packed", (4, 8), "float32")
        assert record.details["codec"]["id"] == "uniform"
        assert checkpoint.records["b"].kind == "python"
        assert dataclasses.is_dataclass(record)
    checkpoint.close()


@pytest.mark.parametrize("shards", [None, 1000])
@pytest.mark.parametrize("content", [b'{"metadata": {"total_size": 1}, "weight_map": {}}', b"damaged"])
def test_the_index_of_another_system_is_left_alone(tmp_path, shards, content):
    index = tmp_path / "m.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(FileExistsError, match="not the index of a compressed checkpoint; save under another name"):
        save(tmp_path / "m.safetensors", {"a": 1}, max_shard_bytes=shards)
    assert index.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [index.name]


def test_one_file_of_several_can_be_read_alone(tmp_path):
    tree = {name: np.full(300, float(i), np.float32) for i, name in enumerate("abc")}
    save(tmp_path / "m.safetensors", tree, max_shard_bytes=1300)
    shards = sorted(tmp_path.glob("m-*.safetensors"))
    with open_checkpoint(shards[1]) as shard:
        assert list(shard.records) == ["b"]
        assert np.array_equal(shard.read("b"), tree["b"])
    assert list(load(shards[1], select="*")) == ["b"]
    with pytest.raises(BTCFormatError, match="one of several files; open their index"):
        load(shards[1])


def test_permissions_of_a_replaced_file_stay(tmp_path):
    save(tmp_path / "m.safetensors", {"a": 1})
    (tmp_path / "m.safetensors").chmod(0o600)
    save(tmp_path / "m.safetensors", {"a": 2})
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o600


def test_masked_arrays_are_refused(tmp_path):
    with pytest.raises(TypeError, match="MaskedArray"):
        save(tmp_path / "m.safetensors", {"a": np.ma.masked_array([1.0, 2.0], [True, False])})


def test_an_interrupt_after_the_index_is_in_place_keeps_the_new_checkpoint(tmp_path, monkeypatch):
    from btc_jax.checkpoint import files

    path, flush = tmp_path / "m.safetensors", files.flush_folder
    index = tmp_path / "m.safetensors.index.json"
    save(path, {"a": np.zeros(300)}, max_shard_bytes=100)
    before = index.read_bytes()

    def interrupted(folder):
        flush(folder)
        if index.read_bytes() != before:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"a": np.ones(300)}, max_shard_bytes=10_000)
    monkeypatch.undo()
    assert load(path)["a"][0] == 1.0


def test_an_open_checkpoint_is_a_mapping(tmp_path):
    tree = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": btc_quantize({"kernel": jnp.ones((64, 64))})}
    save(tmp_path / "m.safetensors", tree)
    with open_checkpoint(tmp_path / "m.safetensors") as one, open_checkpoint(tmp_path / "m.safetensors") as other:
        assert (list(one), len(one)) == (["a/kernel", "b/kernel"], 2)
        np.testing.assert_array_equal(one["a/kernel"], tree["a"]["kernel"])
        assert {path: is_packed(leaf) for path, leaf in one.items()} == {"a/kernel": False, "b/kernel": True}
        assert "a/kernel" in one
        assert one.get("c") is None
        assert one == one
        assert one != other
        assert repr(one).endswith(f"m.safetensors': 2 leaves, 1 packed, {one.nbytes:,} bytes)")
