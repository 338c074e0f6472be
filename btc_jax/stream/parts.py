"""Finished leaves of a run beside its target, so that a run that was killed goes on where it was.

Each is a small checkpoint of its own in a folder. At the end they are put together into the target, and the folder
goes.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax.checkpoint.files import only_writer
from btc_jax.checkpoint.manifest import LeafRecord
from btc_jax.checkpoint.read import open_checkpoint, verify
from btc_jax.checkpoint.write import StoredLeaf, write_leaves


class Parts:
    """The finished leaves of one source, each packed in one way. Within the `with`, no other run has this target."""

    def __init__(self, target: Path):
        self._target = target
        self._lock = only_writer(target.with_name(f"{target.name}.parts"))
        self.folder: Path | None = None

    def __enter__(self) -> "Parts":
        self._lock.__enter__()
        return self

    def open(self, identity: str) -> None:
        """Takes up what an earlier run of this identity left, and clears away what others did."""
        folder = self._target.with_name(f".{self._target.name}.{identity}.parts")
        ours = re.compile(rf"\.{re.escape(self._target.name)}\.[0-9a-f]{{8}}\.parts")
        for other in self._target.parent.iterdir():
            if ours.fullmatch(other.name) and other != folder:
                shutil.rmtree(other)  # left by a run with another source, policy or target
        folder.mkdir(exist_ok=True)
        self.folder = folder

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.folder and (kind is None or not any(self.folder.glob("*"))):
            self.discard()
        self._lock.__exit__(None, None, None)

    def discard(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, i: int) -> bool:
        """Whether leaf `i` is there, whole."""
        try:
            return verify(self._file(i)).ok
        except (OSError, ValueError):
            return False

    def put(self, i: int, leaf: StoredLeaf) -> None:
        write_leaves(self._file(i), 0, [leaf], None)

    def leaves(self, count: int) -> list[StoredLeaf]:
        """The finished leaves; their arrays stay in their files until they are asked for."""
        return [_stored(self._file(i)) for i in range(count)]

    def _file(self, i: int) -> Path:
        assert self.folder, "open comes first"
        return self.folder / f"{i}.safetensors"


class _LazyArrays(Sequence[np.ndarray]):
    """The arrays of a finished leaf, read when they are asked for, and not kept."""

    def __init__(self, file: Path, record: LeafRecord):
        self._file, self._record = file, record

    def __len__(self) -> int:
        return len(self._record.tensors)

    def __getitem__(self, i: Any) -> Any:
        with open_checkpoint(self._file) as part:
            return part.read_tensor(self._record.tensors[i])


def _stored(file: Path) -> StoredLeaf:
    with open_checkpoint(file) as part:
        (record,) = part.records.values()
    return record, _LazyArrays(file, record)
