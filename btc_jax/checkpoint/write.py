"""Saving: a tree into one file, or into several with an index, whole or not at all."""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from btc_jax._typing import PyTree
from btc_jax.checkpoint.files import crc32c, flush_folder, only_writer, temporary_of, whole_file
from btc_jax.checkpoint.leaves import to_arrays
from btc_jax.checkpoint.manifest import (
    FORMAT,
    MAX_HEADER,
    VERSION,
    LeafRecord,
    Manifest,
    canonical,
    parse_header,
    parse_json,
    signed,
)
from btc_jax.checkpoint.structure import describe, rebuild
from btc_jax.tree import flatten

StoredLeaf = tuple[LeafRecord, Sequence[np.ndarray]]
SUFFIX = ".safetensors"
MAX_HEADERS = 4 * MAX_HEADER
"""Bytes of the headers of all files of one checkpoint; a reader has them all in memory."""
MAX_SHARDS = 500
"""Files of one checkpoint; a reader has them all open."""


def save(path: str | os.PathLike[str], tree: PyTree, *, max_shard_bytes: int | None = None) -> int:
    """Writes a tree of packed and dense leaves, and returns the bytes written.

    Either all of it is at `path` afterwards, flushed to disk, or what was there before is untouched. Same content, same
    bytes. The format is in docs/format.md.

    Args:
        path: the file; one that exists is replaced.
        tree: any pytree of `BTCTensor`, jax and numpy arrays of every dtype, typed PRNG keys, Python numbers and text.
        max_shard_bytes: split the leaves into files of at most so many bytes of data (a leaf is never split), beside an
            index `PATH.index.json` as on the Hugging Face hub; `load(path)` finds it. `path` must end in
            `.safetensors`.

    Raises:
        TypeError: a leaf or a key of the tree cannot be stored; the message names it.
        ValueError: two leaves have one path, or there are too many leaves for one file, or too many files.
        OSError: it could not be written; a `BlockingIOError` if another process is writing it, a `FileExistsError` if
            the index of another system stands beside it.

    Example:
        >>> import btc_jax, jax.numpy as jnp, os, tempfile
        >>> packed = btc_jax.btc_quantize({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(os.path.join(folder, "model.safetensors"), packed)
        ...     restored = btc_jax.load(os.path.join(folder, "model.safetensors"))
        >>> restored["kernel"]
        BTCTensor(shape=(64, 64), ...)
    """
    paths, leaves, _ = flatten(tree)
    stored = [to_arrays(*pair) for pair in zip(paths, leaves, strict=True)]
    return write_leaves(real_path(path), describe(tree), stored, max_shard_bytes)


def write_leaves(path: Path, tree: Any, leaves: Sequence[StoredLeaf], max_shard_bytes: int | None) -> int:
    """Writes stored leaves in the containers that `tree` describes. Arrays may be lazy: one is looked at at a time."""
    check_target(path, max_shard_bytes)
    _refuse_unreadable(tree, leaves)
    with only_writer(path):
        if max_shard_bytes is not None:
            return _write_shards(path, tree, leaves, max_shard_bytes)
        with whole_file(path) as file:
            size = _write_file(file, Manifest(tree, tuple(record for record, _ in leaves)), leaves)
        index_of(path).unlink(missing_ok=True)  # from here on the file is the checkpoint
        flush_folder(path.parent)
        _remove_shards(path, keep=())
        return size


def index_of(path: Path) -> Path:
    """The index of a checkpoint in several files."""
    return path if path.name.endswith(".index.json") else path.parent / f"{path.name}.index.json"


