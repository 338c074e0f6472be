"""Errors in one line, help, and the command as a process."""

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import btc_jax
from btc_jax import _progress
from btc_jax_cli import console, reading
from tests.cli_support import as_json as as_json
from tests.cli_support import btc as btc
from tests.cli_support import damaged as damaged
from tests.cli_support import folder as folder
from tests.cli_support import refused as refused
from tests.cli_support import small as small
from tests.cli_support import source as source
from tests.cli_support import weights as weights


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


def wrong_codecs():
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
    yield "--width is 9; it can be 0 to 8 bits", ("--width", "9", "--bits", "4")
    yield "--width 'all' is not a whole number or 'leaf'", ("--width", "all", "--codec", "multilevel")
    yield "--effort 'slow' is not 'fast' or 'exhaustive'", ("--effort", "slow", "--bits", "4")
    yield "--block-size is 8; it can be 16 to 256", ("--block-size", "8", "--bits", "4")
    yield "--rule 'head*=weight:2' is for a target", ("--rule", "head*=weight:2")
    yield "weight 'much' is not a number", ("--rule", "head*=weight:much", "--bits", "4")
    yield "weight is -1.0; it must be a positive number", ("--rule", "head*=weight:-1", "--bits", "4")
    yield "bits of 0.1 cannot be reached", ("--bits", "0.1", "--measure")
    yield "btc: --bits of 9 cannot be reached", ("--bits", "9", "--measure")


class TestOneLine:
    @pytest.mark.parametrize(("says", "options"), [*wrong_options(), *wrong_codecs()])
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
