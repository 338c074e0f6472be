"""The files read here are written by numpy, flax, safetensors and Orbax themselves, as oracles."""

import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from btc_jax.leafspec import LeafSpec, Origin
from btc_jax.sources import open_source
from tests.sources_support import DTYPES as DTYPES
from tests.sources_support import arrays as arrays
from tests.sources_support import assert_holds as assert_holds
from tests.sources_support import bytes_read as bytes_read
from tests.sources_support import raw as raw
from tests.sources_support import refused as refused
from tests.sources_support import shards as shards
from tests.sources_support import small as small


def entry(dtype: Any = "F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


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
            leaf = LeafSpec("a", (nbytes,), np.dtype(np.uint8), note=code, origin=Origin(code, (2, 4)))
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
