"""Loading: a file of which nothing is believed before it was checked, leaf by leaf."""

import dataclasses
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from btc_jax._typing import PyTree
from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, BTCNotCompressedError, refusing
from btc_jax.checkpoint.files import crc32c, read_at
from btc_jax.checkpoint.leaves import from_arrays
from btc_jax.checkpoint.manifest import MAX_HEADER, LeafRecord, Manifest, Tensor, open_signed, parse_header, parse_json
from btc_jax.checkpoint.structure import rebuild
from btc_jax.checkpoint.write import MAX_HEADERS, MAX_SHARDS, SUFFIX, index_of, index_text, real_path
from btc_jax.tensor import is_packed
from btc_jax.tree import flatten

Device = jax.Device | Sharding
PathLike = str | os.PathLike[str]


class _File:
    """One open safetensors file with a manifest of ours."""

    def __init__(self, path: Path):
        if path.exists() and not path.is_file():
            raise BTCNotCompressedError(f"{path} is a folder or a device, not a file of a compressed checkpoint")
        self.path = path
        self.handle = os.open(path, os.O_RDONLY)
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            os.close(self.handle)
            raise
        self.places = self.manifest.places()

    def _read_manifest(self) -> Manifest:
        size = os.fstat(self.handle).st_size
        if size < 8:
            raise BTCNotCompressedError(
                f"{self.path} has {size} bytes; it is not a compressed checkpoint, or it is truncated"
            )
        length = int.from_bytes(read_at(self.handle, 0, 8, str(self.path)).tobytes(), "little")
        if length > min(size - 8, MAX_HEADER):
            raise BTCNotCompressedError(
                f"{self.path} claims a header of {length:,} bytes; the file has {size:,} bytes and headers at most "
                f"{MAX_HEADER:,}; it is not a compressed checkpoint, or it is truncated or damaged"
            )
        header = read_at(self.handle, 8, length, str(self.path)).tobytes()
        self.start = 8 + length
        return parse_header(header, size - self.start, str(self.path))

    def read(self, tensor: Tensor, checksums: bool) -> np.ndarray:
        """The tensor in the dtype that it is stored in."""
        data = read_at(self.handle, self.start + self.places[tensor.name], tensor.nbytes, str(self.path))
        if checksums and crc32c(data) != tensor.crc32c:
            raise BTCIntegrityError(f"{self.path}: tensor {tensor.name!r} does not match its checksum; it is damaged")
        return data.view(tensor.numpy_dtype).reshape(tensor.shape)


class Checkpoint:
    """An open checkpoint: its leaves are listed, and read one by one. A context manager.

    Attributes:
        path: the file, or the index of several files.
        records: what is stored for each leaf, by path.
    """

    def __init__(self, path: Path, files: Sequence[_File], tree: Any):
        self.path, self._tree = path, tree
        self._files: Sequence[_File] = files
        self._home = {leaf.path: file for file in files for leaf in file.manifest.leaves}
        self.records: dict[str, LeafRecord] = {leaf.path: leaf for file in files for leaf in file.manifest.leaves}
        if len(self.records) != sum(len(file.manifest.leaves) for file in files):
            raise BTCFormatError(f"{path}: two leaves have the same path")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is read from."""
        return (self.path, *(file.path for file in self._files))

    def close(self) -> None:
        for file in self._files:
            os.close(file.handle)
        self._files = ()

    def check_tree(self) -> "Checkpoint":
        """Refuses a tree that does not take each leaf once, before any leaf is read."""
        self.build(list(self.records))
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
        """One leaf; only its bytes are read.

        Args:
            path: one of `records`.
            dense: decode a packed leaf.
            device: a device, or a sharding, to put it on; a packed leaf lies whole on all devices of a sharding.
            checksums: compare the bytes with their checksums.

        Raises:
            KeyError: there is no such leaf.
            BTCFormatError, BTCIntegrityError: the leaf is damaged, or its parts do not fit.
        """
        if path not in self.records:
            raise KeyError(f"{self.path} has no leaf {path!r}; it has {len(self.records)}, see .records")
        return placed(self.read_numpy(path, checksums), dense, device)

    def read_numpy(self, path: str, checksums: bool = True) -> Any:
        """One leaf, its arrays still in numpy; a packed leaf is a `BTCTensor` of numpy arrays."""
        record, file = self.records[path], self._home[path]
        try:
            return from_arrays(record, [file.read(tensor, checksums) for tensor in record.tensors])
        except BTCIntegrityError:
            raise
        except BTCFormatError as error:
            raise BTCFormatError(f"{self.path}: {error}") from error

    def read_tensor(self, tensor: Tensor, checksums: bool = True) -> np.ndarray:
        """One stored tensor of a leaf, as it is in the file."""
        home = next(file for file in self._files if tensor.name in file.places)
        return home.read(tensor, checksums)

    def build(self, leaves: list[Any]) -> PyTree:
        """The tree of all leaves, given in the order of `records`."""
        if self.is_part:
            raise BTCFormatError(f"{self.path} is one of several files; open their index, or select leaves")
        try:
            return rebuild(self._tree, leaves)
        except BTCFormatError as error:
            raise BTCFormatError(f"{self.path}: {error}") from error


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Opens a checkpoint, in one file or in several, without reading its leaves.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        BTCFormatError: it is no compressed checkpoint, or its header is damaged.

    Example:
        >>> import btc_jax, jax.numpy as jnp, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = btc_jax.save(f"{folder}/m.safetensors", {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.zeros(4)})
        ...     with open_checkpoint(f"{folder}/m.safetensors") as checkpoint:
        ...         print(list(checkpoint.records), checkpoint.read("b"))
        ['a/kernel', 'b'] [0. 0. 0. 0.]
    """
    # The hub's cache has links to files of other names, so an index that is there is taken as it is named.
    index = next((i for i in (index_of(Path(path)), index_of(real_path(path))) if i.is_file()), None)
    if index is not None:
        return _open_index(index)
    file = _File(real_path(path))
    try:
        checkpoint = Checkpoint(file.path, [file], file.manifest.tree)
        return checkpoint if checkpoint.is_part else checkpoint.check_tree()
    except BaseException:
        os.close(file.handle)
        raise


