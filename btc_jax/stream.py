"""Checkpoint files of other systems into compressed ones, and back, leaf by leaf: one in memory at a time.

Only of a Flax msgpack file all is in memory: it has no index.

Each finished leaf is a small checkpoint of its own in a folder beside the target, so that a run that was killed goes on
where it was. At the end they are put together into the target, and the folder goes.
"""

import ctypes
import dataclasses
import errno
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import PyTree
from btc_jax.checkpoint.files import crc32c, only_writer, whole_file
from btc_jax.checkpoint.leaves import to_arrays
from btc_jax.checkpoint.manifest import CODES, LeafRecord, canonical
from btc_jax.checkpoint.read import Checkpoint, open_checkpoint, verify
from btc_jax.checkpoint.structure import describe
from btc_jax.checkpoint.write import StoredLeaf, check_target, index_of, real_path, write_leaves
from btc_jax.codecs import Codec
from btc_jax.metrics import Measures, error_of, jsonable, storage_of
from btc_jax.plan import Plan, btc_plan
from btc_jax.policy import Decision, Policy
from btc_jax.sources import Source, SourceLeaf, open_source
from btc_jax.tensor import quantize_leaf
from btc_jax.tree import decide, leaf_nbytes, one_policy, refuse_nothing_to_do

PathLike = str | os.PathLike[str]
OnLeaf = Callable[[str, int], None]
_NAMES = ("kernel", "embedding", "weight", "*.kernel", "*.embedding", "*.weight")


@dataclasses.dataclass(frozen=True)
class Compressed:
    """What `compress_file` did.

    Attributes:
        leaves, packed: number of leaves, and of those the packed ones.
        resumed: leaves that an earlier, interrupted run had finished.
        bytes_before, bytes_after: bytes of the leaves, and of the written files.
        seconds: time taken.
    """

    leaves: int
    packed: int
    resumed: int
    bytes_before: int
    bytes_after: int
    seconds: float


def file_policy(codec: Codec | None = None, *, torch_layout: bool = False) -> Policy:
    """The default policy for files: leaves named `kernel`, `embedding` or `weight`, also after a dot.

    Kernels in PyTorch's layout (out, in, kh, kw) run as they are stored, which is output-major there.
    """
    order = "stored" if torch_layout else None
    return dataclasses.replace(one_policy(codec, None), names=_NAMES, order=order)


def plan_file(source: PathLike, codec: Codec | None = None, *, policy: Policy | None = None) -> Plan:
    """What `compress_file` would do to each leaf, without reading values.

    Raises:
        ValueError, FileNotFoundError: the source cannot be read.
        BTCPolicyError: a rule fits no leaf.
    """
    with open_source(source) as opened:
        return btc_plan(_nested(opened.leaves), policy=_policy(opened, codec, policy))


def compress_file(
    source: PathLike,
    target: PathLike,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    max_shard_bytes: int | None = None,
    on_leaf: OnLeaf | None = None,
) -> Compressed:
    """Compresses a checkpoint file into another, one leaf at a time.

    Paths are kept; a `/` in them becomes a dict in the compressed tree. If it is interrupted, the same call goes on
    with the leaves that are missing.

    Args:
        source: a safetensors file, a folder with a `*.safetensors.index.json`, a `.npz`, a Flax `.msgpack`, or an
            Orbax checkpoint folder; see `btc_jax.sources`.
        target: the file to write.
        codec, policy: as for `btc_quantize`; by default `file_policy(codec)`. In PyTorch's layout a policy without an
            order means `"stored"`.
        max_shard_bytes: as for `save`.
        on_leaf: called after each leaf with its path and its bytes in the source.

    Raises:
        ValueError: the source cannot be read, or a leaf holds what cannot be packed.
        BTCPolicyError: a rule fits no leaf, or none is taken.
        OSError: the target could not be written.
    """
    start, target = time.perf_counter(), real_path(target)
    check_target(target, max_shard_bytes)
    with open_source(source) as opened:
        _refuse_source(target, opened.files)
        fingerprint = opened.fingerprint()
        tree = _nested(opened.leaves)
        leaves, decisions, _ = decide(tree, _policy(opened, codec, policy))
        refuse_nothing_to_do(leaves, decisions)
        sizes = [leaf_nbytes(leaf) for leaf in leaves]
        with _Parts(target, _identity(fingerprint, decisions)) as parts:
            resumed = 0
            for i, (decision, size) in enumerate(zip(decisions, sizes, strict=True)):
                resumed += _finish(parts.file(i), opened, decision)
                if on_leaf:
                    on_leaf(decision.path, size)
            if opened.fingerprint() != fingerprint:
                shutil.rmtree(parts.folder)
                raise ValueError(f"{source} was changed while it was read; run it again")
            written = write_leaves(target, describe(tree), parts.leaves(len(decisions)), max_shard_bytes)
    packed = sum(decision.codec is not None for decision in decisions)
    return Compressed(len(decisions), packed, resumed, sum(sizes), written, time.perf_counter() - start)


