import math
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import btc_jax
from btc_jax_cli.options import nbytes
from tests.cli_support import LEAVES as LEAVES
from tests.cli_support import RNG as RNG
from tests.cli_support import as_json as as_json
from tests.cli_support import btc as btc
from tests.cli_support import folder as folder
from tests.cli_support import refused as refused
from tests.cli_support import small as small
from tests.cli_support import source as source
from tests.cli_support import weights as weights


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
