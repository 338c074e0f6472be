import ast
from pathlib import Path

import btc_jax

# The way the data flows; a module imports only from those before it.
ROOMS = [
    *(
        "_typing",
        "_errors",
        "_xla",
        "_paths",
        "_progress",
        "_mesh",
        "_arraylike",
        "seal",
        "formats",
        "codecs",
        "blocks",
        "policy",
        "planes",
        "backends",
        "tiles",
        "intact",
        "decoding",
        "tensor",
        "coding",
        "allocate",
        "packing",
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
        "search",
        "report",
        "checkpoint",
        "savers",
        "sources",
        "stream",
        "orbax",
    ),
    *("compare", "_console", "_options", "cli"),
]


def rooms_imported_by(file):
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("btc_jax.")} - {"__version__"}


def test_imports_go_one_way():
    package = Path(btc_jax.__file__).parent
    files = [file for file in package.rglob("*.py") if file.name != "__init__.py" or file.parent != package]
    assert len(files) > 15
    for file in files:
        room = file.relative_to(package).parts[0].removesuffix(".py")
        later = rooms_imported_by(file) - set(ROOMS[: ROOMS.index(room) + 1])
        assert not later, f"{file.name} imports {later}, which come after it"