def load(
    path: PathLike,
    like: PyTree | None = None,
    *,
    select: str | Iterable[str] | None = None,
    dense: bool = False,
    device: Device | Callable[[str], Device | None] | None = None,
    checksums: bool = True,
) -> PyTree:
    """Reads what `save` wrote. No template is needed.

    Dicts, lists, tuples and NNX states come back as they were, named tuples as named tuples of the same fields, and
    other containers (dataclasses, NNX modules) as dicts; with `like` they come back in its structure.

    Args:
        path: the file, or the index of several.
        like: a tree of arrays, packed leaves or `jax.ShapeDtypeStruct` with the wanted structure.
        select: globs over paths; the result is then a flat dict of the leaves that match, by path.
        dense: decode packed leaves.
        device: a device or a sharding for all leaves, or a function of the path that returns one or `None`.
        checksums: compare all bytes with their checksums.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        BTCFormatError: it is no compressed checkpoint, or its parts do not fit.
        BTCIntegrityError: it is damaged; the message names the tensor.
        ValueError: it does not fit `like` (every leaf that is missing, extra, or different is listed), or `select`
            matches nothing.
    """
    if like is not None and select is not None:
        raise ValueError("both like and select are given; select returns a flat dict, so leave out one")
    with open_checkpoint(path) as checkpoint:
        paths = list(checkpoint.records) if select is None else _selected(checkpoint, select)
        treedef = None if like is None else _fitting(checkpoint, like)
        on = device if callable(device) else lambda _: device
        leaves = [checkpoint.read(p, dense=dense, device=on(p), checksums=checksums) for p in paths]  # pyright: ignore
        if select is not None:
            return dict(zip(paths, leaves, strict=True))
        if treedef is None:
            return checkpoint.build(leaves)
        by_path = dict(zip(paths, leaves, strict=True))
        return treedef.unflatten([by_path[p] for p in flatten(like)[0]])


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        leaves: number of leaves.
        nbytes: bytes of their tensors.
        damaged: what is wrong, a sentence for each damaged leaf.
    """

    leaves: int
    nbytes: int
    damaged: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify(path: PathLike) -> Verification:
    """Reads all of a checkpoint, one leaf at a time, and compares it with its checksums and with itself.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        BTCFormatError, BTCIntegrityError: the header itself is damaged.
    """
    damaged = []
    with open_checkpoint(path) as checkpoint:
        for leaf in checkpoint.records:
            try:
                checkpoint.read_numpy(leaf)
            except BTCFormatError as error:
                damaged.append(str(error))
        return Verification(len(checkpoint.records), checkpoint.nbytes, tuple(damaged))


def _open_index(path: Path) -> Checkpoint:
    if path.stat().st_size > MAX_HEADER:
        raise BTCFormatError(f"{path} has {path.stat().st_size:,} bytes; an index has at most {MAX_HEADER:,}")
    data = path.read_bytes()
    index = parse_json(data, str(path))
    fields = open_signed(index.get("metadata") if isinstance(index, dict) else None, str(path))
    shards, files, paths, headers = _listed(fields.get("shards"), path), [], set(), 0
    try:
        for name, crc, count in shards:
            files.append(_open_shard(path, name))
            manifest = files[-1].manifest
            if crc32c(manifest.text().encode()) != crc or len(manifest.leaves) != count:
                raise BTCIntegrityError(f"{path}: {name} is not the file that was saved with this index")
            headers += files[-1].start
            if headers > MAX_HEADERS or not paths.isdisjoint(leaf.path for leaf in manifest.leaves):
                raise BTCFormatError(
                    f"{path}: its files have more than {MAX_HEADERS:,} bytes of headers, or a leaf twice"
                )
            paths.update(leaf.path for leaf in manifest.leaves)
        named = [(name, file.manifest) for (name, _, _), file in zip(shards, files, strict=True)]
        with refusing(f"{path}: the manifest"):
            if index_text(fields.get("tree"), named).encode() != data:
                raise BTCIntegrityError(f"{path} does not say what its files hold; it is damaged or forged")
        return Checkpoint(path, files, fields.get("tree")).check_tree()
    except BaseException:
        for file in files:
            os.close(file.handle)
        raise


def _listed(shards: Any, path: Path) -> list[tuple[str, str, int]]:
    if not isinstance(shards, list) or not all(isinstance(entry, list) and len(entry) == 3 for entry in shards):
        raise BTCFormatError(f"{path}: its list of files is malformed")
    if len(shards) > MAX_SHARDS or len({str(name) for name, _, _ in shards}) < len(shards):
        raise BTCFormatError(f"{path} names a file twice, or more than {MAX_SHARDS} files")
    for name, crc, count in shards:
        plain = isinstance(name, str) and Path(name).name == name and name.endswith(SUFFIX)
        if not plain or "\0" in name or not isinstance(crc, str) or type(count) is not int:
            raise BTCFormatError(f"{path} names the file {str(name)[:60]!r}, which is not one in its own folder")
    return [(name, crc, count) for name, crc, count in shards]


def _open_shard(index: Path, name: str) -> _File:
    try:
        return _File(index.with_name(name))
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise BTCFormatError(f"{index} names the file {name[:60]!a}, which is missing beside it") from error


def placed(leaf: Any, dense: bool, device: Device | None) -> Any:
    if is_packed(leaf):
        target = NamedSharding(device.mesh, PartitionSpec()) if isinstance(device, NamedSharding) else device
        packed = jax.device_put(leaf, target)
        return jax.device_put(packed.dequantize(), device) if dense else packed
    if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return leaf  # 64-bit numbers stay in numpy where jax would cut them to 32
    return jax.device_put(leaf, device) if isinstance(leaf, np.ndarray | jax.Array) else leaf


def _selected(checkpoint: Checkpoint, select: str | Iterable[str]) -> list[str]:
    globs = [select] if isinstance(select, str) else list(select)
    paths = [path for path in checkpoint.records if any(fnmatchcase(path, glob) for glob in globs)]
    if not paths:
        some = ", ".join(list(checkpoint.records)[:3])
        raise ValueError(f"select={globs} matches none of the {len(checkpoint.records)} leaves ({some}, ...)")
    return paths


def _fitting(checkpoint: Checkpoint, like: PyTree) -> Any:
    """The structure of `like`, if the checkpoint has just its leaves."""
    paths, leaves, treedef = flatten(like)
    wanted = dict(zip(paths, leaves, strict=True))
    troubles = [f"missing {path}" for path in wanted if path not in checkpoint.records]
    troubles += [f"extra {path}" for path in checkpoint.records if path not in wanted]
    for path, record in checkpoint.records.items():
        leaf = wanted.get(path)
        found = (tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__)))
        if path in wanted and found != (record.shape, record.dtype):
            troubles.append(f"{path} is {record.dtype}{list(record.shape)}, wanted {found[1]}{list(found[0])}")
    if troubles:
        raise ValueError(f"{checkpoint.path} does not fit `like`: {'; '.join(troubles)}")
    return treedef