def real_path(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, so that a link stays a link."""
    return Path(os.path.realpath(path))


def index_text(tree: Any, shards: Sequence[tuple[str, Manifest]]) -> str:
    """The index of several files: Hugging Face's `weight_map`, and our signed manifest of tree and files."""
    listed = [[name, crc32c(manifest.text().encode()), len(manifest.leaves)] for name, manifest in shards]
    manifest = canonical({"version": VERSION, "tree": tree, "shards": listed})
    tensors = [(t, name) for name, shard in shards for t in shard.tensors()]
    metadata = {"total_size": sum(t.nbytes for t, _ in tensors)} | signed(manifest)
    return canonical({"metadata": metadata, "weight_map": {t.name: name for t, name in tensors}})


def check_target(path: Path, max_shard_bytes: int | None) -> None:
    """Refuses, before any work, a place where a checkpoint cannot or must not be written.

    Raises:
        ValueError: the name does not fit, or `max_shard_bytes` is below 1.
        FileExistsError: the index of another system stands there.
    """
    if index_of(path) == path:
        raise ValueError(f"{path} is the name of an index; name the file without .index.json")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be 1 or more")
    if max_shard_bytes is not None and path.suffix != SUFFIX:
        raise ValueError(f"{path} must end in {SUFFIX} to be split into several files")
    _refuse_foreign_index(index_of(path))


def _refuse_unreadable(tree: Any, leaves: Sequence[StoredLeaf]) -> None:
    """Refuses, before anything is touched, what could be written but not read again."""
    paths = [record.path for record, _ in leaves]
    if len(set(paths)) < len(paths):
        raise ValueError("two leaves of the tree have the same path; rename one")
    rebuild(tree, paths)


def _refuse_foreign_index(index: Path) -> None:
    """An index goes with the checkpoint that it belongs to; one of another system is not ours to replace or remove."""
    if not index.exists():
        return
    found: Any = None
    with suppress(OSError, ValueError):
        found = parse_json(index.read_bytes(), str(index))
    metadata = found.get("metadata") if isinstance(found, dict) else None
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        message = "is no index of a compressed checkpoint; save under another name, or remove it"
        raise FileExistsError(errno.EEXIST, f"{index} {message}")


def _write_file(file: BinaryIO, manifest: Manifest, leaves: Iterable[StoredLeaf]) -> int:
    places = {t.name: (arrays, i) for record, arrays in leaves for i, t in enumerate(record.tensors)}
    header = manifest.header()
    # What could not be read again is not written.
    parse_header(header, sum(tensor.nbytes for tensor in manifest.tensors()), "the checkpoint")
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for tensor in manifest.tensors():
        arrays, i = places[tensor.name]
        file.write(arrays[i].reshape(-1).view(np.uint8).data)
    return file.tell()


def _write_shards(path: Path, tree: Any, leaves: Sequence[StoredLeaf], max_shard_bytes: int) -> int:
    """New files under names of their own, then the index, which makes them the checkpoint, then away with the old."""
    groups = list(_grouped(leaves, max_shard_bytes))
    manifests = [Manifest(None, tuple(record for record, _ in group)) for group in groups]
    identity = crc32c("".join(manifest.text() for manifest in manifests).encode())
    names = [f"{path.stem}-{identity}-{i:05d}-of-{len(groups):05d}{SUFFIX}" for i in range(1, len(groups) + 1)]
    text = index_text(tree, list(zip(names, manifests, strict=True))).encode()
    headers = sum(len(manifest.header()) for manifest in manifests)
    if len(groups) > MAX_SHARDS or len(text) > MAX_HEADER or headers > MAX_HEADERS:
        raise ValueError(
            f"{len(leaves)} leaves in {len(groups)} files need an index of {len(text):,} bytes; at most {MAX_SHARDS} "
            f"files and {MAX_HEADER:,} bytes can be read; raise max_shard_bytes, or save parts of the tree"
        )
    index, size = index_of(path), len(text)
    fresh = [path.with_name(name) for name in names if not path.with_name(name).exists()]
    try:
        with whole_file(index) as file:
            for name, manifest, group in zip(names, manifests, groups, strict=True):
                with whole_file(path.with_name(name)) as shard:
                    size += _write_file(shard, manifest, group)
            file.write(text)
    except BaseException:
        if not (index.is_file() and index.read_bytes() == text):  # else the new files are the checkpoint already
            for shard in fresh:
                shard.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)  # the index comes first, so it is the checkpoint already
    _remove_shards(path, keep=names)
    return size


def _grouped(leaves: Sequence[StoredLeaf], max_shard_bytes: int) -> Iterator[list[StoredLeaf]]:
    group: list[StoredLeaf] = []
    size = 0
    for leaf in leaves:
        if group and size + leaf[0].nbytes > max_shard_bytes:
            yield group
            group, size = [], 0
        group.append(leaf)
        size += leaf[0].nbytes
    yield group


def _remove_shards(path: Path, keep: Sequence[str]) -> None:
    """Removes the files of earlier and of interrupted saves to the same path."""
    temporary_of(path).unlink(missing_ok=True)
    temporary_of(index_of(path)).unlink(missing_ok=True)
    if path.suffix != SUFFIX:
        return
    shard = re.escape(path.stem) + r"-[0-9a-f]{8}-\d{5}-of-\d{5}" + re.escape(SUFFIX)
    ours = re.compile(rf"{shard}|\.{shard}\.tmp")
    for file in path.parent.iterdir():
        if ours.fullmatch(file.name) and file.name not in keep:
            file.unlink(missing_ok=True)
