"""Saving a tree atomically, into one file or into several with an index."""

import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from btc_jax._typing import PyTree
from btc_jax.checkpoint.errors import BTCFormatError, BTCNotCompressedError
from btc_jax.checkpoint.files import crc32c, flush_folder, only_writer, temporary_of, whole_file
from btc_jax.checkpoint.header import header_of, parse_header
from btc_jax.checkpoint.index import MAX_SHARDS, Limits, index_text, parse_index
from btc_jax.checkpoint.index import SUFFIX as SUFFIX
from btc_jax.checkpoint.index import index_of as index_of
from btc_jax.checkpoint.manifest import Manifest
from btc_jax.checkpoint.rebuild import rebuild
from btc_jax.checkpoint.record import LeafRecord
from btc_jax.checkpoint.structure import describe
from btc_jax.checkpoint.text import MAX_TEXT
from btc_jax.checkpoint.ties import StoredLeaf, records_of, stored_leaves, stored_one_by_one
from btc_jax.processes import together
from btc_jax.tree import flatten

_CHECKSUM = "0" * 8


def save(path: str | os.PathLike[str], tree: PyTree, *, max_shard_bytes: int | None = None) -> int:
    """Write a tree of packed and dense leaves, and return the number of bytes written.

    Either all of it is at `path` afterwards, flushed to disk, or what was there before is untouched. Equal content
    gives equal bytes. The format is in docs/format.md.

    Where several processes run the program, all of them call it, for a folder that all can reach. With
    `max_shard_bytes` each writes some of the files, and the first one the index; without, the first one writes.

    An object at several places of the tree is stored once, and is one object again when it is loaded.

    Args:
        path: the file; one that exists is replaced.
        tree: any pytree of `BTCTensor`, jax and numpy arrays of every dtype, typed PRNG keys, Python numbers and text.
        max_shard_bytes: split the leaves into files of at most this many bytes of data (a leaf is never split), with an
            index `PATH.index.json` as on the Hugging Face hub; `load(path)` finds it. `path` must end in
            `.safetensors`.

    Returns:
        The number of bytes written, in all files.

    Raises:
        TypeError: if a leaf or a key of the tree cannot be stored, or the arrays of a packed leaf were changed; the
            message names it. What `load` would refuse is refused here, before anything is written.
        ValueError: if two leaves have one path, a packed leaf is stacked or of a format that is not registered
            (`btc_jax.formats.register_format`), or there are too many leaves for one file, or too many files.
        OSError: if it could not be written; a `BlockingIOError` if another process is writing it, a `FileExistsError`
            if there is an index of another system next to it.

    Warns:
        BTCTreeWarning: if something will be restored as something else unless `load` is given a template, such as a
            variable of a custom class.

    Examples:
        >>> import btc_jax, jax.numpy as jnp, os, tempfile
        >>> packed = btc_jax.btc_quantize({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(os.path.join(folder, "model.safetensors"), packed)
        ...     restored = btc_jax.load(os.path.join(folder, "model.safetensors"))
        >>> restored["kernel"]
        BTCTensor(shape=(64, 64), ...)
    """
    paths, leaves, _ = flatten(tree)
    target, node = real_path(path), describe(tree, paths)
    if jax.process_count() > 1:
        return _save_together(target, node, paths, leaves, max_shard_bytes)
    check_target(target, max_shard_bytes)
    records = records_of(paths, leaves)
    check_readable(target, node, records, max_shard_bytes)
    return write_leaves(target, node, stored_leaves(records, leaves), max_shard_bytes)


def write_leaves(path: Path, tree: Any, leaves: Sequence[StoredLeaf], max_shard_bytes: int | None) -> int:
    """Writes stored leaves in the containers that `tree` describes. Arrays may be lazy: one leaf is read at a time.

    The caller has called `check_target` and `check_readable`.
    """
    with only_writer(path):
        if max_shard_bytes is None:
            return _write_one(path, tree, leaves)
        return _write_shards(path, tree, leaves, max_shard_bytes)


