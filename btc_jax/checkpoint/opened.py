"""An open checkpoint: a file, or an index and its files. Nothing in it is trusted before it is checked."""

import errno
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax._typing import PyTree
from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, refusing
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.handles import File, Handles
from btc_jax.checkpoint.index import Limits, check_index, index_of, parse_index
from btc_jax.checkpoint.leaves import from_arrays
from btc_jax.checkpoint.place import Device, Placing, placed
from btc_jax.checkpoint.rebuild import rebuild
from btc_jax.checkpoint.record import LeafRecord, Tensor
from btc_jax.checkpoint.text import MAX_TEXT
from btc_jax.checkpoint.ties import check_ties, home
from btc_jax.checkpoint.write import real_path

PathLike = str | os.PathLike[str]


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint: a mapping from paths to leaves, which are read on access.

    A context manager. `checkpoint[path]` is `checkpoint.read(path)`.

    Attributes:
        path: the file, or the index of several files.
        records: what is stored for each leaf, by path.
    """

    path: Path

    def __init__(self, path: Path, files: Sequence[File], tree: Any, handles: Handles):
        self.path, self._tree, self._handles = path, tree, handles
        self._files = files
        self._home = {leaf.path: file for file in files for leaf in file.manifest.leaves}
        self.records: dict[str, LeafRecord] = {leaf.path: leaf for file in files for leaf in file.manifest.leaves}
        if len(self.records) != sum(len(file.manifest.leaves) for file in files):
            raise BTCFormatError(f"{path}: two leaves have the same path")

    def __getitem__(self, path: str) -> Any:
        return self.read(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, path: object) -> bool:
        return path in self.records

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping would read all leaves, to compare them

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        packed = sum(record.kind == "packed" for record in self.records.values())
        return f"Checkpoint({str(self.path)!r}: {len(self)} leaves, {packed} packed, {self.nbytes:,} bytes)"

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is read from."""
        return (self.path, *(file.path for file in self._files))

    def close(self) -> None:
        self._handles.close()

    def check(self) -> "Checkpoint":
        """Refuse a tree that does not use each leaf once, and invalid ties, before any leaf is read."""
        self.build(list(self.records))
        check_ties(self.records, self.path)
        return self

    @property
    def is_part(self) -> bool:
        """Whether this is one of several files, opened without their index: it has leaves, but no tree."""
        return self._tree is None and bool(self.records)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, without headers."""
        return sum(record.nbytes for record in self.records.values())

    def read(self, path: str, *, dense: bool = False, device: Device | None = None, checksums: bool = True) -> Any:
        """Read one leaf, and only its bytes.

        Args:
            path: one of `records`.
            dense: decode a packed leaf.
            device: a device, or a sharding, to put it on; a packed leaf lies whole on all devices of a sharding.
            checksums: compare the bytes with their checksums.

        Raises:
            KeyError: if there is no such leaf.
            BTCFormatError, BTCIntegrityError: if the leaf is damaged, or its parts do not fit.
        """
        if path not in self.records:
            raise KeyError(f"{self.path} has no leaf {path!r}; it has {len(self.records)}, see .records")
        return placed(self.read_numpy(path, checksums), dense, device)

    def read_numpy(self, path: str, checksums: bool = True) -> Any:
        """One leaf with its arrays in numpy; a packed leaf is a `BTCTensor` of numpy arrays."""
        stored = self._stored(path)
        try:
            return from_arrays(stored, [self.read_tensor(tensor, checksums) for tensor in stored.tensors])
        except BTCIntegrityError:
            raise
        except BTCFormatError as error:
            error.args = (f"{self.path}: {error}",)
            raise

    def read_tensor(self, tensor: Tensor, checksums: bool = True) -> np.ndarray:
        """One stored tensor of a leaf, as it is in the file."""
        return self._home[tensor.name].read(tensor, checksums)

    def leaves(self, paths: Sequence[str], placing: Placing, checksums: bool = True) -> list[Any]:
        """Several leaves on devices; tied ones are one object."""
        return [placing.leaf(p, home(self.records[p]), partial(self.read_numpy, p, checksums)) for p in paths]

    def build(self, leaves: Sequence[Any]) -> PyTree:
        """The tree of all leaves, given in the order of `records`."""
        if self.is_part:
            raise BTCFormatError(f"{self.path} is one of several files; open their index, or select leaves")
        try:
            return rebuild(self._tree, list(self.records), leaves)
        except BTCFormatError as error:
            raise BTCFormatError(f"{self.path}: {error}") from error

    def _stored(self, path: str) -> LeafRecord:
        """The record under which a leaf is stored."""
        first = home(self.records[path])
        if first not in self.records:
            raise BTCFormatError(f"{self.path}: leaf {path!r} is {first!r}, which is in another file; open the index")
        return self.records[first]


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a checkpoint, in one file or in several, without reading its leaves.

    Returns:
        The open checkpoint, a context manager and a mapping from paths to leaves.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        BTCFormatError: if it is not a compressed checkpoint, or its header is damaged.

    Examples:
        >>> import btc_jax, jax.numpy as jnp, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = btc_jax.save(f"{folder}/m.safetensors", {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.zeros(4)})
        ...     with open_checkpoint(f"{folder}/m.safetensors") as checkpoint:
        ...         print(list(checkpoint), checkpoint["b"])
        ['a/kernel', 'b'] [0. 0. 0. 0.]
    """
    # The hub's cache has links to files of other names, so an index there is used under its own name.
    index = next((i for i in (index_of(Path(path)), index_of(real_path(path))) if i.is_file()), None)
    with _no_collector():
        return _open_file(real_path(path)) if index is None else _open_index(index)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Pause Python's cycle collector, which would take half the time to walk objects that are all kept anyway."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open_file(path: Path) -> Checkpoint:
    handles = Handles()
    try:
        file = File(path, handles)
        checkpoint = Checkpoint(path, [file], file.manifest.tree, handles)
        return checkpoint if checkpoint.is_part else checkpoint.check()
    except BaseException:
        handles.close()
        raise


def _open_index(path: Path) -> Checkpoint:
    if path.stat().st_size > MAX_TEXT:
        raise BTCFormatError(f"{path} has {path.stat().st_size:,} bytes; an index has at most {MAX_TEXT:,}")
    data, handles = path.read_bytes(), Handles()
    tree, shards = parse_index(data, path)
    try:
        files = _open_shards(path, shards, handles)
        with refusing(f"{path}: the manifest"):
            check_index(data, tree, [(file.path.name, file.manifest, file.text) for file in files], path)
        return Checkpoint(path, files, tree, handles).check()
    except BaseException:
        handles.close()
        raise


def _open_shards(path: Path, shards: Sequence[tuple[str, str, int]], handles: Handles) -> list[File]:
    files, limits = [], Limits(path)
    for name, crc, count in shards:
        file = _open_shard(path, name, handles)
        if crc32c(file.text.encode()) != crc or len(file.manifest.leaves) != count:
            raise BTCIntegrityError(f"{path}: {name} is not the file that was saved with this index")
        limits.add(file.start, file.text, count)
        files.append(file)
    return files


def _open_shard(index: Path, name: str, handles: Handles) -> File:
    try:
        return File(index.with_name(name), handles)
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise BTCFormatError(f"{index} names the file {name[:60]!a}, which is missing next to it") from error
