"""Whether the arrays of a packed leaf are what was packed, as far as shapes, dtypes and the seal tell."""

import math
from typing import Any

import jax
import numpy as np

from btc_jax.planes import plane_specs, row_layout
from btc_jax.seal import SEAL, broken_seal


def changes(leaf: Any) -> str:
    """What was changed in a packed leaf, or an empty string.

    JAX also builds nodes of other things than arrays, such as masks, shardings and shapes, or of a part of
    the arrays and `None`: those pass.
    """
    arrays = [leaf.seal, *jax.tree.leaves((leaf.planes, leaf.header), is_leaf=lambda array: array is None)]
    if not (isinstance(leaf.header, dict) and all(isinstance(array, jax.Array | np.ndarray) for array in arrays)):
        return ""
    stack = leaf.seal.shape[:-1]
    return _header_changes(leaf, stack) or _plane_changes(leaf, stack) or _seal_changes(leaf.seal)


def _header_changes(leaf: Any, stack: tuple[int, ...]) -> str:
    blocks = -(-math.prod(leaf.shape) // leaf.codec.block_size)
    wanted = {name: (stack + a.shape, np.dtype(a.dtype)) for name, a in leaf.codec.stored_header(blocks).items()}
    found = {name: (array.shape, np.dtype(array.dtype)) for name, array in leaf.header.items()}
    odd = next((name for name in wanted if found.get(name) != wanted[name]), None) or next(
        iter(found.keys() - wanted), None
    )
    return f"its {odd!r} is {_described(found.get(odd))}, not {_described(wanted.get(odd))}" if odd else ""


def _plane_changes(leaf: Any, stack: tuple[int, ...]) -> str:
    specs = plane_specs(leaf.codec.widths)
    if len(leaf.planes) > len(specs):
        return f"it has {len(leaf.planes)} planes, not {len(specs)}"
    for i, (plane, spec) in enumerate(zip(leaf.planes, specs, strict=False)):
        layout = row_layout(leaf.codec.block_size, spec.bits)
        fits = (
            plane.shape[:-2] == stack and plane.ndim == len(stack) + 2 and plane.shape[-1] == layout.runs * layout.words
        )
        if not fits or plane.dtype != layout.dtype:
            return (
                f"its plane {i} is {_described((plane.shape, plane.dtype))}, not (rows, {layout.words}) {layout.dtype}"
            )
    return ""


def _seal_changes(seal: Any) -> str:
    if seal.shape[-1:] != SEAL.shape or seal.dtype != SEAL.dtype:
        return f"its seal is {_described((seal.shape, seal.dtype))}, not {_described((SEAL.shape, SEAL.dtype))}"
    found = broken_seal(seal)
    if found is None:
        return ""
    if not found.any():
        return (
            "its arrays became zeros, as the init of an optimizer makes them. Packed weights cannot be trained: train "
            "other leaves (docs/training.md), or decode the tree"
        )
    return f"its seal became {found.tolist()} from {SEAL.tolist()}"


def _described(array: tuple[tuple[int, ...], Any] | None) -> str:
    return "missing" if array is None else f"{array[1]}{list(array[0])}"
