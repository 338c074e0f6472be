"""Checkpoints as files: equal bytes, safetensors, shards, links."""

import json
import os
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from flax import nnx

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_metrics,
    btc_quantize,
    is_packed,
    load,
    open_checkpoint,
    save,
    verify,
)
from tests.checkpoint_support import file as file
from tests.checkpoint_support import params as params
from tests.checkpoint_support import same as same
from tests.golden import make


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors, as read by another safetensors reader."""
    with safetensors.safe_open(path, "np") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118


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