def _write_one(path: Path, tree: Any, leaves: Sequence[StoredLeaf]) -> int:
    with whole_file(path) as file:
        size = write_file(file, Manifest(tree, tuple(record for record, _ in leaves)), leaves)
    index_of(path).unlink(missing_ok=True)  # from here on the file is the checkpoint
    flush_folder(path.parent)
    _remove_shards(path, keep=())
    return size


def _save_together(
    path: Path, tree: Any, paths: Sequence[str], leaves: Sequence[Any], max_shard_bytes: int | None
) -> int:
    """Saves from several processes, each of which sees all leaves, one at a time, and keeps those that it writes."""
    mine, first = jax.process_index(), jax.process_index() == 0
    files = Files(max_shard_bytes)
    stored: list[StoredLeaf] = []
    for record, arrays in stored_one_by_one(paths, leaves):
        writes = files.number_of(record.nbytes) % jax.process_count() == mine
        stored.append((record, arrays if writes else ()))
    check_readable(path, tree, [record for record, _ in stored], max_shard_bytes)
    with ExitStack() as stack:

        def begin() -> dict[str, None]:
            if first:
                check_target(path, max_shard_bytes)
                stack.enter_context(only_writer(path))
            return {}

        together(begin)
        if max_shard_bytes is None:
            return together(lambda: {"bytes": _write_one(path, tree, stored)} if first else {})["bytes"]
        return _write_shards(path, tree, stored, max_shard_bytes)


