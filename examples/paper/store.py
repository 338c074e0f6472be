"""Finished rows on disk, so that an interrupted run resumes and never computes a row twice.

Each row is kept in its own file, named by a checksum of everything it depends on: the code, the weights, the images,
the options. Any change leads to another name. Files are written atomically.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

import btc_jax
from btc_jax.metrics import jsonable

PyTree = Any


@dataclasses.dataclass
class Store:
    """Rows and arrays of one folder.

    Attributes:
        folder: where the files are.
        computed, reused: names of the rows computed and found in this run.
    """

    folder: Path
    computed: list[str] = dataclasses.field(default_factory=list)
    reused: list[str] = dataclasses.field(default_factory=list)

    def row(self, name: str, depends: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute` returns, as plain JSON values; from the file if it was computed before."""
        path = self._path(name, depends, ".json")
        found = _load(path)
        if found is not None:
            self.reused.append(name)
            return found["row"]
        row = jsonable(compute())
        text = json.dumps({"name": name, "depends": depends, "row": row}, indent=1)
        write_whole(path, text.encode())
        self.computed.append(name)
        return json.loads(text)["row"]

    def array(self, name: str, depends: dict[str, Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The same for one array, which is not a row and is not counted."""
        path = self._path(name, depends, ".npy")
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            array = compute()
        with io.BytesIO() as file:
            np.save(file, array, allow_pickle=False)
            write_whole(path, file.getvalue())
        return array

    def _path(self, name: str, depends: dict[str, Any], suffix: str) -> Path:
        key = json.dumps({"name": name, "code": code_version(), **depends}, sort_keys=True)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:60]
        return self.folder / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"


def _load(path: Path) -> dict[str, Any] | None:
    """The stored row; `None` if there is none, or it cannot be read and must be computed again."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) and "row" in found else None
    except (OSError, ValueError):
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: it is complete, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@cache
def code_version() -> str:
    """A checksum of the code that computes the rows: the library and this package, without what only shows them."""
    library, here = Path(btc_jax.__file__).parent, Path(__file__).parent
    files = sorted((*library.rglob("*.py"), *here.glob("*.py"), *(here / "models").glob("*.py")))
    sources = "".join(f"{path.name} {path.read_text()}" for path in files if path.name != "__main__.py")
    return hashlib.sha256(f"{jax.__version__} {sources}".encode()).hexdigest()[:16]


def tree_digest(tree: PyTree) -> str:
    """A checksum of the values of a tree, such as a network's weights, regardless of the file that they came from."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
