"""README.md and the pages in docs: every Python block runs, every `btc` line does what it says."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file
from typer.testing import CliRunner

import btc_jax
from btc_jax_cli.commands import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The code blocks of a page, padded with empty lines to keep their line numbers."""
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


class Layers(nn.Module):
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            x = nn.relu(nn.Dense(64, name=name)(x))
        return x


class Model(nn.Module):
    """A small network whose layers have the names used on the pages."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for name in ("block_0", "block_1"):
            x = Layers(("dense",), name=name)(x)
        return Layers(("layer_0", "head"), name="encoder")(x)


@pytest.fixture(scope="module")
def presupposed():
    """The names that the pages presuppose: a trained model and functions to measure it."""
    model, images = Model(), jax.random.normal(jax.random.key(0), (32, 8, 8))
    params = model.init(jax.random.key(1), images)["params"]

    def answers(params):
        return jnp.argmax(jnp.asarray(model.apply({"params": params}, images)), axis=-1)

    labels = answers(params)

    def accuracy(params):
        return float((answers(params) == labels).mean())

    return {"params": params, "model": model, "images": images, "labels": labels, "accuracy": accuracy}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, presupposed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(presupposed)
    for block in blocks(page, "python"):
        with jax.numpy_dtype_promotion("standard"):  # the default for users, who write optax.adam(1e-2)
            exec(compile(block, str(page), "exec"), names)


def test_the_readme_shows_what_it_says(presupposed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(presupposed)
    first, *rest = blocks(ROOT / "README.md", "python")
    exec(compile(first, "README.md", "exec"), names)
    packed = [leaf for leaf in jax.tree.leaves(names["packed"], is_leaf=btc_jax.is_packed) if btc_jax.is_packed(leaf)]
    assert len(packed) == 4
    assert names["metrics"].total.effective_bits <= 4.5
    assert names["logits"].shape == (32, 64)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(presupposed["params"])
    assert rest


def test_transcripts_are_what_the_command_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(0)
    leaves = {"encoder/layer_0/kernel": 0.1 * rng.standard_normal((64, 64), dtype=np.float32)}
    leaves |= {"encoder/layer_0/bias": np.zeros(64, np.float32)}
    leaves |= {"head/kernel": 0.2 * rng.standard_normal((64, 64), dtype=np.float32)}
    save_file(leaves, "model.safetensors")
    found = blocks(ROOT / "docs" / "command-line.md", "console")
    assert len(found) > 5
    for block in found:
        line, _, shown = block.strip().partition("\n")
        result = CliRunner().invoke(app, shlex.split(line.removeprefix("$ btc ")), catch_exceptions=False)
        assert timeless(result.stdout + result.stderr) == timeless(shown), line


def timeless(text):
    """Without the seconds that a command took, which move the columns of a table."""
    text = re.sub(r"[0-9.]+ s$", "T s", text.strip(), flags=re.MULTILINE)
    return re.sub(r" +[0-9.]+ (?=(?:holds|best|rmse .*)$)", " T ", text, flags=re.MULTILINE)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert {
        f'id="btc_jax.{name}"' in api for name in ("btc_quantize", "BTCTensor", "fused", "checkpoint.Checkpoint")
    } == {True}


def test_rules_in_toml_can_be_loaded(tmp_path):
    for block in blocks(ROOT / "docs" / "policy.md", "toml"):
        (tmp_path / "rules.toml").write_text(block)
        assert len(btc_jax.policy.load_rules(tmp_path / "rules.toml")) == 2


def commands(page):
    lines = "".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_btc_lines_run(page, presupposed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leaves = jax.tree_util.tree_flatten_with_path(presupposed["params"])[0]
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    save_file(dict(zip(names, (jnp.asarray(leaf).__array__() for _, leaf in leaves), strict=True)), "model.safetensors")
    for line in commands(page):
        program, *arguments = shlex.split(line, comments=True)
        if program == "btc":
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert (result.exit_code, result.stderr) == (1 if arguments[0] == "diff" else 0, ""), line
            assert result.stdout, line


def test_the_guide_shows_every_command():
    text = (ROOT / "docs" / "command-line.md").read_text()
    shown = set(re.findall(r"^\$ btc (\w+)", text, re.MULTILINE))
    listed = CliRunner().invoke(app, ["--help"]).stdout.partition("Commands:")[2]
    assert shown == set(re.findall(r"^  (\w+) {2,}", listed, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_extras_exist(page):
    text = page.read_text()
    modules = set(re.findall(r"python3? -m ([a-z_]+(?:\.[a-z_]+)*)", text))
    missing = [name for name in modules if not importlib.util.find_spec(name)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for group in re.findall(r'\[([a-z,-]+)\]"', text) for extra in group.split(",")}
    assert not missing
    assert named <= extras.keys()


def test_the_set_up_commands_are_the_two():
    set_up = [line for line in commands(ROOT / "README.md") if not line.startswith("btc ")]
    assert [line.split(" && ")[-1].split()[0] for line in set_up] == [".venv/bin/python", ".venv/bin/pytest"]
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install ") for line in set_up)
    assert set_up[0].endswith(" -m examples.quickstart")


def test_the_notebook_runs(monkeypatch):
    """All of its cells, one after another; and its outputs are there, and small."""
    pytest.importorskip("sklearn")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    file = ROOT / "examples" / "tour.ipynb"
    assert file.stat().st_size < 300_000
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) > 8
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it
        for i, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
    matplotlib.pyplot.close("all")
    assert names["metrics"].total.effective_bits <= 4.5
    assert names["search"].best is not None


def test_the_quickstart_starts_as_a_module():
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "examples.quickstart", "--help"]
    assert "--epochs" in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
