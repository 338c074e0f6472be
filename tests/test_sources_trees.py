"""Flax msgpack files and Orbax folders as sources."""

import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from btc_jax.sources import open_source
from tests.sources_support import DTYPES as DTYPES
from tests.sources_support import arrays as arrays
from tests.sources_support import assert_holds as assert_holds
from tests.sources_support import bytes_read as bytes_read
from tests.sources_support import raw as raw
from tests.sources_support import refused as refused

ODD = [jnp.complex64, np.complex128, jnp.int4, jnp.float8_e8m0fnu, jnp.float8_e4m3fnuz, jnp.float4_e2m1fn]


ODD = {np.dtype(kind).name: np.dtype(kind) for kind in ODD}
"""Numbers that stay as they are."""


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
