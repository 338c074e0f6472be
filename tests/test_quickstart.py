import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("optax")

import btc_jax
from examples import quickstart

ROWS = [
    "float32",
    "BTC 32",
    "BTC 64",
    "BTC 128",
    "BTC 256",
    "multi 4.5",
    "multi 3.5",
    "uniform8",
    "percentile8",
    "absmax4",
]


def run(*options: str):
    return CliRunner().invoke(quickstart.app, options, env={"COLUMNS": "80"}, catch_exceptions=False)


def row_of(output: str, name: str) -> list[str]:
    """The figures of one row of the first table: accuracy, KL, agreement, rmse, three kinds of bits, and bytes."""
    found = re.search(rf"^{name} +(\d.*)$", output, re.MULTILINE)
    assert found, f"no row {name!r} in:\n{output}"
    return found[1].split()


@pytest.fixture(scope="module", params=list(quickstart.ModelName))
def kept(request, tmp_path_factory):
    """One run of each model: its output and the file that it saved."""
    path = tmp_path_factory.mktemp("quickstart") / "digits.safetensors"
    result = run("--model", request.param, "--epochs", "3", "--output", str(path))
    assert result.exit_code == 0, result.output
    return result.output, path


def test_the_table_has_all_rows_in_80_columns(kept):
    output, _ = kept
    rows = {name: row_of(output, name) for name in ROWS}
    assert rows["float32"][1:] == ["0.00000", "100.00%", "0.00000", "32.000", "0.000", "32.000", "605,224"]
    assert all(len(row) == 8 for row in rows.values())
    assert all(len(line.rstrip()) <= 80 for line in output.splitlines())
    assert "…" not in output


def test_the_network_learns_and_keeps_its_answers(kept):
    output, _ = kept
    accuracy, agreement = (
        [float(row_of(output, name)[i].rstrip("%")) for name in ("float32", "BTC 64")] for i in (0, 2)
    )
    assert min(accuracy) > 90
    assert min(agreement) > 97


def test_bits_and_bytes_add_up(kept):
    output, _ = kept
    for name in ROWS:
        payload, header, effective = map(float, row_of(output, name)[4:7])
        # The rest is seals, and unfilled rows of the last blocks of small leaves.
        assert payload + header - 2e-3 <= effective <= payload + header + 0.02
    assert float(row_of(output, "absmax4")[6]) == 4.5


def test_the_search_ends_with_advice_and_the_file_answers_the_same(kept):
    output, path = kept
    assert re.search(r"best|No block size is within", output)
    assert "the logits are equal" in output
    assert f"{path.stat().st_size:,} bytes" in output
    assert any(map(btc_jax.is_packed, jax.tree.leaves(btc_jax.load(path), is_leaf=btc_jax.is_packed)))


@pytest.fixture
def exam():
    digits = quickstart.Digits(np.eye(64, dtype=np.float32), np.arange(64, dtype=np.int32))
    return quickstart.Exam(lambda params, images: images @ params["kernel"][:], digits)


PARAMS = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}


def test_other_answers_from_the_file_are_seen(exam, tmp_path, monkeypatch):
    tree, path = btc_jax.btc_quantize(PARAMS), tmp_path / "kernel.safetensors"
    assert quickstart.save_and_check(exam, PARAMS, tree, path)
    monkeypatch.setattr(btc_jax, "load", lambda path: {"kernel": PARAMS["kernel"]})
    assert not quickstart.save_and_check(exam, PARAMS, tree, path)


def test_other_answers_are_a_failure(monkeypatch):
    monkeypatch.setattr(quickstart, "run", lambda *arguments: False)
    assert run().exit_code == 1


def test_blocks_of_64_where_nothing_holds(exam, capsys):
    tree = quickstart.search(
        exam, PARAMS, quickstart.checked_codec(quickstart.CodecName.UNIFORM, threshold=float("inf"))
    )
    assert "No block size is within" in capsys.readouterr().out
    assert tree["kernel"].format.block_size == 64


def test_the_split_is_fixed_by_the_seed_and_even():
    (train, test), (again, _), (other, _) = map(quickstart.split_digits, (0, 0, 1))
    assert (len(train.labels), len(test.labels)) == (1198, 599)
    assert np.array_equal(train.images, again.images)
    assert not np.array_equal(train.images, other.images)
    assert np.abs(np.bincount(train.labels) - 2 * np.bincount(test.labels)).max() <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model torch", "'torch' is not one of 'linen', 'nnx'"),
        ("--codec zip", "'zip' is not one of"),
        ("--low-bits 9", "low_bits is 9 and high_bits is 8"),
        ("--high-bits many", "'--high-bits'"),
        ("--threshold -1", "threshold is -1.0"),
        ("--epochs 0", "'--epochs'"),
        ("--seed -1", "'--seed'"),
        ("--output no/such/folder/file", "there is no folder no/such/folder"),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    result = run(*options.split())
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in error
    assert result.output.rstrip().endswith(error)
