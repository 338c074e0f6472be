"""Checkpoints of whole trees: Flax msgpack files and Orbax folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax.checkpoint.manifest import FORMAT
from btc_jax.large import Box
from btc_jax.leafspec import LeafSpec, Origin
from btc_jax.sources.base import Source, bytes_leaf, flat, leaf_of, readable, unknown


class MsgpackSource(Source):
    """The msgpack of `flax.serialization.to_bytes`. It has no index: all of it is in memory until it is closed."""

    def _scan(self) -> list[LeafSpec]:
        from flax.serialization import msgpack_restore

        named = self.file.suffix == ".msgpack"
        with readable(self.file, "is not a Flax msgpack file, or a damaged one" if named else unknown()):
            paths, leaves, _ = flat(msgpack_restore(self.file.read_bytes()))
        self._values = {path: _array(leaf) for path, leaf in zip(paths, leaves, strict=True)}
        return [_describe(self.file, *pair) for pair in zip(paths, leaves, strict=True)]

    def _read(self, leaf: LeafSpec, box: Box) -> np.ndarray:
        return self._values[leaf.path][*box, ...]

    def close(self) -> None:
        super().close()
        self._values = {}


def _describe(file: Path, path: str, leaf: Any) -> LeafSpec:
    array = _array(leaf)
    if isinstance(leaf, str | bytes):
        return bytes_leaf(path, array.nbytes, Origin(type(leaf).__name__, ()))
    return leaf_of(file, path, array.shape, array.dtype)


def _array(leaf: Any) -> np.ndarray:
    """An array as it is, and the bytes of a text."""
    leaf = leaf.encode() if isinstance(leaf, str) else leaf
    return np.frombuffer(bytearray(leaf), np.uint8) if isinstance(leaf, bytes) else np.asarray(leaf)


class OrbaxSource(Source):
    """The folder of one item of an Orbax checkpoint: a tree of arrays."""

    def _scan(self) -> list[LeafSpec]:
        try:
            import orbax.checkpoint
        except ImportError as error:
            raise ImportError(f"{self.file} is an Orbax checkpoint; to read it: pip install btc_jax[orbax]") from error
        self._orbax = orbax.checkpoint
        self._handler: Any = orbax.checkpoint.PyTreeCheckpointHandler()
        with readable(self.file, "is a damaged Orbax checkpoint"):
            paths, self._found, self._tree = flat(self._handler.metadata(self.file.absolute()).tree)
        self.compressed = (self.file / f"{FORMAT}.json").is_file()  # next to the arrays, if btc_jax.orbax packed them
        if all(path.endswith("/value") for path in paths):
            paths = [path.removesuffix("/value") for path in paths]  # an NNX state, each variable a folder of one
        return [self._describe(path, leaf) for path, leaf in zip(paths, self._found, strict=True)]

    def _describe(self, path: str, leaf: Any) -> LeafSpec:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is not None and dtype is not None:
            return leaf_of(self.file, path, shape, np.dtype(dtype))
        return _describe(self.file, path, self._restored(leaf, path))  # text: Orbax does not tell its size

    @property
    def files(self) -> Sequence[Path]:
        return sorted(file for file in self.file.rglob("*") if file.is_file())

    def _read(self, leaf: LeafSpec, box: Box) -> np.ndarray:
        return _array(self._restored(self._found[self.leaves.index(leaf)], leaf.path))[*box, ...]

    def _restored(self, leaf: Any, path: str) -> Any:
        here = next(i for i, found in enumerate(self._found) if found is leaf)
        wanted = [self._orbax.PLACEHOLDER] * len(self._found)
        wanted[here] = leaf
        numbers, text = (self._orbax.RestoreArgs(restore_type=kind) for kind in (np.ndarray, str))
        how = [numbers if hasattr(found, "dtype") else text for found in self._found]
        trees = map(self._tree.unflatten, (wanted, how))
        with readable(self.file, f"is damaged at {path}"):
            found = self._handler.restore(self.file.absolute(), args=self._orbax.args.PyTreeRestore(*trees))
            return self._tree.flatten_up_to(found)[here]

    def close(self) -> None:
        super().close()
        self._handler.close()


def orbax_item(folder: Path) -> Path | None:
    """The folder with the tree: the folder itself, or the only item of a step; `None` if Orbax did not write it."""
    items = [file.parent for file in sorted(folder.glob("*/_METADATA"))]
    steps = [file.parent for file in sorted(folder.glob("*/_CHECKPOINT_METADATA"))]
    if folder.name.endswith(".orbax-checkpoint-tmp"):
        raise ValueError(f"{folder} is a save that Orbax did not finish; open a finished one")
    if (folder / "_METADATA").is_file():
        return folder
    if len(items) == 1:
        return items[0]
    if items or steps:
        names = ", ".join(file.name for file in (items or steps)[-5:])
        raise ValueError(f"{folder} holds {len(items or steps)} Orbax checkpoints; open one of them, such as {names}")
    if any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", "manifest.ocdbt")):
        raise ValueError(f"{folder} is an Orbax checkpoint whose tree has no _METADATA file; save it as a tree again")
    return None
