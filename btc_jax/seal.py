"""Two bytes in every packed leaf that show whether its arrays still are what was packed.

A packed leaf is a pytree node, so `jax.tree.map` reaches into it: adding, flipping, casting or filling its arrays makes
another node of equal shapes and dtypes, which would decode to other weights. The seal goes through the same function as
the codes, and does not survive it: it falls, so flipping and sorting show; its bytes are 128 or more, so sums and means
overflow.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

SEAL = np.array([0xB7, 0x9C], np.uint8)


def broken_seal(seal: Any) -> np.ndarray | None:
    """The bytes of a seal that is not intact; `None` if it is, or cannot be read, as while it is traced."""
    if isinstance(seal, Tracer) or not isinstance(seal, jax.Array | np.ndarray):
        return None
    if isinstance(seal, jax.Array) and (
        seal.is_deleted() or not (seal.is_fully_addressable or seal.is_fully_replicated)
    ):
        return None
    found = np.asarray(seal)
    return None if (found == SEAL).all() else found


def changed_arrays(shape: tuple[int, ...], what: str) -> str:
    """What to say of a packed leaf of this shape whose arrays are not what was packed."""
    return (
        f"a packed leaf of shape {shape} was changed: {what}. Its arrays are codes, not weights, and functions of "
        "jax.tree reach into it; decode it first (btc_jax.btc_dequantize), or handle it as one with "
        "is_leaf=btc_jax.is_packed"
    )
