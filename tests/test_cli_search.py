"""btc search, rules in a file, dry runs, and the options of codecs."""

import dataclasses

import pytest

from btc_jax.codecs import CODECS
from btc_jax_cli.fields import codec_fields
from tests.cli_support import as_json as as_json
from tests.cli_support import btc as btc
from tests.cli_support import folder as folder
from tests.cli_support import refused as refused
from tests.cli_support import source as source


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
