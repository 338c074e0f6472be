"""The files read here are written by numpy, flax, safetensors and Orbax themselves, as oracles."""

import gzip
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import sys
import tarfile
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

import btc_jax
from btc_jax.sources import Origin, SourceLeaf, open_source

NATIVE = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
DTYPES = {str(np.dtype(kind)): np.dtype(kind) for kind in [*NATIVE, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]}
ODD = [jnp.complex64, np.complex128, jnp.int4, jnp.float8_e8m0fnu, jnp.float8_e4m3fnuz, jnp.float4_e2m1fn]
ODD = {np.dtype(kind).name: np.dtype(kind) for kind in ODD}
"""Numbers that stay as they are."""


def arrays(dtypes, shapes=((3, 4), (), (0, 5))):
    values = np.random.default_rng(0).integers(0, 2, 12)
    return {
        f"{name}.{i}": values[: np.prod(shape, dtype=int)].reshape(shape).astype(dtype)
        for name, dtype in dtypes.items()
        for i, shape in enumerate(shapes)
    }


def assert_holds(source, expected):
    assert {leaf.path for leaf in source.leaves} == set(expected)
    for leaf in source.leaves:
        values, right = source.read(leaf.path), expected[leaf.path]
        assert type(values) is np.ndarray
        assert (values.shape, values.dtype) == (leaf.shape, leaf.dtype) == (right.shape, right.dtype)
        assert values.tobytes() == right.tobytes()


def as_bytes(values):
    return np.frombuffer(values.tobytes(), np.uint8)


