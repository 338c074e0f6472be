import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

import btc_jax
import btc_jax_cli

# In the direction of the data flow; a module imports only from those before it.
ROOMS = [
    *(
        "_typing",
        "_errors",
        "_xla",
        "_paths",
        "_progress",
        "tables",
        "_mesh",
        "_arraylike",
        "seal",
        "formats",
        "planes",
        "sizes",
        "processes",
        "blocks",
        "large",
        "leafspec",
        "pieces",
        "codecs",
        "policy",
        "native",
        "backends",
        "tiles",
        "intact",
        "primitives",
        "decoding",
        "tensor",
        "fusion",
        "coding",
        "allocate",
        "packing",
        "choices",
        "fit",
        "partition",
        "_refuse",
        "_ties",
        "tree",
    ),
    *(
        "plan",
        "metrics",
        "baselines",
        "evaluate",
        "_inputs",
        "sensitivity",
        "search",
        "checkpoint",
        "savers",
        "sources",
        "stream",
        "orbax",
    ),
    "compare",
    "report",
    "__main__",
]
CLI_ROOMS = ["errors", "console", "fields", "options", "functions", "app", "writing", "reading", "commands"]


def rooms_imported_by(file, package="btc_jax"):
    """All imports: at the top, in a function, for a type checker."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def test_imports_go_one_way():
    package = Path(btc_jax.__file__).parent
    files = [file for file in package.rglob("*.py") if file.name != "__init__.py" or file.parent != package]
    assert len(files) > 15
    for file in files:
        room = file.relative_to(package).parts[0].removesuffix(".py")
        later = rooms_imported_by(file) - set(ROOMS[: ROOMS.index(room) + 1])
        assert not later, f"{file.name} imports {later}, which come after it"
        assert not rooms_imported_by(file, "btc_jax_cli") or room == "__main__"


def test_imports_of_the_command_go_one_way():
    for file in Path(btc_jax_cli.__file__).parent.glob("[!_]*.py"):
        later = rooms_imported_by(file, "btc_jax_cli") - set(CLI_ROOMS[: CLI_ROOMS.index(file.stem)])
        assert not later, f"{file.name} imports {later}, which come after it"


def imported_by(program):
    """All modules loaded in a new process after it has run a program."""
    program += "\nimport sys; print('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("modules:")[2].split())


PACKING = "import btc_jax, numpy; packed = btc_jax.btc_quantize({'kernel': numpy.ones((64, 64), numpy.float32)})"
LOADING = """
import tempfile
with tempfile.TemporaryDirectory() as folder:
    btc_jax.save(folder + "/file", packed)
    btc_jax.load(folder + "/file")
"""


@pytest.mark.parametrize("program", ["import btc_jax", PACKING, PACKING + LOADING], ids=["import", "pack", "load"])
def test_the_library_imports_nothing_large_beside_jax_and_flax(program):
    large = {
        "flax.nnx",
        "optax",
        "typer",
        "rich.progress",
        "matplotlib",
        "orbax",
        "tensorstore",
        "safetensors",
        "jinja2",
    }
    found = imported_by(program) & large
    assert not found


def test_importing_the_library_is_enough_to_read_an_exported_function(tmp_path):
    packed = btc_jax.btc_quantize({"kernel": jnp.ones((64, 64))})
    exported = export.export(jax.jit(lambda packed: packed["kernel"].dequantize()))(packed)
    (tmp_path / "function").write_bytes(exported.serialize())
    imported_by(f"""
import btc_jax
from pathlib import Path
from jax import export
export.deserialize(bytearray(Path({str(tmp_path / "function")!r}).read_bytes()))
""")


def test_a_file_that_holds_something_of_nnx_imports_it(tmp_path):
    btc_jax.save(tmp_path / "file", nnx.State({"kernel": nnx.Param(jnp.ones(3))}))
    imported_by(f"""
import btc_jax, sys
tree = btc_jax.load({str(tmp_path / "file")!r})
nnx = sys.modules["flax.nnx"]
assert (type(tree), type(tree["kernel"])) == (nnx.State, nnx.Param)
""")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("quantize --help", 0),
        ("--version", 0),
        ("--nope", 2),
        ("nope", 2),
        ("plan", 2),
        ("plan --nope", 2),
        ("plan x --bits many", 2),
    ],
)
def test_the_command_imports_jax_only_to_work(line, code):
    program = f"""
from btc_jax_cli.commands import app
try:
    app({line.split()})
except SystemExit as done:
    assert done.code == {code}, done.code
"""
    found = imported_by(program) & {"btc_jax", "jax", "flax", "numpy"}
    assert not found


def test_the_top_level_is_what_everybody_needs():
    """Some 25 functions and classes; what they return and raise is in the modules next to them."""
    names = {name for name in vars(btc_jax) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(btc_jax, name))}
    assert names - modules == {
        *("btc_quantize", "btc_dequantize", "btc_reconstruct", "btc_allocate", "btc_plan", "btc_metrics", "btc_report"),
        *("btc_evaluate", "btc_logits", "btc_search", "btc_sensitivity", "fused", "backend", "BTCTensor", "is_packed"),
        "quantize_leaf",
        *("save", "load", "open_checkpoint", "verify", "quantize_file", "dequantize_file", "plan_file"),
        *("Uniform", "Multilevel", "Policy", "Rule"),
    }
    listed = (btc_jax.__doc__ or "").partition("is in the modules:")[2]
    assert {name for name in modules if f"`{name}`" in listed} >= {"baselines", "checkpoint", "metrics", "stream"}


FUNCTIONS = [name for name, value in vars(btc_jax).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "is_packed"])  # which never raises
def test_every_function_says_what_it_takes_returns_and_raises(name):
    function = getattr(btc_jax, name)
    lines = (inspect.getdoc(function) or "").splitlines()
    sections = {line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")}
    wanted = {"Returns", "Raises", "Examples"} | (
        {"Args"} if len(inspect.signature(function).parameters) > 1 else set()
    )
    assert wanted <= sections
    entries = lines[lines.index("Raises:") + 1 :]
    entries = entries[: entries.index("")]
    assert all(re.match(r"    ([\w, ]+: (if |as for )|    )", line) for line in entries), entries
