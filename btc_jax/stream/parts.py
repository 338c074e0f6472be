"""Finished leaves of a run, next to its target, so that a killed run can resume. Each is in a file like those of a
sharded checkpoint, without an index. At the end they are combined into the target, and their folder is removed.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax.checkpoint.files import only_writer
from btc_jax.checkpoint.manifest import Manifest
from btc_jax.checkpoint.read import open_checkpoint, verify
from btc_jax.checkpoint.record import LeafRecord
from btc_jax.checkpoint.ties import StoredLeaf
from btc_jax.checkpoint.write import write_file


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
        """Adopts what an earlier run of this identity left, and removes what others left."""
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
        """Whether leaf `i` is finished and undamaged."""
        try:
            return self._file(i).exists() and verify(self._file(i)).ok
        except (OSError, ValueError):
            return False

    def put(self, i: int, leaf: StoredLeaf) -> None:
        """Adds a finished leaf; from then on, the run may be killed without losing it. It is not flushed to disk, which
        would take most of the time of small leaves: whatever a power failure damages is detected and redone.
        """
        file = self._file(i)
        unfinished = file.with_suffix(".tmp")
        with unfinished.open("wb") as stream:
            write_file(stream, Manifest(None, (leaf[0],)), [leaf])
        os.replace(unfinished, file)

    def leaves(self, count: int) -> list[StoredLeaf]:
        """The finished leaves; their arrays stay in their files until they are needed."""
        return [_stored(self._file(i)) for i in range(count)]

    def _file(self, i: int) -> Path:
        assert self.folder, "open comes first"
        return self.folder / f"{i}.safetensors"


class _LazyArrays(Sequence[np.ndarray]):
    """The tensor of a finished leaf, read on demand and not kept."""

    def __init__(self, file: Path, record: LeafRecord):
        self._file, self._record = file, record

    def __len__(self) -> int:
        return len(self._record.tensors)

    def __getitem__(self, i: Any) -> Any:
        tensor = self._record.tensors[i]
        with open_checkpoint(self._file) as part:
            return part.read_tensor(tensor)


def _stored(file: Path) -> StoredLeaf:
    with open_checkpoint(file) as part:
        (record,) = part.records.values()
    return record, _LazyArrays(file, record)
