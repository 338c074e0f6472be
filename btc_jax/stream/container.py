"""How much a file adds to its leaves, as known before they are packed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btc_jax._typing import PyTree
from btc_jax.blocks import with_taps
from btc_jax.checkpoint.header import header_of
from btc_jax.checkpoint.index import SUFFIX, index_text
from btc_jax.checkpoint.manifest import Manifest, dense_tensor, error_of_list, packed_tensor
from btc_jax.checkpoint.record import LeafRecord
from btc_jax.checkpoint.structure import describe
from btc_jax.formats import Format
from btc_jax.leafspec import Origin
from btc_jax.policy import Decision
from btc_jax.sizes import nbytes_of_one_width

_CHECKSUM = "0" * 8
_LONGEST = 1.234e-100
"""The longest error that the record of a leaf can hold."""


def container_nbytes(
    tree: PyTree, leaves: Sequence[Any], decisions: Sequence[Decision], shards_of: Path | None = None
) -> int:
    """Bytes that a checkpoint of these leaves needs besides their tensors, at most.

    Args:
        shards_of: path of the checkpoint, if it is split into several files with an index.
    """
    node, records = describe(tree, [how.path for how in decisions]), longest_records(leaves, decisions)
    if shards_of is None:
        return 8 + len(header_of(Manifest(node, tuple(records))))
    # As if each leaf had a file of its own. Places of tensors have fewer digits there, in less than the spare bytes.
    name = f"{shards_of.stem}-{_CHECKSUM}-00000-of-00000{SUFFIX}"
    files = [Manifest(None, (record,)) for record in records]
    index = index_text(node, [(name, file, "") for file in files])
    return len(index) + sum(128 + len(header_of(file)) for file in files)


def longest_records(leaves: Sequence[Any], decisions: Sequence[Decision]) -> list[LeafRecord]:
    """Records that are at least as long as those that will be written, of tensors at least as large."""
    return [_record(*pair) for pair in zip(leaves, decisions, strict=True)]


def _record(leaf: Any, how: Decision) -> LeafRecord:
    path, shape, dtype = how.path, tuple(leaf.shape), leaf.dtype.name
    if how.codec is None:
        return LeafRecord(
            path, "dense", shape, dtype, (dense_tensor(path, shape, dtype),), origin_json(getattr(leaf, "origin", None))
        )
    cut = how.cut
    count, piece = (cut.total, cut.piece(shape)) if cut else (1, shape)
    form = max(how.codec.formats, key=lambda form: _most_nbytes(form, math.prod(piece)))
    order = (with_taps(piece, how.order) if how.allow_transform else None) or how.order
    tensor = packed_tensor(path, count * _most_nbytes(form, math.prod(piece)))
    details = {"codec": form.to_json(), "order": order, "error": error_of_list([_LONGEST] * 3)}
    if cut:
        details["cut"] = [list(cut.pieces), list(cut.stacks)]
    return LeafRecord(path, "packed", shape, dtype, (tensor,), details)


def origin_json(origin: Origin | None) -> dict[str, Any]:
    """What the record of a leaf adds that is stored as its bytes."""
    return {"origin": [origin.dtype, origin.shape]} if origin else {}


def _most_nbytes(form: Format, weights: int) -> int:
    """Bytes of a packed leaf with every block at its widest."""
    return nbytes_of_one_width(form, weights, form.widths[-1])
