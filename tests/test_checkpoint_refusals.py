"""Concurrent writers, and what cannot be saved."""

import dataclasses
import os
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import (
    Uniform,
    btc_quantize,
    is_packed,
    load,
    open_checkpoint,
    save,
    verify,
)
from btc_jax.checkpoint import BTCFormatError
from btc_jax.checkpoint import files as files_module
from btc_jax.checkpoint.files import only_writer, temporary_of, whole_file
from btc_jax.packing import quantize_leaf
from tests.checkpoint_support import file as file


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
