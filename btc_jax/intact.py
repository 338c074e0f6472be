"""Whether the arrays of a packed leaf are still what was packed, judged by shapes, dtypes and the seal.

Shapes and dtypes are compared even while a function is traced; values only if they are available.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

from btc_jax.formats import Format
from btc_jax.planes import plane_specs, row_layout
from btc_jax.seal import SEAL, UNFIT, broken_seal

Described = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype of an array."""


def changes(leaf: Any) -> str:
    """What was changed in a packed leaf, or an empty string.

    JAX also builds nodes of other things than arrays, such as masks, shardings and shapes, or of a part of the arrays
    and `None`: those pass.
    """
    arrays = [leaf.seal, *jax.tree.leaves((leaf.planes, leaf.header), is_leaf=lambda array: array is None)]
    if not (isinstance(leaf.header, dict) and all(isinstance(array, jax.Array | np.ndarray) for array in arrays)):
        return ""
    if leaf.stacks is None and leaf.seal.shape != SEAL.shape and leaf.seal.ndim <= SEAL.ndim:
        return (
            "an axis of its arrays was mapped over, as by a scan over stacked layers. Say which axes are, when it is "
            "quantized: Rule(pattern, stack=0)"
        )
    return _array_changes(leaf, leaf.seal.shape[:-1]) or _seal_changes(leaf.seal)


def _array_changes(leaf: Any, stack: tuple[int, ...]) -> str:
    header, planes = _expected(leaf.format, -(-math.prod(leaf.piece) // leaf.format.block_size))
    found, wanted = leaf.header | {"seal": leaf.seal}, header | {"seal": (SEAL.shape, SEAL.dtype)}
    if odd := sorted(found.keys() ^ wanted.keys()):
        return f"it has the arrays {sorted(found)}, not {sorted(wanted)}; {odd[0]!r} is in only one of them"
    for name, (shape, dtype) in wanted.items():
        if (found[name].shape, found[name].dtype) != (stack + shape, dtype):
            return f"its {name!r} is {_described(found[name])}, not {dtype}{list(stack + shape)}"
    if len(leaf.planes) > len(planes):
        return f"it has {len(leaf.planes)} planes, not {len(planes)}"
    for i, (plane, (words, dtype)) in enumerate(zip(leaf.planes, planes, strict=False)):
        if (plane.shape[:-2], plane.shape[-1:], plane.dtype) != (stack, (words,), dtype):
            return f"its plane {i} is {_described(plane)}, not rows of {words} {dtype}"
    return ""


@functools.lru_cache(2**12)
def _expected(form: Format, blocks: int) -> tuple[dict[str, Described], list[tuple[int, np.dtype]]]:
    """Shape and dtype of each header array, and words and dtype of the rows of each plane."""
    header = {name: (array.shape, np.dtype(array.dtype)) for name, array in form.stored_header(blocks).items()}
    layouts = [row_layout(form.block_size, spec.bits) for spec in plane_specs(form.widths)]
    return header, [(layout.runs * layout.words, layout.dtype) for layout in layouts]


def _seal_changes(seal: Any) -> str:
    found = broken_seal(seal)
    if found and np.isnan(found).all():
        return UNFIT
    if found and not any(found):
        return (
            "its arrays became zeros, as the init of an optimizer makes them. Packed weights cannot be trained: train "
            "other leaves (btc_jax.partition.btc_partition, docs/training.md), or decode the tree"
        )
    return f"its seal became {found}, as if weights were calculated with" if found else ""


def _described(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
