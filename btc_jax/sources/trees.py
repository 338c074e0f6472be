"""Checkpoints of whole trees: Flax msgpack files and Orbax folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax.sources.base import KINDS, Source, SourceLeaf, flat, leaf_of, readable


class MsgpackSource(Source):
    """The msgpack of `flax.serialization.to_bytes`. It has no index: all of it is in memory until it is closed."""

    def _scan(self) -> list[SourceLeaf]:
        from flax.serialization import msgpack_restore

        with readable(self.file, "is no Flax msgpack file, or a damaged one"):
            paths, leaves, _ = flat(msgpack_restore(self.file.read_bytes()))
            leaves = [np.asarray(leaf) for leaf in leaves]
        self._values = dict(zip(paths, leaves, strict=True))
        return [leaf_of(self.file, path, leaf.shape, leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)]

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        return self._values[leaf.path]

    def close(self) -> None:
        super().close()
        self._values = {}


class OrbaxSource(Source):
    """The folder of one item of an Orbax checkpoint: a tree of arrays."""

    def _scan(self) -> list[SourceLeaf]:
        try:
            import orbax.checkpoint
        except ImportError as error:
            raise ImportError(f"{self.file} is an Orbax checkpoint; to read it: pip install btc_jax[orbax]") from error
        self._orbax = orbax.checkpoint
        self._handler: Any = orbax.checkpoint.PyTreeCheckpointHandler()
        with readable(self.file, "is a damaged Orbax checkpoint"):
            paths, self._found, self._tree = flat(self._handler.metadata(self.file.absolute()).tree)
        if all(path.endswith("/value") for path in paths):
            paths = [path.removesuffix("/value") for path in paths]  # an NNX state, each variable a folder of one
        return [self._describe(path, leaf) for path, leaf in zip(paths, self._found, strict=True)]

    def _describe(self, path: str, leaf: Any) -> SourceLeaf:
        dtype = getattr(leaf, "dtype", None)
        return leaf_of(self.file, path, getattr(leaf, "shape", ()), type(leaf).__name__ if dtype is None else dtype)

    @property
    def files(self) -> Sequence[Path]:
        return sorted(file for file in self.file.rglob("*") if file.is_file())

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        here = self.leaves.index(leaf)
        wanted = [self._orbax.PLACEHOLDER] * len(self.leaves)
        wanted[here] = self._found[here]
        how = [self._orbax.RestoreArgs(restore_type=np.ndarray)] * len(wanted)
        trees = map(self._tree.unflatten, (wanted, how))
        with readable(self.file, f"is damaged at {leaf.path}"):
            found = self._handler.restore(self.file.absolute(), args=self._orbax.args.PyTreeRestore(*trees))
            return self._tree.flatten_up_to(found)[here]

    def close(self) -> None:
        super().close()
        self._handler.close()


def orbax_item(folder: Path) -> Path:
    """The folder with the tree: the folder itself, or the only item of a step."""
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
    raise ValueError(f"{folder} is a folder of an unknown kind; give {KINDS}")