def real_path(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, so that a link stays a link."""
    return Path(os.path.realpath(path))


def check_target(path: Path, max_shard_bytes: int | None) -> None:
    """Refuses, before any work, a place where a checkpoint cannot or must not be written.

    Raises:
        ValueError: if the name does not fit, or `max_shard_bytes` is below 1.
        FileExistsError: if the index of another system stands there.
    """
    if index_of(path) == path:
        raise ValueError(f"{path} is the name of an index; name the file without .index.json")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be 1 or more")
    if max_shard_bytes is not None and path.suffix != SUFFIX:
        raise ValueError(f"{path} must end in {SUFFIX} to be split into several files")
    _refuse_foreign_index(index_of(path))


def check_readable(path: Path, tree: Any, records: Sequence[LeafRecord], max_shard_bytes: int | None) -> None:
    """Refuses, before any work, what could be written but not read again. The checksums of records may be missing.

    Raises:
        ValueError: if paths occur twice, the tree is too large, or there are too many leaves or files.
    """
    paths = [record.path for record in records]
    if len(set(paths)) < len(paths):
        raise ValueError("two leaves of the tree have the same path; rename one")
    rebuild(tree, paths, paths)
    limits = Limits(path)
    if max_shard_bytes is None:
        _check_file(Manifest(tree, tuple(records)), limits)
        return
    manifests = _manifests(records, max_shard_bytes)
    if len(manifests) > MAX_SHARDS:
        raise ValueError(
            f"{len(records):,} leaves would be split into {len(manifests):,} files, more than {MAX_SHARDS:,}; raise "
            "max_shard_bytes"
        )
    texts = [_check_file(manifest, limits) for manifest in manifests]
    names = _names(path, _CHECKSUM, len(manifests))
    text = index_text(tree, list(zip(names, manifests, texts, strict=True)))
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"{len(records):,} leaves need an index of {len(text):,} bytes, more than {MAX_TEXT:,}; save parts of the "
            "tree apart"
        )
    parse_index(text.encode(), index_of(path))


def write_file(file: BinaryIO, manifest: Manifest, leaves: Iterable[StoredLeaf]) -> int:
    """Writes a file of these leaves, and returns its bytes."""
    arrays = {record.path: parts for record, parts in leaves}
    header = header_of(manifest)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for tensor in manifest.tensors():
        for array in arrays[tensor.name]:
            file.write(array.reshape(-1).view(np.uint8).data)
    return file.tell()


def _refuse_foreign_index(index: Path) -> None:
    """An index goes with the checkpoint that it belongs to; one of another system is not ours to replace or remove."""
    if not index.exists():
        return
    try:
        parse_index(index.read_bytes(), index)
    except BTCNotCompressedError as error:
        message = "is not the index of a compressed checkpoint; save under another name, or remove it"
        raise FileExistsError(errno.EEXIST, f"{index} {message}") from error
    except BTCFormatError:
        return  # ours and damaged, so it may be replaced


def _check_file(manifest: Manifest, limits: Limits) -> str:
    """The text of a manifest that can be read again."""
    text = manifest.text()
    header = header_of(manifest, text)
    parse_header(header, sum(tensor.nbytes for tensor in manifest.tensors()), "the checkpoint")
    limits.add(len(header), text, len(manifest.leaves))
    return text


def _write_shards(path: Path, tree: Any, leaves: Sequence[StoredLeaf], max_shard_bytes: int) -> int:
    """Writes new files under new names, then the index, which makes them the checkpoint, then removes the old files.

    With several processes, each writes some of the files, and the first one the index.
    """
    manifests = _manifests([record for record, _ in leaves], max_shard_bytes)
    texts = [manifest.text() for manifest in manifests]
    names = _names(path, crc32c(*(text.encode() for text in texts)), len(manifests))
    text = index_text(tree, list(zip(names, manifests, texts, strict=True))).encode()
    index, rest = index_of(path), iter(leaves)
    named = zip(names, manifests, strict=True)
    groups = [(name, manifest, [next(rest) for _ in manifest.leaves]) for name, manifest in named]
    mine = groups[jax.process_index() :: jax.process_count()]
    fresh = [path.with_name(name) for name, _, _ in mine if not path.with_name(name).exists()]

    def write_mine() -> dict[str, int]:
        sizes = {}
        for name, manifest, group in mine:
            with whole_file(path.with_name(name)) as shard:
                sizes[name] = write_file(shard, manifest, group)
        return sizes

    def write_index() -> dict[str, int]:
        if jax.process_index() == 0:
            with whole_file(index) as file:
                file.write(text)
            path.unlink(missing_ok=True)  # the index comes first, so it is the checkpoint already
            _remove_shards(path, keep=names)
        return {}

    try:
        sizes = together(write_mine)
        together(write_index)
    except BaseException:
        if not (index.is_file() and index.read_bytes() == text):  # else the new files are the checkpoint already
            for shard in fresh:
                shard.unlink(missing_ok=True)
        raise
    return len(text) + sum(sizes.values())


def _names(path: Path, identity: str, count: int) -> list[str]:
    return [f"{path.stem}-{identity}-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, count + 1)]


def _manifests(records: Sequence[LeafRecord], max_shard_bytes: int) -> list[Manifest]:
    """The manifests of the files that the leaves are split into."""
    return [Manifest(None, tuple(group)) for group in _grouped(records, max_shard_bytes)]


def _grouped(records: Sequence[LeafRecord], max_shard_bytes: int) -> Iterator[list[LeafRecord]]:
    files = Files(max_shard_bytes)
    groups = itertools.groupby(records, key=lambda record: files.number_of(record.nbytes))
    yield from ([*group] for _, group in groups) if records else [[]]


class Files:
    """Distributes leaves, one after another, over files of at most so many bytes; `None` for a single file."""

    def __init__(self, max_bytes: int | None):
        self._max, self._number, self._size, self._leaves = max_bytes, 0, 0, 0

    def number_of(self, nbytes: int) -> int:
        """The number of the file that the next leaf goes to. A leaf is never split."""
        if self._max is not None and self._leaves and self._size + nbytes > self._max:
            self._number, self._size, self._leaves = self._number + 1, 0, 0
        self._size, self._leaves = self._size + nbytes, self._leaves + 1
        return self._number


def _remove_shards(path: Path, keep: Sequence[str]) -> None:
    """Remove the files of earlier and of interrupted saves to the same path."""
    temporary_of(path).unlink(missing_ok=True)
    temporary_of(index_of(path)).unlink(missing_ok=True)
    if path.suffix != SUFFIX:
        return
    shard = re.escape(path.stem) + r"-[0-9a-f]{8}-\d{5}-of-\d{5}" + re.escape(SUFFIX)
    ours, kept = re.compile(rf"{shard}|\.{shard}\.tmp"), set(keep)
    for file in path.parent.iterdir():
        if ours.fullmatch(file.name) and file.name not in kept:
            file.unlink(missing_ok=True)
