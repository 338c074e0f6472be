"""How much a file adds to its leaves, known before they are packed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax._typing import PyTree
from btc_jax.blocks import with_taps
from btc_jax.checkpoint.manifest import CODES, LeafRecord, Manifest, Tensor
from btc_jax.checkpoint.structure import describe
from btc_jax.checkpoint.write import SUFFIX, index_text
from btc_jax.codecs import Codec
from btc_jax.planes import plane_specs, row_layout
from btc_jax.policy import Decision
from btc_jax.sources import Origin

_CHECKSUM = "0" * 8
_LONGEST = -1.2345678901234567e-100
"""No float64 is longer in JSON."""


def container_nbytes(
    tree: PyTree, leaves: Sequence[Any], decisions: Sequence[Decision], shards_of: Path | None = None
) -> int:
    """Bytes that a checkpoint of these leaves takes beside their tensors, at most.

    Args:
        shards_of: the checkpoint that is split into several files with an index, where it is.
    """
    records = [_record(*pair) for pair in zip(leaves, decisions, strict=True)]
    if shards_of is None:
        return 8 + len(Manifest(describe(tree), tuple(records)).header())
    # As if each leaf had a file of its own. Places of tensors have fewer digits there, in less than the spare bytes.
    name = f"{shards_of.stem}-{_CHECKSUM}-00000-of-00000{SUFFIX}"
    files = [(name, Manifest(None, (record,))) for record in records]
    return len(index_text(describe(tree), files)) + sum(128 + len(file.header()) for _, file in files)


def _record(leaf: Any, how: Decision) -> LeafRecord:
    """A record that is at least as long as the one that will be written."""
    if how.codec is None:
        return _long(how, "dense", leaf, (_dense(how.path, leaf),), origin_json(getattr(leaf, "origin", None)))
    codec = max(how.codec.candidates, key=lambda codec: len(plane_specs(codec.widths)))
    order = (with_taps(leaf.shape, how.order) if how.free else None) or how.order
    error = dict.fromkeys(("rmse", "relative_rmse", "sqnr_db", "largest_error"), _LONGEST)
    details = {"codec": codec.stored.to_json(), "order": order, "error": error}
    return _long(how, "packed", leaf, tuple(_tensors(how.path, codec, math.prod(leaf.shape))), details)


def _long(how: Decision, kind: str, leaf: Any, tensors: tuple[Tensor, ...], details: dict[str, Any]) -> LeafRecord:
    return LeafRecord(how.path, kind, tuple(leaf.shape), leaf.dtype.name, tensors, details)


def origin_json(origin: Origin | None) -> dict[str, Any]:
    """What the record of a leaf adds that is stored as its bytes."""
    return {"origin": [origin.dtype, origin.shape]} if origin else {}


def _dense(path: str, leaf: Any) -> Tensor:
    if leaf.dtype.name in CODES:
        return Tensor(path, CODES[leaf.dtype.name], leaf.shape, _CHECKSUM)
    return Tensor(path, "U8", (*leaf.shape, leaf.dtype.itemsize), _CHECKSUM)


def _tensors(path: str, codec: Codec, weights: int) -> list[Tensor]:
    """The tensors of a leaf of which every block has all its bits."""
    blocks = -(-weights // codec.block_size)
    layouts = [row_layout(codec.block_size, spec.bits) for spec in plane_specs(codec.widths)]
    arrays = {f"plane{i}": (layout.dtype, (blocks, layout.runs * layout.words)) for i, layout in enumerate(layouts)}
    arrays |= {name: (array.dtype, array.shape) for name, array in codec.stored_header(blocks).items()}
    return [Tensor(f"{path}#{name}", CODES[np.dtype(d).name], shape, _CHECKSUM) for name, (d, shape) in arrays.items()]