def raw(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(dtype: Any = "F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def small():
    return {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "conv.bias": np.ones(2, np.float16)}


@pytest.fixture
def shards(tmp_path, small):
    for number, (name, values) in enumerate(small.items(), 1):
        save_file({name: values}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(small, 1)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def refused(path, *words, kind: type[Exception] = ValueError):
    with pytest.raises(kind) as caught:
        open_source(path)
    assert type(caught.value) is kind
    for word in (path.name, *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def bytes_read():
    """How many bytes this process has read from files so far, including Python's buffering."""
    if not os.path.exists("/proc/self/io"):
        pytest.skip("only Linux counts the bytes that a process reads")
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


class TestSafetensors:
    def test_every_dtype(self, tmp_path):
        expected = arrays(DTYPES)
        save_file(expected, tmp_path / "all.safetensors", metadata={"format": "np"})
        with open_source(tmp_path / "all.safetensors") as source:
            assert_holds(source, expected)

    @pytest.mark.parametrize(
        ("code", "dtype"),
        [
            ("C64", "complex64"),
            ("F8_E8M0", "float8_e8m0fnu"),
            ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
            ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        ],
    )
    def test_dtypes_that_safetensors_for_numpy_does_not_write(self, tmp_path, code, dtype):
        values = np.arange(16, dtype=np.uint8).view(jnp.dtype(dtype))
        data = raw({"a": entry(code, values.shape, (0, 16))}, values.tobytes())
        (tmp_path / "x.safetensors").write_bytes(data)
        with open_source(tmp_path / "x.safetensors") as source:
            assert_holds(source, {"a": values})
            assert source.leaves[0].note == ("" if code == "C64" else dtype)

    @pytest.mark.parametrize(("code", "nbytes"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
    def test_dtypes_whose_elements_share_bytes(self, tmp_path, code, nbytes):
        data = raw(
            {"a": entry(code, (2, 4), (0, nbytes)), "b": entry(offsets=(nbytes, nbytes + 8))}, bytes(range(nbytes + 8))
        )
        (tmp_path / "x.safetensors").write_bytes(data)
        with open_source(tmp_path / "x.safetensors") as source:
            leaf = SourceLeaf("a", (nbytes,), np.dtype(np.uint8), Origin(code, (2, 4)))
            assert (source.leaves[0], leaf.note) == (leaf, code)
            assert source.read("a").tolist() == list(range(nbytes))
            assert source.read("b").tobytes() == bytes(range(nbytes, nbytes + 8))

    def test_order_is_that_of_the_file(self, tmp_path):
        data = raw({"b": entry(offsets=(8, 16)), "a": entry(offsets=(16, 24)), "c": entry()}, bytes(24))
        (tmp_path / "x.safetensors").write_bytes(data)
        assert [leaf.path for leaf in open_source(tmp_path / "x.safetensors").leaves] == ["c", "b", "a"]

    def test_folder_without_an_index(self, tmp_path, small):
        save_file(small, tmp_path / "model.safetensors")
        with open_source(str(tmp_path)) as source:
            assert_holds(source, small)

    def test_known_by_content(self, tmp_path, small):
        save_file(small, tmp_path / "download")
        assert_holds(open_source(tmp_path / "download"), small)

    def test_reads_no_more_than_the_leaf(self, tmp_path):
        file = tmp_path / "big.safetensors"
        save_file({"big": np.zeros(10**6, np.float32), "small": np.ones(10**4, np.float32)}, file)
        start = bytes_read()
        with open_source(file) as source:
            opened = bytes_read()
            assert source.read("small").sum() == 10**4
        assert opened - start < 20_000
        assert 40_000 <= bytes_read() - opened < 60_000

    def test_values_are_a_writable_copy(self, tmp_path, small):
        save_file(small, tmp_path / "x.safetensors")
        with open_source(tmp_path / "x.safetensors") as source:
            source.read("conv.bias")[:] = 7
            assert_holds(source, small)

    def test_truncated_anywhere(self, tmp_path, small):
        file = tmp_path / "x.safetensors"
        save_file(small, file)
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            refused(file, "again")

    def test_truncated_after_opening(self, tmp_path, small):
        file = tmp_path / "x.safetensors"
        save_file(small, file)
        with open_source(file) as source:
            os.truncate(file, file.stat().st_size - 4)
            with pytest.raises(ValueError, match="ends inside of"):
                source.read(source.leaves[-1].path)

    @pytest.mark.parametrize(
        ("data", "word"),
        [
            (raw({"a": entry("F128")}, bytes(8)), "'a' has dtype F128"),
            (raw({"a": entry("F4", (4,), (0, 4))}, bytes(4)), "a is said to lie at 0:4"),
            (raw({"a": entry("F6_E2M3", (2**60, 2**60))}, bytes(8)), "shape"),
            (raw({"a": entry("float32")}, bytes(8)), "float32"),
            (raw({"a": entry(["F32"])}, bytes(8)), "'a'"),
            (raw({"a": entry(shape=(3,))}, bytes(8)), "a is said to lie at 0:8"),
            (raw({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
            (raw({"a": entry(shape=(2.0,))}, bytes(8)), "shape"),
            (raw({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
            (raw({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "shape"),
            (raw({"a": entry(shape=(0, 2**63), offsets=(0, 0))}), "shape"),
            (raw({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4)), "shape"),
            (raw({"a": entry(offsets=(0, 8.0))}, bytes(8)), "not integers"),
            (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "-8:0"),
            (raw({"a": entry(offsets=(0, 8, 16))}, bytes(8)), "data_offsets"),
            (raw({"a": entry(), "b": entry()}, bytes(8)), "0:8"),
            (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "4:12"),
            (raw({"a": entry()}, bytes(9)), "1 bytes that belong to no tensor"),
            (raw({"a": 3}, bytes(8)), "'a'"),
            (raw(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
            (raw(b"[]"), "JSON"),
            (raw(b"[" + b"[]," * 10**6 + b"[]]"), "2000000 parts"),
            (raw(b"3"), "JSON"),
            (raw(b"{" + b'"a":{' * 10**5), "JSON"),
            (raw(b'{"\xff": 1}'), "JSON"),
            (raw({}, length=10**8 + 1), "header"),
            (b"{}", "truncated"),
            (b"", "truncated"),
        ],
    )
    def test_lies(self, tmp_path, data, word):
        (tmp_path / "x.safetensors").write_bytes(data)
        refused(tmp_path / "x.safetensors", word)

    def test_header_too_large(self, tmp_path):
        file = tmp_path / "x.safetensors"
        file.write_bytes(raw(b"{}", length=10**8 + 1))
        os.truncate(file, 2 * 10**8)
        refused(file, "100000001")


class TestIndex:
    def test_folder_and_index(self, shards, small):
        for path in (shards.parent, shards):
            with open_source(path) as source:
                assert_holds(source, small)

    def test_a_leaf_that_the_index_forgot_is_read(self, shards, small):
        shards.write_text(json.dumps({"weight_map": {"conv.bias": "model-2.safetensors"}}))
        save_file({"conv.bias": small["conv.bias"], "extra": np.ones(3)}, shards.parent / "model-2.safetensors")
        assert [leaf.path for leaf in open_source(shards).leaves] == ["extra", "conv.bias"]

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b"])
    def test_names_outside_of_the_folder(self, shards, name):
        shards.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(shards, repr(name), "plain names")

    def test_shard_missing(self, shards):
        (shards.parent / "model-2.safetensors").unlink()
        refused(shards, "model-2.safetensors", "missing", kind=FileNotFoundError)

    def test_tensor_missing(self, shards, small):
        save_file({"other": small["conv.bias"]}, shards.parent / "model-2.safetensors")
        refused(shards, "'conv.bias'", "model-2.safetensors")

    def test_tensor_in_two_shards(self, shards, small):
        save_file(small, shards.parent / "model-2.safetensors")
        refused(shards, "two leaves named 'conv.weight'")

    @pytest.mark.parametrize("text", ['{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}", "[]", "{", ""])
    def test_no_index(self, shards, text):
        shards.write_text(text)
        refused(shards)

    def test_entry_twice(self, shards):
        name = "model-1.safetensors"
        shards.write_text(f'{{"weight_map": {{"conv.weight": "{name}", "conv.weight": "{name}"}}}}')
        refused(shards, "'conv.weight' occurs twice")

    def test_shards_without_an_index(self, shards):
        shards.unlink()
        refused(shards.parent, "2 files", "no index")


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_every_dtype(self, tmp_path, save):
        expected = arrays({kind: np.dtype(kind) for kind in NATIVE}) | {"a/b": np.ones((2, 2)), "T": np.ones((2, 3)).T}
        save(tmp_path / "x.npz", **expected)
        with open_source(tmp_path / "x.npz") as source:
            assert [leaf.path for leaf in source.leaves] == list(expected)
            assert_holds(source, expected)

    def test_foreign_byte_order(self, tmp_path):
        np.savez(tmp_path / "x.npz", a=np.arange(3, dtype=">f4"))
        with open_source(tmp_path / "x.npz") as source:
            assert_holds(source, {"a": np.arange(3, dtype=np.float32)})

    def test_known_by_content(self, tmp_path):
        np.savez(tmp_path / "x.npz", a=np.ones(3))
        with open_source((tmp_path / "x.npz").rename(tmp_path / "download")) as source:
            assert_holds(source, {"a": np.ones(3)})

    def test_opening_reads_only_headers(self, tmp_path, monkeypatch):
        np.savez(tmp_path / "x.npz", a=np.ones(10**6), b=np.ones((2, 2)))
        monkeypatch.setattr(np.lib.format, "read_array", None)
        start = bytes_read()
        with open_source(tmp_path / "x.npz") as source:
            assert source.leaves[1] == SourceLeaf("b", (2, 2), np.dtype("f8"))
        assert bytes_read() - start < 40_000

    def test_pickles_are_not_opened(self, tmp_path):
        np.savez(tmp_path / "x.npz", odd=np.array([Unpickled()], object), weight=np.ones(2))
        with open_source(tmp_path / "x.npz") as source:
            assert source.leaves[0].origin == Origin("pickled", (1,))
            opcodes = [opcode.name for opcode, _, _ in pickletools.genops(source.read("odd").tobytes())]
            assert (opcodes[0], opcodes[-1]) == ("PROTO", "STOP")
            assert source.read("weight").tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("values", "what"), [(np.array([{}], object), "pickled"), (np.ones(3, jnp.bfloat16), "V2")]
    )
    def test_nothing_but_what_is_not_numbers(self, tmp_path, values, what):
        np.savez(tmp_path / "x.npz", leaf=values)
        refused(tmp_path / "x.npz", "leaf", what, "safetensors.flax.save_file")

    @pytest.mark.parametrize(
        ("values", "what"),
        [
            (np.ones(3, jnp.bfloat16), "V2 (dtype lost in .npz)"),
            (np.array("text"), "<U4"),
            (np.array([b"a", b"bc"]), "|S2"),
            (np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")]), "[('a', '<i4'), ('b', '<f8')]"),
            (np.array(["2020-01-01"], "M8[D]"), "datetime64[D]"),
            (
                np.zeros(2, [(f"field{i}", "i4") for i in range(9)]),
                str(np.dtype([(f"field{i}", "i4") for i in range(9)]))[:64],
            ),
            (np.zeros((0, 3), "V5"), "V5 (dtype lost in .npz)"),
        ],
    )
    def test_what_is_not_numbers_is_read_as_bytes(self, tmp_path, values, what):
        np.savez(tmp_path / "x.npz", leaf=values, weight=np.ones((2, 2)))
        with open_source(tmp_path / "x.npz") as source:
            assert_holds(source, {"leaf": as_bytes(values), "weight": np.ones((2, 2))})
            assert source.leaves[0].origin == Origin(what, values.shape)
            assert [leaf.note for leaf in source.leaves] == [what, ""]

    def test_complex_numbers_are_numbers(self, tmp_path):
        np.savez(tmp_path / "x.npz", leaf=np.array([1 + 2j]))
        with open_source(tmp_path / "x.npz") as source:
            assert_holds(source, {"leaf": np.array([1 + 2j])})

    def test_truncated_anywhere(self, tmp_path):
        np.savez(tmp_path / "x.npz", a=np.ones(3))
        whole = (tmp_path / "x.npz").read_bytes()
        for size in range(len(whole)):
            (tmp_path / "x.npz").write_bytes(whole[:size])
            refused(tmp_path / "x.npz", "damaged")

    def test_flipped_value(self, tmp_path):
        np.savez(tmp_path / "x.npz", a=np.arange(10_000.0))
        data = (tmp_path / "x.npz").read_bytes()
        at = data.index(np.float64(9_000).tobytes())
        (tmp_path / "x.npz").write_bytes(data[:at] + b"\1" + data[at + 1 :])
        with open_source(tmp_path / "x.npz") as source, pytest.raises(ValueError, match=r"damaged at a .*CRC"):
            source.read("a")

    def test_no_arrays_inside(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
            file.writestr("archive/data.pkl", b"")
        refused(tmp_path / "model.pt", "PyTorch", "safetensors.torch.save_file")
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
            file.write(tmp_path / "model.pt", "model.pt")
            file.writestr("a.npy", b"")
        refused(tmp_path / "x.npz", "model.pt")

    def test_array_larger_than_its_bytes(self, tmp_path):
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
            file.writestr("a.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(8))
        refused(tmp_path / "x.npz", "another size")

    def test_one_name_twice(self, tmp_path):
        np.save(tmp_path / "a.npy", np.ones(3))
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
            file.write(tmp_path / "a.npy", "a.npy")
            with pytest.warns(UserWarning, match="Duplicate"):
                file.write(tmp_path / "a.npy", "a.npy")
        refused(tmp_path / "x.npz", "two leaves named 'a'")


class TestMsgpack:
    @pytest.mark.parametrize("name", ["x.msgpack", "download"])
    def test_every_dtype(self, tmp_path, name):
        expected = arrays(DTYPES)
        tree = {"params": {"flat": expected, "list": [np.ones(2), {"deep": np.zeros(1)}], "none": None, "empty": {}}}
        (tmp_path / name).write_bytes(serialization.to_bytes(tree | {"step": 3, "rate": 0.5}))
        expected = {f"params/flat/{path}": values for path, values in expected.items()}
        expected |= {"params/list/0": np.ones(2), "params/list/1/deep": np.zeros(1)}
        with open_source(tmp_path / name) as source:
            assert_holds(source, expected | {"step": np.asarray(3), "rate": np.asarray(0.5)})

    def test_chunked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
        tree = {"a": np.arange(100, dtype=np.float32).reshape(10, 10)}
        (tmp_path / "x.msgpack").write_bytes(serialization.to_bytes(tree))
        assert_holds(open_source(tmp_path / "x.msgpack"), tree)

    def test_numbers_of_other_dtypes(self, tmp_path):
        expected = arrays(ODD)
        (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(expected))
        assert_holds(open_source(tmp_path / "x.msgpack"), expected)

    def test_text_is_read_as_bytes(self, tmp_path):
        tree = {"name": "caf\xe9\0", "raw": b"by\0", "weight": np.ones(2)}
        (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        with open_source(tmp_path / "x.msgpack") as source:
            assert {path: source.read(path).tobytes() for path in ("name", "raw")} == {
                "name": "caf\xe9\0".encode(),
                "raw": b"by\0",
            }
            assert [leaf.note for leaf in source.leaves] == ["str", "bytes", ""]

    def test_two_leaves_of_one_path(self, tmp_path):
        tree = {"a/b": np.ones(2), "a": {"b": np.ones(2)}}
        (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        refused(tmp_path / "x.msgpack", "two leaves named 'a/b'")

    def test_truncated_anywhere(self, tmp_path):
        whole = serialization.to_bytes({"a": np.ones(2), "b": {"c": np.zeros(1)}})
        for size in range(len(whole)):
            (tmp_path / "x.msgpack").write_bytes(whole[:size])
            refused(tmp_path / "x.msgpack", "msgpack")


class TestOrbax:
    @pytest.fixture
    def ocp(self):
        return pytest.importorskip("orbax.checkpoint")

    @pytest.fixture
    def expected(self):
        flat = {f"net/{name}": values for name, values in arrays(DTYPES, ((3, 4), ())).items()}
        return flat | {"net/list/0": np.ones((), np.float32), "net/list/1/deep": np.arange(4, dtype=np.float32)}

    @pytest.fixture
    def tree(self, expected):
        net = {path.removeprefix("net/"): values for path, values in expected.items() if "list" not in path}
        listed = [jnp.asarray(expected["net/list/0"]), {"deep": jnp.asarray(expected["net/list/1/deep"])}]
        return {"net": net | {"list": listed, "none": None}, "empty": {}}

    @pytest.mark.parametrize("ocdbt", [True, False])
    def test_every_dtype(self, ocp, tmp_path, tree, expected, ocdbt):
        with ocp.PyTreeCheckpointer(use_ocdbt=ocdbt) as writer:
            writer.save(tmp_path / "x", tree)
        with open_source(tmp_path / "x") as source:
            assert_holds(source, expected)

    def test_steps_of_a_manager(self, ocp, tmp_path, tree, expected):
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            for step in (1, 20):
                manager.save(step, args=ocp.args.StandardSave(tree))
        refused(tmp_path / "run", "2 Orbax checkpoints", "1, 20")
        for path in ("run/20", "run/20/default"):
            with open_source(tmp_path / path) as source:
                assert_holds(source, expected)

    def test_two_items(self, ocp, tmp_path, tree, expected):
        items = ocp.args.Composite(params=ocp.args.StandardSave(tree), state=ocp.args.StandardSave(tree))
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            manager.save(1, args=items)
        refused(tmp_path / "run" / "1", "params, state")
        with open_source(tmp_path / "run" / "1" / "params") as source:
            assert_holds(source, expected)

    def test_reads_no_more_than_the_leaf(self, ocp, tmp_path):
        values = np.random.default_rng(0).standard_normal((8, 2**18))
        with ocp.StandardCheckpointer() as writer:
            writer.save(tmp_path / "x", {f"leaf{i}": row for i, row in enumerate(values)})
        start = bytes_read()
        with open_source(tmp_path / "x") as source:
            opened = bytes_read()
            source.read("leaf3")
        assert opened - start < 2**20
        assert bytes_read() - opened < 1.5 * values[3].nbytes

    def test_text_is_read_as_bytes(self, ocp, tmp_path):
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / "x", {"a": jnp.ones(2), "name": "text", "z": {"other": "two", "n": 3}})
        with open_source(tmp_path / "x") as source:
            text = {path: source.read(path).tobytes() for path in ("name", "z/other")}
            assert text == {"name": b"text", "z/other": b"two"}
            assert {leaf.path: leaf.note for leaf in source.leaves if leaf.note} == {"name": "str", "z/other": "str"}
            assert (source.read("a").sum(), source.read("z/n")) == (2, 3)

    def test_numbers_of_other_dtypes(self, ocp, tmp_path):
        expected = arrays(ODD, ((3, 4), ()))
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / "x", {path: np.asarray(values) for path, values in expected.items()})
        with open_source(tmp_path / "x") as source:
            assert_holds(source, expected)

    @pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
    def test_damaged(self, ocp, tmp_path, name):
        # One leaf: if several fail at once, Orbax's own threads write tracebacks to stderr besides our error.
        with ocp.StandardCheckpointer() as writer:
            writer.save(tmp_path / "x", {"a": jnp.ones(3)})
        (tmp_path / "x" / name).write_bytes(b"\0\1\2")
        refused(tmp_path / "x", "damaged")

    def test_damaged_after_opening(self, ocp, tmp_path):
        with ocp.StandardCheckpointer() as writer:
            writer.save(tmp_path / "x", {"a": jnp.ones(3)})
        with open_source(tmp_path / "x") as source:
            before = source.fingerprint()
            shutil.rmtree(tmp_path / "x" / "d")
            (tmp_path / "x" / "manifest.ocdbt").unlink()
            assert source.fingerprint() != before
            with pytest.raises(ValueError, match="damaged at a"):
                source.read("a")

    def test_without_metadata(self, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "manifest.ocdbt").touch()
        refused(tmp_path / "x", "_METADATA")

    def test_unfinished(self, tmp_path):
        folder = tmp_path / "1.orbax-checkpoint-tmp"
        folder.mkdir()
        refused(folder, "did not finish")

    def test_orbax_not_installed(self, tmp_path, monkeypatch):
        (tmp_path / "_METADATA").touch()
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
        refused(tmp_path, "pip install btc_jax[orbax]", kind=ImportError)


def zipped(*names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, b"{}")
    return data.getvalue()


def tarred():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.safetensors"))
    return data.getvalue()


class Unpickled:
    """An object that fails the test if it is ever unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


FOREIGN = [
    ("pytorch_model.bin", pickle.dumps(Unpickled()), "PyTorch"),
    ("params.pkl", pickle.dumps(Unpickled()), "pickle"),
    ("nameless", pickle.dumps({"a": 1}, 2), "pickle"),
    ("old.pickle", pickle.dumps({"a": 1}, 0), "pickle"),
    ("download", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(9), "PyTorch"),
    ("model.ckpt", zipped("archive/data.pkl", "archive/data/0"), "PyTorch"),
    ("download", zipped("net/data.pkl", "net/constants.pkl"), "TorchScript"),
    ("broken.pth", zipped("archive/data.pkl")[:-5], "PyTorch"),
    ("w.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    ("damaged.hdf5", b"", "HDF5"),
    ("m.keras", zipped("metadata.json", "config.json", "model.weights.h5"), "Keras"),
    ("model.gguf", b"GGUF\3\0\0\0", "GGUF"),
    ("net.onnx", b"\x08\x07\x12\x07pytorch", "ONNX"),
    ("download", b"\x08\x09\x12\x07pytorch", "ONNX"),
    ("saved_model.pb", b"\x08\x01\x12\xb3\x05", "TensorFlow"),
    ("model.ckpt-1.index", bytes(48), "TensorFlow"),
    ("model.ckpt-1.data-00000-of-00002", bytes(48), "TensorFlow"),
    ("net.tflite", b"\x1c\0\0\0TFL3" + bytes(20), "TensorFlow Lite"),
    ("kernel.npy", b"\x93NUMPY\1\0", "numpy.savez"),
    ("model.eqx", b"\x93NUMPY\1\0", "equinox"),
    ("model.safetensors.gz", gzip.compress(b"x"), "unpack"),
    ("model.tar", tarred(), "unpack"),
    ("download", zipped("model.safetensors"), "unpack"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("model.safetensors", b"<!DOCTYPE html><html>", "download"),
    ("model.msgpack", pickle.dumps({"a": 1}), "pickle"),
    ("_METADATA", b"{}", "Orbax"),
]


@pytest.mark.parametrize(("name", "data", "word"), FOREIGN, ids=range(len(FOREIGN)))
def test_files_of_other_kinds_are_named(tmp_path, name, data, word):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        open_source(tmp_path / name)
    assert word in str(caught.value)
    assert "Flax msgpack" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_does_not_hide_a_content_that_is_read(tmp_path, small):
    save_file(small, tmp_path / "model.bin")
    assert_holds(open_source(tmp_path / "model.bin"), small)
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    assert_holds(open_source((tmp_path / "x.npz").rename(tmp_path / "x.pkl")), {"a": np.ones(3)})


def test_an_index_of_other_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "a.bin"}}')
    with pytest.raises(ValueError, match=r"a\.bin is a PyTorch file"):
        open_source(tmp_path / "pytorch_model.bin.index.json")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    refused(tmp_path / "config.json", "not a safetensors index", "open the file of the weights")


class TestFolders:
    def test_a_pipeline_lists_what_can_be_opened(self, tmp_path, small):
        for name in ("unet", "vae"):
            (tmp_path / name).mkdir()
            save_file(small, tmp_path / name / "diffusion_pytorch_model.safetensors")
        save_file(small, tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
        np.savez(tmp_path / "extra.npz", a=np.ones(2))
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
        listed = ["extra.npz", "unet", *(f"vae/diffusion_pytorch_model{x}.safetensors" for x in ("", ".fp16"))]
        refused(tmp_path, *listed)
        for name in listed:
            with open_source(tmp_path / name) as source:
                assert source.leaves

    def test_several_files_without_an_index_are_listed(self, tmp_path, small):
        for name in ("a.safetensors", "b.safetensors"):
            save_file(small, tmp_path / name)
        refused(tmp_path, "a.safetensors, b.safetensors")

    @pytest.mark.parametrize(
        ("name", "word"),
        [
            ("pytorch_model.bin", "PyTorch"),
            ("saved_model.pb", "TensorFlow"),
            ("model.ckpt.data-00000-of-00001", "TensorFlow"),
            ("model.weights.h5", "HDF5"),
            ("layer.kernel/.zarray", "zarr"),
        ],
    )
    def test_what_cannot_be_opened_is_named(self, tmp_path, name, word):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        refused(tmp_path, word)


class TestCompressed:
    """Checkpoints of btc_jax are recognised by their metadata, not by the names of their tensors."""

    @pytest.mark.parametrize("shard", [None, 100])
    def test_files(self, tmp_path, shard):
        file = tmp_path / "x.safetensors"
        btc_jax.save(file, {"kernel": np.ones((64, 64)), "bias": np.ones(64)}, max_shard_bytes=shard)
        for path in [tmp_path, *tmp_path.iterdir()]:
            with open_source(path) as source:
                assert source.compressed

    def test_an_item_of_orbax(self, tmp_path):
        ocp = pytest.importorskip("orbax.checkpoint")
        from btc_jax.orbax import BTCCheckpointHandler, BTCSave

        with ocp.Checkpointer(BTCCheckpointHandler()) as writer:
            writer.save(tmp_path / "x", args=BTCSave(btc_jax.btc_quantize({"kernel": jnp.ones((64, 64))})))
        with open_source(tmp_path / "x") as source:
            assert source.compressed

    def test_names_say_nothing(self, tmp_path):
        save_file({"kernel#plane0": np.ones(3), "kernel#header": np.ones(3)}, tmp_path / "x.safetensors")
        with open_source(tmp_path / "x.safetensors") as source:
            assert not source.compressed


def test_unknown(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    (tmp_path / "like_msgpack").write_bytes(b"\x82\xa3abc")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("notes.txt", "like_msgpack", "empty", "folder", "pipe.npz"):
        refused(tmp_path / name, "unknown kind", ".safetensors", ".npz", ".msgpack", "Orbax")
    refused(tmp_path / "absent.npz", "does not exist", kind=FileNotFoundError)


def test_torch_layout(tmp_path, small):
    for names, answer in [
        (small, True),
        ({"weight": np.ones(2)}, True),
        ({"kernel": np.ones(2), "xweight": np.ones(2)}, False),
    ]:
        save_file(names, tmp_path / "x.safetensors")
        assert open_source(tmp_path / "x.safetensors").torch_layout is answer


def test_fingerprint(shards):
    source, before = open_source(shards.parent), open_source(shards).fingerprint()
    assert source.fingerprint() == before
    assert int(before, 16)
    os.utime(shards.parent / "model-2.safetensors", ns=(1, 1))
    assert source.fingerprint() != before
    (shards.parent / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        source.fingerprint()


def test_unknown_leaf(tmp_path, small):
    save_file(small, tmp_path / "x.safetensors")
    with (
        open_source(tmp_path / "x.safetensors") as source,
        pytest.raises(ValueError, match=r"no leaf 'conv\.wight'; conv\.weight"),
    ):
        source.read("conv.wight")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "msgpack"])
def test_closed(tmp_path, kind):
    file, tree = tmp_path / f"x.{kind}", {"a": np.ones(2)}
    if kind == "msgpack":
        file.write_bytes(serialization.to_bytes(tree))
    else:
        save_file(tree, file) if kind == "safetensors" else np.savez(file, a=tree["a"])
    with open_source(file) as source:
        source.read("a")
    with pytest.raises(ValueError, match="closed"):
        source.read("a")
