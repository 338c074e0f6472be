import dataclasses
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import btc_jax
from btc_jax import _progress
from btc_jax.codecs import CODECS
from btc_jax.compare import compare, open_any
from btc_jax_cli import commands, console, reading
from btc_jax_cli.fields import codec_fields
from btc_jax_cli.options import nbytes

RNG = np.random.default_rng(0)


def btc(*args):
    """Exit code, stdout and stderr. An exception other than an exit fails the test."""
    result = CliRunner().invoke(commands.app, [str(arg) for arg in args], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def as_json(*args, code=0):
    found, out, err = btc(*args, "--json")
    assert (found, err, out.count("\n")) == (code, "", 1)
    return json.loads(out, parse_constant=pytest.fail)


def refused(*args, code=2):
    """The one line on stderr."""
    found, out, err = btc(*args)
    assert (found, out, err.count("\n")) == (code, "", 1), (found, out, err)
    assert err.startswith("btc: ")
    return err


def weights(*shape):
    return RNG.normal(0, 0.03, shape).astype(np.float32)


LEAVES = {
    "conv.weight": weights(16, 8, 3, 3),
    "conv.bias": weights(16),
    "head.weight": weights(64, 64).astype(ml_dtypes.bfloat16),
    "steps": np.arange(3, dtype=np.int64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_file(LEAVES, folder / "model.safetensors")
    assert btc("quantize", folder / "model.safetensors", folder / "small.btc", "--min-size", 1000)[0] == 0
    return folder


@pytest.fixture
def source(folder):
    return folder / "model.safetensors"


@pytest.fixture
def small(folder):
    return folder / "small.btc"


def damaged(file, target):
    """A copy with one bit of its last byte flipped, in the payload."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    return target


class TestPlan:
    def test_says_what_would_be_done_and_why_not_the_rest(self, source):
        code, out, err = btc("plan", source)
        rows = {line.split()[0]: line for line in out.splitlines()[3:-2]}
        assert (code, err) == (0, "")
        assert "uniform 64" in rows["head.weight"]
        assert "uniform 64" in rows["conv.weight"]
        assert "integer" in rows["steps"]

    def test_json_is_the_plan(self, source):
        plan = as_json("plan", source, "--rule", "conv.*=32", "--rule", "head*=dense", "--threshold", "inf")
        codecs = {leaf["path"]: leaf["codec"] and leaf["codec"]["block_size"] for leaf in plan["leaves"]}
        assert codecs == {"conv.weight": 32, "conv.bias": 32, "head.weight": None, "steps": None}
        assert plan["bytes_min"] == plan["bytes_max"] < plan["bytes_before"] == sum(x.nbytes for x in LEAVES.values())

    def test_a_target_of_bits_is_one_figure(self, source):
        code, out, _ = btc("plan", source, "--bits", 4.5, "--min-size", 1000)
        plan = as_json("plan", source, "--bits", 4.5, "--min-size", 1000)
        assert (code, plan["target"]["kind"], plan["target"]["value"]) == (0, "bits", 4.5)
        packed = sum(math.prod(leaf["shape"]) for leaf in plan["leaves"] if leaf["codec"])
        dense = sum(leaf["bytes_before"] for leaf in plan["leaves"] if not leaf["codec"])
        assert plan["bytes_max"] == dense + math.floor(4.5 * packed / 8)
        text = " ".join(out.split())
        assert f"bits of 4.5: at most {plan['bytes_max']:,} bytes" in text
        assert f"{plan['bytes_min']:,} to" not in text

    def test_a_target_out_of_reach(self, source):
        assert "--bits of 0.01 cannot be reached" in refused("plan", source, "--bits", 0.01)

    def test_a_rule_packs_what_the_default_leaves_dense(self, source):
        plan = as_json("plan", source, "--rule", "conv.bias=packed", "--bits", 6)
        codecs = {leaf["path"]: leaf["codec"] and leaf["codec"]["id"] for leaf in plan["leaves"]}
        assert codecs["conv.bias"] == codecs["head.weight"] == "multilevel"

    def test_what_to_do_where_nothing_is_packed(self, tmp_path):
        save_file({"ema.fc.weight": np.ones((64, 64), np.float32)}, tmp_path / "x.safetensors")
        text = refused("quantize", tmp_path / "x.safetensors", tmp_path / "y.safetensors")
        assert "--rule 'ema*weight=packed'" in text
        assert (
            btc("quantize", tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--rule", "ema*weight=packed")[0]
            == 0
        )
        save_file({"fc.weight": np.ones((3, 3), np.float32)}, tmp_path / "small.safetensors")
        text = refused("quantize", tmp_path / "small.safetensors", tmp_path / "z.safetensors")
        assert "--min-size 0" in text
        assert "Policy" not in text

    def test_a_rule_keeps_the_layout_of_pytorch(self, source):
        orders = {leaf["path"]: leaf["order"] for leaf in as_json("plan", source, "--rule", "conv.weight=16")["leaves"]}
        assert orders["conv.weight"] == orders["head.weight"] == "stored"


class TestQuantize:
    def test_is_what_was_planned(self, source, small, tmp_path):
        done = as_json("quantize", source, tmp_path / "x.btc", "--min-size", 1000)
        plan = as_json("plan", source, "--min-size", 1000)
        assert (done["leaves"], done["packed"], done["resumed"]) == (4, 2, 0)
        assert done["bytes_before"] == plan["bytes_before"]
        assert plan["bytes_min"] <= as_json("inspect", small)["bytes"] <= plan["bytes_max"]
        assert done["bytes_after"] == (tmp_path / "x.btc").stat().st_size
        assert (tmp_path / "x.btc").read_bytes() == small.read_bytes()

    def test_sums_up_in_one_line(self, source, tmp_path):
        code, out, err = btc("quantize", source, tmp_path / "x.btc")
        assert (code, err, out.count("\n")) == (0, "", 1)
        assert "2 of 4 leaves packed" in out

    def test_replaces_only_when_told(self, source, tmp_path):
        target = tmp_path / "x.btc"
        target.write_bytes(b"precious")
        assert "--force" in refused("quantize", source, target)
        assert target.read_bytes() == b"precious"
        assert btc("quantize", source, target, "--force")[0] == 0
        assert btc("verify", target)[0] == 0

    def test_shards_are_read_by_every_command(self, source, small, tmp_path):
        target = tmp_path / "x.safetensors"
        assert "must end in" in refused("quantize", source, tmp_path / "x.btc", "--max-shard-bytes", "1KB")
        assert btc("quantize", source, target, "--min-size", 1000, "--max-shard-bytes", "1KB")[0] == 0
        assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
        assert "--force" in refused("quantize", source, target)
        assert btc("verify", target)[0] == 0
        assert btc("diff", small, target)[0] == 0

    @pytest.mark.parametrize(
        ("text", "size"), [("12", 12), ("500MB", 500_000_000), ("2GiB", 2**31), ("1.5 kb", 1500), ("7b", 7)]
    )
    def test_sizes(self, text, size):
        assert nbytes(text, "max_shard_bytes") == size

    @pytest.mark.parametrize("text", ["", "MB", "0", "-5", "12QB", "1e9", "nan", "9" * 400, "0.1"])
    def test_what_is_no_size(self, text):
        with pytest.raises(ValueError, match=r"max_shard_bytes is .*500MB"):
            nbytes(text, "max_shard_bytes")

    def test_what_is_no_size_at_a_prompt(self, source, tmp_path):
        line = refused("quantize", source, tmp_path / "x.safetensors", "--max-shard-bytes", "12QB")
        assert line.startswith("btc: --max-shard-bytes is '12QB'")


class TestTargets:
    def made(self, source, target, *options):
        """The output of `quantize`, after every other command has read its result."""
        done = as_json("quantize", source, target, "--min-size", 1000, "--force", *options)
        assert as_json("verify", target)["ok"]
        found = as_json("inspect", target)
        packed = [leaf for leaf in found["leaves"] if leaf["kind"] == "packed"]
        bits = 8 * sum(leaf["bytes"] for leaf in packed) / sum(leaf["weights"] for leaf in packed)
        assert done["effective_bits"] == pytest.approx(bits)
        total = as_json("diff", source, target, code=1)["total"]
        assert [done["rmse"], done["sqnr_db"]] == pytest.approx([total["rmse"], total["sqnr_db"]], rel=1e-4)
        assert as_json("dequantize", target, target.with_suffix(".plain"), "-f")["bytes"] > done["bytes_before"]
        return done, packed

    def test_bits(self, source, tmp_path):
        done, packed = self.made(source, tmp_path / "x.btc", "--bits", 4.5)
        assert 4.4 < done["effective_bits"] <= 4.5
        assert done["packed"] == 2
        assert {leaf["codec"]["id"] for leaf in packed} == {"multilevel"}

    def test_size_is_that_of_the_file(self, source, tmp_path):
        self.made(source, tmp_path / "x.btc", "--size", "5KB")
        assert 4_750 < (tmp_path / "x.btc").stat().st_size <= 5_000

    def test_errors(self, tmp_path):
        source = tmp_path / "m.safetensors"
        save_file({"head.weight": weights(64, 64), "conv.weight": weights(16, 8, 3, 3)}, source)
        done, _ = self.made(source, tmp_path / "x.btc", "--sqnr", 27)
        assert 27 <= done["sqnr_db"] < 27.3
        done, _ = self.made(source, tmp_path / "x.btc", "--rmse", 0.001)
        assert 0.00095 < done["rmse"] <= 0.001

    def test_options_of_the_codec(self, source, tmp_path):
        target = tmp_path / "x.btc"
        _, packed = self.made(source, target, "--codec", "multilevel", "--width", 4, "--block-size", 64)
        assert [(leaf["codec"]["width"], leaf["codec"]["block_size"]) for leaf in packed] == [(4, 64)] * 2
        only_head = ("--bits", 4.5, "--min-size", 4096)
        _, packed = self.made(source, target, "--width", "leaf", *only_head)
        assert [leaf["codec"]["width"] for leaf in packed] == [4]
        fast, _ = self.made(source, target, *only_head)
        slow, _ = self.made(source, target, *only_head, "--effort", "exhaustive")
        assert slow["sqnr_db"] > fast["sqnr_db"]

    def test_the_codec_alone_comes_to_four_and_a_half_bits(self, source, tmp_path):
        done, _ = self.made(source, tmp_path / "x.btc", "--codec", "multilevel")
        assert 4.4 < done["effective_bits"] <= 4.5

    def test_a_threshold_that_suits_the_target(self, source, tmp_path):
        options = ("--codec", "uniform", "--threshold", "auto", "--bits", 6.5, "--block-size", 32)
        done, packed = self.made(source, tmp_path / "x.btc", *options)
        assert 6 < done["effective_bits"] <= 6.5
        assert {leaf["codec"]["id"] for leaf in packed} == {"uniform"}

    def test_rules_and_sensitivities_share_the_bits_out(self, source, tmp_path):
        def bits_of_head(*options):
            _, packed = self.made(source, tmp_path / "x.btc", "--bits", 4.5, *options)
            return {leaf["path"]: leaf["effective_bits"] for leaf in packed}["head.weight"]

        usual = bits_of_head()
        assert bits_of_head("--rule", "head*=weight:16") > usual + 0.05
        assert bits_of_head("--sensitivity", "shape") == usual
        paths = [row["path"] for row in as_json("plan", source)["leaves"]]
        btc_jax.save(tmp_path / "s", {path: np.float32(16 if path == "head.weight" else 1) for path in paths})
        assert bits_of_head("--sensitivity", tmp_path / "s") > bits_of_head("--sensitivity", "equal") + 0.05

    def test_stacks_of_layers(self, tmp_path):
        save_file({"layers.weight": RNG.standard_normal((3, 64, 64)).astype(np.float32)}, tmp_path / "x.safetensors")
        as_json("quantize", tmp_path / "x.safetensors", tmp_path / "q", "--bits", 4.5, "--rule", "layers*=stack:0")
        assert btc_jax.load(tmp_path / "q")["layers.weight"].pieces == (3, 1, 1)
        wrong = refused("quantize", tmp_path / "x.safetensors", tmp_path / "r", "--rule", "layers*=stack:x")
        assert "weight:X or stack:N" in wrong

    def test_a_measured_plan_is_exact(self, source, tmp_path):
        options = ("--min-size", 1000, "--bits", 4.5)
        vague, exact = as_json("plan", source, *options), as_json("plan", source, *options, "--measure")
        done = as_json("quantize", source, tmp_path / "x.btc", *options)
        stored = as_json("inspect", tmp_path / "x.btc")
        assert vague["bytes_min"] < exact["bytes_min"] == exact["bytes_max"] == stored["bytes"] <= vague["bytes_max"]
        assert done["effective_bits"] <= 4.5
        assert {leaf["path"]: leaf["order"] for leaf in exact["leaves"] if leaf["codec"]} == {
            leaf["path"]: leaf["order"] for leaf in stored["leaves"] if leaf["codec"]
        }
        assert "--measure" in btc("plan", source, *options)[1].splitlines()[-1]
        assert "--measure" not in btc("plan", source, *options, "--measure")[1]

    def test_says_what_came_of_it(self, source, tmp_path):
        code, out, err = btc("quantize", source, tmp_path / "x.btc", "--bits", 4)
        assert (code, err, out.count("\n")) == (0, "", 1)
        assert re.search(r"2 of 4 leaves packed at (3\.9\d\d|4\.000) bits, \d\d\.\d\d dB, ", out)


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
        assert "all whole" in btc("verify", small)[1]
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


class TestSearch:
    def test_block_sizes(self, source):
        found = as_json("search", source, "--block-sizes", "32,64", "--max-rmse", "none")
        assert (found["status"], len(found["trials"]), found["best"]) == ("complete", 2, 1)
        code, out, err = btc("search", source, "--block-sizes", "32,64", "--max-rmse", "1e-9")
        assert (code, err) == (1, "")
        assert "breaks the limit" in out

    def test_bits_by_a_function_of_the_user(self, source, tmp_path):
        (tmp_path / "judge.py").write_text(
            "def accuracy(params):\n    return float(abs(params['conv.bias'].sum()) > 0)\n"
        )
        target = tmp_path / "found.btc"
        evaluate = ("--evaluate", f"{tmp_path / 'judge.py'}:accuracy")
        found = as_json("search", source, target, "--bits", 3, 6, *evaluate, "--tolerance", 1)
        assert found["best"] is not None
        assert found["trials"][found["best"]]["accuracy"] == 1
        assert as_json("verify", target)["ok"]
        assert "--force" in refused("search", source, target)

    @pytest.mark.parametrize(
        ("says", "options"),
        [
            ("there is no file nope.py", ("--evaluate", "nope.py:f")),
            ("there is no module 'no_such_module'", ("--evaluate", "no_such_module:f")),
            ("math has no function 'nope'", ("--evaluate", "math:nope")),
            ("is not FILE.py:FUNCTION", ("--evaluate", "nope.py")),
            ("--max-rmse 'x' is neither a number nor 'none'", ("--max-rmse", "x")),
            ("are not whole numbers with commas", ("--block-sizes", "32;64")),
            ("search --bits LOW HIGH", ("--codec", "multilevel")),
            ("btc search --help", ("--bits", "3")),
        ],
    )
    def test_what_is_wrong(self, source, says, options):
        assert says in refused("search", source, *options)


class TestRulesFile:
    def test_comes_after_rules_at_the_prompt(self, source, tmp_path):
        file = tmp_path / "rules.toml"
        file.write_text(
            "[[rule]]\npattern = 'conv.*'\ncodec = { id = 'uniform', block_size = 32 }\n"
            "[[rule]]\npattern = '*'\ncodec = 'dense'\n"
        )
        leaves = as_json("plan", source, "--rules", file, "--rule", "head*=16")["leaves"]
        codecs = {leaf["path"]: leaf["codec"] and leaf["codec"]["block_size"] for leaf in leaves}
        assert codecs == {"conv.weight": 32, "conv.bias": 32, "head.weight": 16, "steps": None}
        assert {leaf["path"]: leaf["reason"] for leaf in leaves}["conv.weight"] == "rule 2"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("pattern", "is not a TOML file"),
            ("", "has no rule"),
            ("rules = 3", "has 'rules'"),
            ("[[rule]]\ncodec = 'dense'", "rule 1 has no pattern"),
            ("[[rule]]\npattern = 'x'\nbits = 3", "rule 1 has 'bits'"),
            ("[[rule]]\npattern = 'x'\ncodec = 'nope'", "rule 1: codec is 'nope'"),
            ("[[rule]]\npattern = 'x'\ncodec = {id = 'nope'}", "rule 1: unknown codec 'nope'"),
            ("[[rule]]\npattern = 'x'\nweight = -1", "weight is -1"),
        ],
    )
    def test_what_is_wrong_names_file_and_rule(self, source, tmp_path, text, says):
        (tmp_path / "rules.toml").write_text(text)
        line = refused("plan", source, "--rules", tmp_path / "rules.toml")
        assert says in line
        assert "rules.toml" in line

    def test_no_file(self, source):
        assert "nope.toml does not exist" in refused("plan", source, "--rules", "nope.toml")


def test_a_dry_run_shows_the_plan_and_writes_nothing(source, tmp_path):
    options = ("--bits", 4.5, "--min-size", 1000)
    target = tmp_path / "x.btc"
    assert as_json("quantize", source, target, "--dry-run", *options) == as_json("plan", source, *options)
    code, out, err = btc("quantize", source, target, "--dry-run", *options)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"dry run: {target} was not written."
    assert not target.exists()


def test_every_field_of_a_codec_is_an_option():
    for name, codec in CODECS.items():
        fields = {field.name: field.default for field in dataclasses.fields(codec)}  # pyright: ignore[reportArgumentType]
        assert {field.name: field.default for field in codec_fields()[name].values()} == fields
        text = btc("quantize", "--help")[1]
        assert all(f"--{field.replace('_', '-')} " in text for field in fields)


def wrong_options():
    yield "rule 1 ('zzz') matches no leaf", ("--rule", "zzz=dense")
    yield "--rule '*/kernel' is not PATTERN=dense", ("--rule", "*/kernel")
    yield "--rule '=dense' is not", ("--rule", "=dense")
    yield "--rule 'x=99999999' is not", ("--rule", "x=99999999")
    yield "not a regular expression", ("--rule", "re:(=dense")
    yield "--rule 'steps=dense' before it", ("--rule", "steps=64")
    yield "at least 2", ("--rule", "*=1")
    yield "--block-size 'x' is not a whole number", ("--block-size", "x")
    yield "at most 65536", ("--block-size", "99999999999999999999")
    yield "low_bits is 8", ("--low-bits", "8")
    yield "0 or more", ("--threshold", "nan")
    yield "--header-dtype 'f16' is not 'float16' or 'float32'", ("--header-dtype", "f16")
    yield "--block-size", ("--blok-size", "3")
    yield "--threshold 'x' is not a number or 'auto'", ("--threshold", "x")
    yield "btc: --bits 4.0 and --sqnr 9.0 are given", ("--bits", "4", "--sqnr", "9")
    yield "btc: --bits is nan", ("--bits", "nan")
    yield "bits is -1.0; it must be a positive number", ("--bits", "-1")
    yield "btc plan --help", ("--bits", "x")
    yield "btc: --size is '9QB'", ("--size", "9QB")
    yield "btc: --sqnr is 0.0", ("--sqnr", "0")
    yield "--codec 'foo' is unknown; it can be uniform or multilevel", ("--codec", "foo")
    yield "--threshold is an option of --codec uniform, and a target", ("--threshold", "auto", "--bits", "5")
    yield "--low-bits is an option of --codec uniform, not of multi", ("--low-bits", "3", "--codec", "multilevel")
    yield "--header-dtype is an option of --codec uniform", ("--header-dtype", "float32", "--size", "1MB")
    yield "--width is an option of --codec multilevel, not of uniform", ("--width", "3", "--codec", "uniform")
    yield "--effort is an option of --codec multilevel; add that, or a target", ("--effort", "fast")
    yield "--bits is a target", ("--codec", "uniform", "--bits", "5")
    yield "add --threshold auto", ("--codec", "uniform", "--sqnr", "30")
    yield "leave out --width 4, or use --width leaf", ("--width", "4", "--rmse", "0.1")
    yield "--sensitivity is for a target", ("--sensitivity", "equal")
    yield "--sensitivity 'none.safetensors' is neither a file nor", ("--sensitivity", "none.safetensors", "--bits", "4")
    yield "--sensitivity shape and --rmse 0.1 are given", ("--sensitivity", "shape", "--rmse", "0.1")
    yield "width is 9; it can be 0 to 8 bits", ("--width", "9", "--bits", "4")
    yield "--width 'all' is not a whole number or 'leaf'", ("--width", "all", "--codec", "multilevel")
    yield "--effort 'slow' is not 'fast' or 'exhaustive'", ("--effort", "slow", "--bits", "4")
    yield "block_size is 8; it can be 16 to 256", ("--block-size", "8", "--bits", "4")
    yield "--rule 'head*=weight:2' is for a target", ("--rule", "head*=weight:2")
    yield "weight 'much' is not a number", ("--rule", "head*=weight:much", "--bits", "4")
    yield "weight is -1.0; it must be a positive number", ("--rule", "head*=weight:-1", "--bits", "4")
    yield "bits of 0.1 cannot be reached", ("--bits", "0.1", "--measure")
    yield "btc: --bits of 9 cannot be reached", ("--bits", "9", "--measure")


class TestOneLine:
    @pytest.mark.parametrize(("says", "options"), list(wrong_options()))
    def test_wrong_options(self, source, says, options):
        assert says in refused("plan", source, *options)

    def test_wrong_usage(self, source, small):
        assert "No such command 'nope'" in refused("nope")
        assert "--help" in refused("--nope")
        assert "SOURCE" in refused("plan")
        assert "--limit" in refused("diff", small, small, "--limit", "-1")

    @pytest.mark.parametrize("command", ["plan", "inspect", "verify"])
    def test_nothing_there(self, command, tmp_path):
        assert "does not exist" in refused(command, tmp_path / "nope")

    @pytest.mark.parametrize("args", [("inspect",), ("verify",), ("diff", "small.btc"), ("plan",)])
    def test_a_folder(self, args, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(folder)
        assert "folder" in refused(*args, tmp_path)

    def test_not_a_compressed_checkpoint(self, source, tmp_path):
        assert "`btc quantize` makes one" in refused("inspect", source)
        assert "`btc quantize` makes one" in refused("dequantize", source, tmp_path / "x")

    def test_verify_of_another_file(self, source, tmp_path):
        code, out, err = btc("verify", source)
        assert (code, err, out.count("\n")) == (1, "", 2)
        assert "`btc quantize` makes one" in out
        assert "damaged" not in out

    def test_a_compressed_source(self, small, tmp_path):
        for command in (("plan",), ("quantize", tmp_path / "x")):
            assert "`btc dequantize`" in refused(command[0], small, *command[1:])
        assert not list(tmp_path.iterdir())

    def test_a_foreign_source(self, tmp_path):
        (tmp_path / "m.bin").write_bytes(pickle.dumps({"a": 1}))
        for command in (("plan",), ("diff", tmp_path / "m.bin"), ("quantize", tmp_path / "x")):
            line = refused(command[0], tmp_path / "m.bin", *command[1:])
            assert "m.bin is a PyTorch file" in line
            assert "Flax" not in line

    def test_a_packed_tree_of_orbax(self, small, tmp_path):
        ocp = pytest.importorskip("orbax.checkpoint")
        from btc_jax.orbax import BTCCheckpointHandler, BTCSave

        with ocp.Checkpointer(BTCCheckpointHandler()) as writer:
            writer.save(tmp_path / "x", args=BTCSave(btc_jax.load(small)))
        assert "`btc dequantize`" in refused("plan", tmp_path / "x")
        assert "btc_jax.orbax" in refused("diff", small, tmp_path / "x")

    def test_a_damaged_checkpoint_is_not_taken_for_a_dense_one(self, small, tmp_path):
        (tmp_path / "x.btc").write_bytes(small.read_bytes()[:-1])
        assert "truncated" in refused("diff", tmp_path / "x.btc", small)

    def test_targets(self, source, small, tmp_path):
        assert "regular file" in refused("quantize", source, tmp_path)
        assert "regular file" in refused("quantize", source, "/dev/null", "--force")
        assert "make it first" in refused("quantize", source, tmp_path / "nope" / "x")
        assert "another file" in refused("quantize", source, source, "--force")
        assert "another file" in refused("dequantize", small, small, "--force")
        assert "another file" in refused("quantize", source.parent, source.parent / "x.btc")
        (tmp_path / "link").symlink_to(source)
        assert "another file" in refused("quantize", source, tmp_path / "link", "--force")

    def test_a_target_out_of_reach_writes_nothing(self, source, tmp_path):
        for options in (("--bits", 0.1), ("--size", 100), ("--sqnr", 300), ("--rmse", 1e-9)):
            assert "cannot be reached" in refused("quantize", source, tmp_path / "x", *options)
            assert not list(tmp_path.iterdir())

    def test_nothing_to_quantize(self, source, tmp_path):
        line = refused("quantize", source, tmp_path / "x", "--rule", "*=dense")
        assert "--rule '" in line
        assert not re.search(r"Policy\(|Rule\(|btc_plan", line)
        assert not list(tmp_path.iterdir())

    def test_weights_that_are_not_finite(self, tmp_path):
        save_file({"weight": np.full((64, 64), np.nan, np.float32)}, tmp_path / "x.safetensors")
        for target in ((), ("--bits", 4)):
            line = refused("quantize", tmp_path / "x.safetensors", tmp_path / "y", *target)
            assert "4096 of 4096 weights are NaN" in line
            assert line.endswith("; --rule 'weight=dense' leaves it dense\n")

    def test_a_rule_that_is_proposed_can_be_used(self, tmp_path):
        source, name = tmp_path / "x.safetensors", "it's [0]*.weight"
        save_file({name: np.full((64, 64), np.nan, np.float32), "a.weight": weights(64, 64)}, source)
        line = refused("quantize", source, tmp_path / "y")
        proposed = re.search(r"--rule '.*=dense'", line)
        assert proposed
        done = as_json("quantize", source, tmp_path / "y", *shlex.split(proposed[0]))
        assert (done["packed"], done["leaves"]) == (1, 2)

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (KeyError("no leaf"), "btc: no leaf\n"),
            (OSError(28, "x could not be written: no space"), "btc: x could not be written: no space\n"),
            (PermissionError(13, "Permission denied", "x"), "btc: x: Permission denied\n"),
            (ValueError("two\nlines\x1b[2J"), "btc: two lines\\x1b[2J\n"),
            (ValueError(), "btc: ValueError\n"),
        ],
    )
    def test_errors_of_the_library(self, error, line, small, monkeypatch):
        monkeypatch.setattr(btc_jax, "open_checkpoint", fails_with(error))
        assert refused("inspect", small) == line

    def test_a_bug_is_not_hidden(self, small, monkeypatch):
        monkeypatch.setattr(btc_jax, "open_checkpoint", fails_with(AssertionError("a bug")))
        with pytest.raises(AssertionError):
            btc("inspect", small)

    def test_interrupts(self, source, small, tmp_path, monkeypatch):
        monkeypatch.setattr(btc_jax, "quantize_file", fails_with(KeyboardInterrupt()))
        monkeypatch.setattr(btc_jax, "open_checkpoint", fails_with(KeyboardInterrupt()))
        assert "resumes where it stopped" in refused("quantize", source, tmp_path / "x", code=130)
        assert "starts it again" in refused("inspect", small, code=130)

    def test_a_reader_that_leaves(self, small, monkeypatch):
        monkeypatch.setattr(console.os, "dup2", lambda *_: None)
        monkeypatch.setattr(reading, "show", fails_with(BrokenPipeError()))
        assert btc("inspect", small) == (141, "", "")


def fails_with(error):
    def fail(*_, **__):
        raise error

    return fail


class TestHelp:
    @pytest.mark.parametrize(
        "command", ["", "plan", "quantize", "search", "dequantize", "inspect", "verify", "diff", "report"]
    )
    def test_fits_and_tells_exit_codes_and_an_example(self, command):
        code, out, err = btc(*command.split(), "--help")
        assert (code, err) == (0, "")
        assert "Exit codes: 0" in out
        assert f"  btc {command or 'plan'} " in out
        assert max(map(len, out.splitlines())) <= 80

    def test_without_arguments(self):
        assert btc()[1] == btc("--help")[1]

    def test_version(self):
        assert btc("--version") == (0, f"btc {btc_jax.__version__}\n", "")


def test_progress_is_for_terminals(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr(_progress, "Console", lambda **_: Console(stderr=True, force_terminal=terminal, width=80))  # noqa: B023
        with _progress.progress("quantizing", 2_000_000) as on_leaf:
            on_leaf("a", 1_000_000)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("1.0/2.0 MB" in err) == terminal


def start(*args):
    command = [sys.executable, "-m", "btc_jax", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestProcess:
    def test_output_and_exit_codes(self, source, small, tmp_path):
        runs = [start("diff", source, small, "--json"), start("inspect", tmp_path / "nope")]
        (out, err), (nothing, line) = (run.communicate() for run in runs)
        assert [run.returncode for run in runs] == [1, 2]
        assert (json.loads(out)["different_leaves"], err) == (2, "")
        assert (nothing, line) == ("", f"btc: {tmp_path / 'nope'} does not exist; check the path\n")

    def test_completion(self):
        environment = os.environ | {"_BTC_COMPLETE": "complete_bash", "COMP_WORDS": "btc q", "COMP_CWORD": "1"}
        done = subprocess.run([sys.executable, "-m", "btc_jax_cli"], env=environment, capture_output=True, text=True)
        assert (done.stdout.split(), done.stderr) == (["quantize"], "")

    def test_an_interrupted_run_resumes(self, tmp_path):
        save_file({f"{i}.weight": weights(64, 64) for i in range(300)}, tmp_path / "x.safetensors")
        run = start("quantize", tmp_path / "x.safetensors", tmp_path / "y.btc")
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob(".*.parts/*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGINT)
        out, err = run.communicate()
        assert (run.returncode, out) == (130, "")
        assert err == "btc: interrupted; the same command resumes where it stopped\n"
        done = as_json("quantize", tmp_path / "x.safetensors", tmp_path / "y.btc")
        assert 3 <= done["resumed"] < 300
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors", "y.btc"]
