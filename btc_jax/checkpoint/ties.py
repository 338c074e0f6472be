"""One object at several places of a tree: stored once, and one object again when it is loaded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from btc_jax.checkpoint.errors import BTCFormatError
from btc_jax.checkpoint.leaves import record_of, signed_leaf, to_arrays
from btc_jax.checkpoint.record import LeafRecord
from btc_jax.processes import is_spread, on_host
from btc_jax.tensor import is_packed

StoredLeaf = tuple[LeafRecord, Sequence[np.ndarray]]


def records_of(paths: Sequence[str], leaves: Sequence[Any]) -> list[LeafRecord]:
    """The records of leaves without their checksums, so that what cannot be saved is refused before any work.

    Raises:
        TypeError, ValueError: if a leaf cannot be stored; the message names it.
    """
    return [
        record_of(path, leaf) if first is None else _tied(path, leaf, first)
        for path, leaf, first in _with_ties(paths, leaves)
    ]


def stored_leaves(records: Sequence[LeafRecord], leaves: Sequence[Any]) -> list[StoredLeaf]:
    """These records with their checksums, and the arrays of their leaves."""
    return [signed_leaf(*pair) for pair in zip(records, leaves, strict=True)]


def stored_one_by_one(paths: Sequence[str], leaves: Sequence[Any]) -> Iterator[StoredLeaf]:
    """Records and arrays of leaves that may be spread over processes: each is gathered to every host, one at a time."""
    for path, leaf, first in _with_ties(paths, leaves):
        if first is not None:
            yield _tied(path, leaf, first), ()
            continue
        here = jax.tree.map(lambda array: on_host(array) if is_spread(array) else array, leaf)
        yield to_arrays(path, here)


def check_ties(records: Mapping[str, LeafRecord], what: Any) -> None:
    """Refuse ties to a leaf that is missing, comes later, or differs.

    Raises:
        BTCFormatError: if there is such a tie.
    """
    seen: dict[str, LeafRecord] = {}
    for path, record in records.items():
        if record.kind == "tied":
            first = seen.get(record.details["of"])
            if first is None or (first.shape, first.dtype) != (record.shape, record.dtype):
                raise BTCFormatError(f"{what}: leaf {path!r} is tied to {record.details['of'][:60]!r}, which is not it")
        elif record.kind != "python":
            seen[path] = record


def home(record: LeafRecord) -> str:
    """The path under which a leaf is stored."""
    return record.details["of"] if record.kind == "tied" else record.path


def shared(records: Mapping[str, LeafRecord]) -> set[str]:
    """The paths under which more than one leaf is stored."""
    return {home(record) for record in records.values() if record.kind == "tied"}


def _with_ties(paths: Iterable[str], leaves: Iterable[Any]) -> Iterator[tuple[str, Any, str | None]]:
    """Each leaf with its path, and the path of the first that is the same object, if that is another."""
    firsts: dict[int, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        first = firsts.setdefault(id(leaf), path) if _has_identity(leaf) else path
        yield path, leaf, None if first == path else first


def _tied(path: str, leaf: Any, first: str) -> LeafRecord:
    dtype = str(leaf.dtype) if isinstance(leaf, jax.Array) else np.dtype(leaf.dtype).newbyteorder("=").name
    return LeafRecord(path, "tied", tuple(leaf.shape), dtype, (), {"of": first})


def _has_identity(leaf: Any) -> bool:
    return is_packed(leaf) or isinstance(leaf, jax.Array | np.ndarray)
