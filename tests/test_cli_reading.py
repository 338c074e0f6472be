"""The commands that read checkpoints, and the one that decodes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import btc_jax
from btc_jax.compare import compare, open_any
from tests.cli_support import LEAVES as LEAVES
from tests.cli_support import as_json as as_json
from tests.cli_support import btc as btc
from tests.cli_support import damaged as damaged
from tests.cli_support import folder as folder
from tests.cli_support import refused as refused
from tests.cli_support import small as small
from tests.cli_support import source as source


class TestInspect:
    def test_lists_leaves_with_bits_and_errors(self, small):
        found = as_json("inspect", small)
        leaves = {leaf["path"]: leaf for leaf in found["leaves"]}
        assert found["bytes_before"] == sum(x.nbytes for x in LEAVES.values())
        assert found["bytes"] == sum(leaf["bytes"] for leaf in found["leaves"])
        head = leaves["head.weight"]
        assert (head["kind"], head["dtype"], head["shape"]) == ("packed", "bfloat16", [64, 64])
        assert head["effective_bits"] == 8 * head["bytes"] / 64**2
        assert head["error"]["sqnr_db"] > 10
        assert leaves["steps"]["codec"] is leaves["steps"]["error"] is None

    def test_shows_a_table_and_the_totals(self, small):
        code, out, err = btc("inspect", small)
        assert (code, err) == (0, "")
        assert "16 x 8 x 3 x 3" in out
        assert out.splitlines()[-1].startswith("4 leaves, 2 of them packed, 5,267 weights: ")
        assert "\x1b" not in out

    def test_every_kind_of_leaf(self, tmp_path):
        tree = {"key": jax.random.key(0), "name": "net", "empty": jnp.zeros((0, 3)), "one": 1}
        btc_jax.save(tmp_path / "x.btc", tree)
        kinds = {leaf["path"]: leaf["kind"] for leaf in as_json("inspect", tmp_path / "x.btc")["leaves"]}
        assert kinds == {"key": "key", "name": "python", "empty": "dense", "one": "python"}
        assert btc("inspect", tmp_path / "x.btc")[0] == 0
        assert btc("diff", tmp_path / "x.btc", tmp_path / "x.btc")[0] == 0

    def test_names_cannot_command_the_terminal(self, tmp_path):
        btc_jax.save(tmp_path / "x.btc", {"\x1b[2Jevil\n[bold]": jnp.ones(3)})
        out = btc("inspect", tmp_path / "x.btc")[1]
        assert "\x1b" not in out
        assert "\\x1b[2Jevil [bold]" in out


class TestVerify:
    def test_a_whole_file(self, small):
        assert "undamaged" in btc("verify", small)[1]
        assert as_json("verify", small)["ok"] is True

    def test_damage_is_listed(self, small, tmp_path):
        file = damaged(small, tmp_path / "x.btc")
        code, out, _ = btc("verify", file)
        assert (code, out.count("\n")) == (1, 2)
        assert "does not match its checksum" in out
        (leaf,) = as_json("verify", file, code=1)["damaged"]
        assert "checksum" in leaf

    @pytest.mark.parametrize("length", [0, 5, 500, -1])
    def test_truncation(self, small, tmp_path, length):
        (tmp_path / "x.btc").write_bytes(small.read_bytes()[:length])
        assert as_json("verify", tmp_path / "x.btc", code=1)["ok"] is False


class TestDiff:
    def test_worst_first_against_the_source(self, source, small):
        found = as_json("diff", source, small, code=1)
        sqnr = [leaf["sqnr_db"] for leaf in found["leaves"]]
        assert (found["different_leaves"], found["equal_leaves"]) == (2, 2)
        assert sqnr == sorted(sqnr)
        stored = {leaf["path"]: leaf["error"] for leaf in as_json("inspect", small)["leaves"]}
        for leaf in found["leaves"]:
            for name, figure in stored[leaf["path"]].items():
                assert leaf[name] == pytest.approx(figure, rel=5e-4), (leaf["path"], name)

    def test_limit(self, source, small):
        assert len(as_json("diff", source, small, "--limit", 1, code=1)["leaves"]) == 1
        code, out, _ = btc("diff", source, small, "--limit", 1)
        assert (code, len(out.splitlines())) == (1, 6)
        assert out.splitlines()[-1] == "2 of 4 leaves differ"

    def test_the_same(self, source, small):
        assert btc("diff", small, small) == (0, "0 of 4 leaves differ\n", "")
        assert as_json("diff", source, source)["equal"] is True

    def test_what_cannot_be_compared_comes_first(self, tmp_path):
        one, nan = np.ones(3, np.float32), np.array([1, np.nan], np.float32)
        both = {"nan": nan, "same": one, "zero": np.zeros(0, np.float32)}
        save_file({**both, "a": one, "s": one, "t": one, "n": one}, tmp_path / "a.safetensors")
        other = {"b": one, "s": one[:2], "t": one.astype(np.float16), "n": np.array([1, np.inf, 1], np.float32)}
        save_file({**both, **other}, tmp_path / "b.safetensors")
        found = as_json("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", code=1)
        notes = {leaf["path"]: leaf["note"] for leaf in found["leaves"]}
        assert notes == {
            **{"a": "only in the first", "b": "only in the second", "s": "shape [3], then [2]"},
            **{"n": "", "t": "float32, then float16"},
        }
        assert list(notes)[:3] == ["a", "b", "s"]
        table = btc("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")[1]
        assert "-inf" in next(line for line in table.splitlines() if line.startswith("n "))

    def test_nothing_in_common(self, small, tmp_path):
        np.savez(tmp_path / "x.npz", other=np.ones(3))
        found = as_json("diff", small, tmp_path / "x.npz", code=1)
        assert (found["different_leaves"], found["equal_leaves"], found["total"]["rmse"]) == (5, 0, None)

    def test_integers_of_64_bits(self, tmp_path):
        for i in (0, 1):
            np.savez(tmp_path / f"{i}.npz", n=np.array([2**60 + i]), c=np.array([1 + i * 1e-12]))
        with open_any(tmp_path / "0.npz") as a, open_any(tmp_path / "1.npz") as b:
            found = {leaf.path: leaf for leaf in compare(a, b).leaves}
        assert not found["n"].equal
        assert found["c"].rmse == pytest.approx(1e-12, rel=1e-3)


class TestDequantize:
    def test_brings_back_names_and_dtypes(self, small, tmp_path):
        target = tmp_path / "plain.safetensors"
        assert as_json("dequantize", small, target)["bytes"] == target.stat().st_size
        plain = load_file(target)
        assert {name: (x.shape, x.dtype) for name, x in plain.items()} == {
            name: (x.shape, x.dtype) for name, x in LEAVES.items()
        }
        np.testing.assert_array_equal(plain["steps"], LEAVES["steps"])
        assert btc("diff", small, target)[0] == 0
        assert "--force" in refused("dequantize", small, target)
        assert btc("dequantize", small, target, "-f")[0] == 0

    def test_says_what_safetensors_cannot_hold(self, tmp_path):
        btc_jax.save(tmp_path / "x.btc", {"key": jax.random.key(0), "name": "net", "w": jnp.ones(3), "n": 1})
        code, out, err = btc("dequantize", tmp_path / "x.btc", tmp_path / "y")
        assert (code, err) == (0, "")
        assert out.splitlines()[:-1] == [
            "key: key<fry> as uint32[2]",
            "n: Python int as int64[]",
            "name: Python str, left out",
        ]
        found = as_json("dequantize", "-f", tmp_path / "x.btc", tmp_path / "y")
        assert (found["leaves"], found["bytes"]) == (3, (tmp_path / "y").stat().st_size)
        assert found["left_out"] == {"name": "Python str"}
        assert list(found["changed"]) == ["key", "n"]
        assert set(load_file(tmp_path / "y")) == {"key", "w", "n"}

    def test_refuses_damage(self, small, tmp_path):
        file = damaged(small, tmp_path / "x.btc")
        assert "damaged" in refused("dequantize", file, tmp_path / "plain.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["x.btc"]


class TestReport:
    def test_writes_a_page(self, source, small, tmp_path):
        page = tmp_path / "page.html"
        code, out, err = btc("report", source, small, "-o", page)
        assert (code, err, out.count("\n")) == (0, "", 1)
        found = as_json("report", source, small, "-o", page, "-f", "--no-baselines")
        total = as_json("diff", source, small, code=1)["total"]
        assert found["metrics"]["total"]["sqnr_db"] == pytest.approx(total["sqnr_db"], rel=1e-6)
        assert f"{total['sqnr_db']:.2f} dB" in out
        assert page.read_text().startswith("<!DOCTYPE html>")
        assert found["baselines"] == []

    def test_replaces_only_when_told(self, source, small, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "report.html").write_text("precious")
        assert "--force" in refused("report", source, small)
        assert "written over" in refused("report", source, small, "-o", small, "-f")
        assert (tmp_path / "report.html").read_text() == "precious"
        assert "`btc quantize` makes one" in refused("report", source, source, "-f")
