"""From checkpoint files of other systems to compressed ones, one leaf at a time."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Unpack

from btc_jax.allocate import Goal, sharing_of
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.leaves import to_arrays
from btc_jax.checkpoint.manifest import error_of_list
from btc_jax.checkpoint.record import ERRORS, LeafRecord
from btc_jax.checkpoint.structure import describe
from btc_jax.checkpoint.text import canonical
from btc_jax.checkpoint.ties import StoredLeaf
from btc_jax.checkpoint.write import check_readable, check_target, real_path, write_leaves
from btc_jax.codecs import Codec
from btc_jax.coding import Error, Recipe
from btc_jax.formats import check_registered
from btc_jax.large import LargeLeaf
from btc_jax.metrics import Measures, Storage, error_of, jsonable, storage_of
from btc_jax.packing import packed_leaf
from btc_jax.policy import Decision, Policy
from btc_jax.sizes import leaf_nbytes
from btc_jax.sources import open_source
from btc_jax.stream.container import longest_records, origin_json
from btc_jax.stream.parts import Parts
from btc_jax.stream.plan import LazyLeaf, PathLike, choices_of, lazy_leaves, nested
from btc_jax.tree import decide, one_policy, refuse_nothing_to_do

OnLeaf = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class QuantizedFile:
    """The result of `quantize_file`.

    Attributes:
        leaves, packed: number of leaves, and of packed leaves.
        resumed: leaves that an earlier, interrupted run had finished.
        bytes_before, bytes_after: bytes of the leaves, and of the written files.
        effective_bits: bits per weight of the packed leaves, everything stored for them counted.
        rmse: root mean squared error over the packed weights, in their units.
        sqnr_db: signal to quantization noise over the packed leaves, in dB; infinite without error. Leaves without
            error are included.
        seconds: elapsed time.
    """

    leaves: int
    packed: int
    resumed: int
    bytes_before: int
    bytes_after: int
    effective_bits: float
    rmse: float
    sqnr_db: float
    seconds: float


def quantize_file(
    source: PathLike,
    target: PathLike,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    max_shard_bytes: int | None = None,
    on_leaf: OnLeaf | None = None,
    **goal: Unpack[Goal],
) -> QuantizedFile:
    """Quantize a checkpoint file into a compressed one, one leaf at a time.

    Paths are kept; a `/` in them becomes a dict in the compressed tree. If it is interrupted, the same call resumes
    with the remaining leaves. If bits are allocated for a target, each leaf is read a few times.

    Args:
        source: a safetensors file, a folder with a `*.safetensors.index.json`, a `.npz`, a Flax `.msgpack`, or an
            Orbax checkpoint folder; see `btc_jax.sources`.
        target: the file to write.
        codec, policy, bits, rmse, sqnr_db, sensitivity, taps: as for `btc_quantize`.
        size: bytes of everything that is written, at most, including dense leaves and the headers of the files.
        max_shard_bytes: as for `save`.
        on_leaf: called after each leaf with its path and its bytes in the source.

    Returns:
        The number of leaves, bytes, bits and errors.

    Raises:
        ValueError: if the source cannot be read, a leaf holds what cannot be packed, or the target cannot be reached;
            before any work, if there are too many leaves for one file, or too many files.
        BTCPolicyError: if a rule fits no leaf, or none is packed.
        OSError: if the target could not be written.

    Examples:
        >>> import btc_jax, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/net.npz", kernel=np.ones((64, 64), np.float32))
        ...     done = quantize_file(f"{folder}/net.npz", f"{folder}/small.safetensors")
        >>> done.packed, done.bytes_before, round(done.effective_bits, 2)
        (1, 16384, 4.52)
    """
    start, target, sharing = perf_counter(), real_path(target), sharing_of(**goal)
    check_target(target, max_shard_bytes)
    with open_source(source) as opened:
        refuse_source(target, opened.files)
        fingerprint = opened.fingerprint()
        tree, policy = nested(opened), one_policy(codec, policy, sharing)
        leaves, decisions, _ = decide(tree, policy)
        refuse_nothing_to_do(leaves, decisions)
        lazy = lazy_leaves(opened, leaves, decisions)
        node = describe(tree, [how.path for how in decisions])
        _refuse_unreadable(target, node, lazy, decisions, max_shard_bytes)
        with Parts(target) as parts:
            choices = choices_of(lazy, decisions, sharing, tree, target if max_shard_bytes else None)
            parts.open(_identity(fingerprint, decisions, choices))
            resumed = sum(_finish(parts, i, *pair, on_leaf) for i, pair in enumerate(zip(lazy, choices, strict=True)))
            if opened.fingerprint() != fingerprint:
                parts.discard()
                raise ValueError(f"{source} was changed while it was read; run it again")
            stored = parts.leaves(len(leaves))
            total, packed = _total([record for record, _ in stored])
            stored = [(_in_short(record), arrays) for record, arrays in stored]
            written = write_leaves(target, node, stored, max_shard_bytes)
    return QuantizedFile(
        leaves=len(leaves),
        packed=packed,
        resumed=resumed,
        bytes_before=sum(map(leaf_nbytes, leaves)),
        bytes_after=written,
        effective_bits=total.effective_bits,
        rmse=total.rmse,
        sqnr_db=total.sqnr_db,
        seconds=perf_counter() - start,
    )


def refuse_source(target: Path, files: Sequence[Path]) -> None:
    if target in map(real_path, files):
        raise ValueError(f"{target} is the source, or a part of it; name another file")


def _refuse_unreadable(
    target: Path, node: Any, leaves: Sequence[LazyLeaf], decisions: Sequence[Decision], max_shard_bytes: int | None
) -> None:
    """Refuse, before any leaf is read, what could not be read again, assuming the largest size of each leaf."""
    for form in {form for how in decisions if how.codec is not None for form in how.codec.formats}:
        check_registered(form)
    check_readable(target, node, longest_records(leaves, decisions), max_shard_bytes)


def _finish(parts: Parts, i: int, leaf: LazyLeaf, choice: Recipe | None, on_leaf: OnLeaf | None) -> bool:
    """Ensures that a leaf is among the parts, and returns whether it already was."""
    finished = parts.has(i)
    if not finished:
        parts.put(i, _compress(leaf, choice))
    if on_leaf:
        on_leaf(leaf.path, leaf.nbytes)
    return finished


def _compress(lazy: LazyLeaf, choice: Recipe | None) -> StoredLeaf:
    """The record of a leaf, with its error if it is packed, and its arrays."""
    path, leaf = lazy.path, lazy if isinstance(lazy, LargeLeaf) else lazy[()]
    if choice is None:
        record, arrays = to_arrays(path, leaf)
        return dataclasses.replace(record, details=record.details | origin_json(lazy.origin)), arrays
    packed, error = packed_leaf(leaf, choice, path)
    record, arrays = to_arrays(path, packed)
    measures = jsonable(Measures.of(storage_of(packed), error or error_of(leaf, packed.dequantize())))
    error = error_of_list([measures[name] for name in ERRORS])
    return dataclasses.replace(record, details=record.details | {"error": error}), arrays


def _in_short(record: LeafRecord) -> LeafRecord:
    """The record with errors of four digits, for a file of many leaves."""
    if "error" not in record.details:
        return record
    exact = record.details["error"]
    error = error_of_list([_short(exact[name]) for name in ERRORS])
    return dataclasses.replace(record, details=record.details | {"error": error})


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _total(records: Iterable[LeafRecord]) -> tuple[Measures, int]:
    """Bits and errors of all packed leaves, from their records, and the number of them."""
    storage, error, packed = Storage(), Error(), 0
    for record in records:
        if record.kind == "packed":
            weights, own = math.prod(record.shape), record.details["error"]
            noise = own["rmse"] ** 2 * weights
            signal = noise / own["relative_rmse"] ** 2 if own["relative_rmse"] else 0.0
            storage += Storage(weights=weights, nbytes=record.nbytes)
            error, packed = error + Error(signal, noise, own["largest_error"]), packed + 1
    return Measures.of(storage, error), packed


def _identity(fingerprint: str, decisions: Sequence[Decision], choices: Sequence[Recipe | None]) -> str:
    """Changes with the source and with what is done to its leaves."""
    done = [
        choice and (choice.codec.to_json(), choice.form.to_json(), choice.order, choice.slope) for choice in choices
    ]
    return crc32c(f"{fingerprint} {canonical([[how.path for how in decisions], done])}".encode())