def restore_file(path: PathLike, target: PathLike, *, on_leaf: OnLeaf | None = None) -> int:
    """Decodes a checkpoint into a plain safetensors file with the original names and dtypes; returns its bytes.

    Raises:
        BTCFormatError: the checkpoint cannot be read, or is damaged.
        ValueError: a leaf is no array, or of a dtype that safetensors cannot hold.
        OSError: the target could not be written.
    """
    target = real_path(target)
    if index_of(target).exists():
        raise FileExistsError(errno.EEXIST, f"{index_of(target)} is an index of the same name; name another file")
    with open_checkpoint(path) as checkpoint:
        _refuse_source(target, checkpoint.files)
        entries = _plain_entries(checkpoint)
        header = canonical(entries).encode()
        header += b" " * (-len(header) % 8)
        with whole_file(target) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in entries:
                dtype = jnp.dtype(checkpoint.records[name].dtype)
                array = np.ascontiguousarray(checkpoint.read(name, dense=True), dtype)
                file.write(array.reshape(-1).view(np.uint8).data)
                if on_leaf:
                    on_leaf(name, array.nbytes)
            return file.tell()


class _Parts:
    """The folder of finished leaves beside the target: one small checkpoint each, of one source and one policy."""

    def __init__(self, target: Path, identity: str):
        self._target, self.folder = target, target.with_name(f".{target.name}.{identity}.parts")
        self._lock = only_writer(target.with_name(f"{target.name}.parts"))

    def __enter__(self) -> "_Parts":
        self._lock.__enter__()
        ours = re.compile(rf"\.{re.escape(self._target.name)}\.[0-9a-f]{{8}}\.parts")
        for other in self._target.parent.iterdir():
            if ours.fullmatch(other.name) and other != self.folder:
                shutil.rmtree(other)  # left by a run with another source or policy
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None or not any(self.folder.glob("*")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.__exit__(None, None, None)

    def file(self, i: int) -> Path:
        return self.folder / f"{i}.safetensors"

    def leaves(self, count: int) -> list[StoredLeaf]:
        """The finished leaves; their arrays stay in their files until they are asked for."""
        return [_stored(self.file(i)) for i in range(count)]


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


def _finish(file: Path, source: Source, decision: Decision) -> bool:
    """Makes sure that the file of a leaf is there, and says whether it already was."""
    try:
        finished = verify(file).ok
    except (OSError, ValueError):
        finished = False
    if not finished:
        record, arrays = _compress(source.read(decision.path), decision)
        write_leaves(file, 0, [(record, arrays)], None)
        _trim_heap()
    return finished


def _trim_heap() -> None:
    """Gives freed memory back to the system: glibc keeps pieces of it, and those of large leaves add up."""
    with suppress(OSError, AttributeError):  # only glibc has this
        ctypes.CDLL(None).malloc_trim(0)


def _compress(leaf: Any, decision: Decision) -> tuple[LeafRecord, list[np.ndarray]]:
    """The record of a leaf, with its error if it is packed, and its arrays."""
    if decision.codec is None:
        return to_arrays(decision.path, leaf)
    if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype:
        leaf = jnp.asarray(leaf)  # one copy for all that follows; float64 stays, to be remembered
    packed = quantize_leaf(leaf, decision.codec, decision.order, decision.path)
    record, arrays = to_arrays(decision.path, packed)
    measures = jsonable(Measures.of(storage_of(packed), error_of(leaf, packed.dequantize())))
    error = {name: measures[name] for name in ("rmse", "relative_rmse", "sqnr_db", "largest_error")}
    return dataclasses.replace(record, details=record.details | {"error": error}), arrays


def _refuse_source(target: Path, files: Sequence[Path]) -> None:
    if target in map(real_path, files):
        raise ValueError(f"{target} is the source, or a part of it; name another file")


def _policy(source: Source, codec: Codec | None, policy: Policy | None) -> Policy:
    if policy is None:
        return file_policy(codec, torch_layout=source.torch_layout)
    policy = one_policy(codec, policy)
    return dataclasses.replace(policy, order=policy.order or ("stored" if source.torch_layout else None))


def _nested(leaves: Sequence[SourceLeaf]) -> PyTree:
    """Nested dicts of shapes and dtypes, by the paths of leaves.

    Raises:
        ValueError: two paths conflict, or the source is a compressed checkpoint.
    """
    if any(leaf.path.endswith("#plane0") for leaf in leaves):
        raise ValueError(
            "the source is a compressed checkpoint already; restore it first to compress it in another way"
        )
    tree: dict[str, Any] = {}
    for leaf in leaves:
        *folders, name = leaf.path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or name in node:
            raise ValueError(f"{leaf.path} and another leaf of the source have conflicting paths")
        node[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return tree


def _plain_entries(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header of a plain safetensors file with all leaves, the widest numbers first."""
    entries, end = {}, 0
    for path, record in checkpoint.records.items():
        if record.dtype not in CODES:
            raise ValueError(f"{path} is {record.dtype}; a safetensors file cannot hold that")
    for path, record in sorted(checkpoint.records.items(), key=lambda item: -jnp.dtype(item[1].dtype).itemsize):
        nbytes = math.prod(record.shape) * jnp.dtype(record.dtype).itemsize
        place = [end, end + nbytes]
        entries[path] = {"dtype": CODES[record.dtype], "shape": record.shape, "data_offsets": place}
        end += nbytes
    return entries


def _identity(fingerprint: str, decisions: Sequence[Decision]) -> str:
    """Changes with the source and with what is to be done."""
    plan = [(d.path, d.codec and d.codec.to_json(), d.order) for d in decisions]
    return crc32c(f"{fingerprint} {canonical(plan)}".encode())
