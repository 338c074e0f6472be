"""npz files as sources."""

import pickletools
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax.leafspec import LeafSpec, Origin
from btc_jax.sources import open_source
from tests.sources_support import NATIVE as NATIVE
from tests.sources_support import Unpickled as Unpickled
from tests.sources_support import arrays as arrays
from tests.sources_support import assert_holds as assert_holds
from tests.sources_support import bytes_read as bytes_read
from tests.sources_support import refused as refused


def as_bytes(values):
    return np.frombuffer(values.tobytes(), np.uint8)


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
            assert source.leaves[1] == LeafSpec("b", (2, 2), np.dtype("f8"))
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
