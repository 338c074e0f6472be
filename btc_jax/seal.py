"""Four bytes in every packed leaf that show whether its arrays still are what was packed.

A packed leaf is a pytree node, so `jax.tree.map` reaches into it: adding, casting, pruning, flipping or filling its
arrays makes another node of equal shapes and dtypes, which would decode to other weights. The seal goes through the
same function as the codes, and comes out different: two float16 numbers of both signs, a small and a large one, in
falling order of size, with fractions, which bfloat16 does not hold. Floating, so that functions of floating arrays only
meet it too. Not seen is what leaves both numbers as they are: picking or averaging the arrays of several packed leaves,
functions of integer arrays only, and a round trip through float16 or float32.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from btc_jax._typing import Array

SEAL = np.array([37.53, -0.0123], np.float16)


def is_intact(seal: Array) -> Array:
    """Whether a seal that may be traced is the seal: a boolean array without axes."""
    return jnp.all(seal == SEAL)


def broken_seal(seal: Any) -> list[Any]:
    """What is in a seal that is not intact; empty if it is, or cannot be told without waiting.

    A traced leaf has no values; it is checked where it is decoded, as are arrays that a device is still computing.
    """
    if isinstance(seal, Tracer) or not _is_known(seal):
        return []
    found = np.asarray(seal)
    return [] if (found == SEAL).all() else found.reshape(-1).tolist()


def changed_arrays(shape: tuple[int, ...], what: str) -> str:
    """What to say of a packed leaf of this shape whose arrays are not what was packed."""
    return (
        f"a packed leaf of shape {shape} was changed: {what}. Its arrays are codes, not weights, and functions of "
        "jax.tree reach into it; decode it first (btc_jax.btc_dequantize), or handle it as one with "
        "is_leaf=btc_jax.is_packed"
    )


def _is_known(array: Any) -> bool:
    """Whether the values are there, so that reading them waits for nothing."""
    if isinstance(array, np.ndarray):
        return True
    here = not array.is_deleted() and (array.is_fully_addressable or array.is_fully_replicated)
    return here and getattr(array, "is_ready", lambda: True)()
