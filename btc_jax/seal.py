"""Four bytes in every packed leaf that show whether its arrays are still what was packed.

A packed leaf is a pytree node, so `jax.tree.map` reaches into it: adding, casting, pruning, flipping or filling its
arrays makes another node of equal shapes and dtypes, which would decode to other weights. The seal goes through the
same function as the codes, and comes out different: two float16 numbers of both signs, a small and a large one, in
falling order of size, with fractions, which bfloat16 does not hold. They are floating, so that functions that only
change floating arrays change them too. What leaves both numbers unchanged is not detected: picking or averaging the
arrays of several packed leaves, functions of integer arrays only, and a round trip through float16 or float32.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from btc_jax._typing import Array

SEAL = np.array([37.53, -0.0123], np.float16)
UNFIT = "weights that are NaN, infinite or too large for its header were packed under jax.jit"
"""What is wrong with a leaf whose seal is NaN; outside of `jit` it would have been an error."""


def is_intact(seal: Array) -> Array:
    """Whether a seal, possibly traced, is intact: a boolean array without axes."""
    return jnp.all(seal == SEAL)


def broken_seal(seal: Any) -> list[Any]:
    """The content of a broken seal; empty if it is intact, or if that cannot be told without waiting.

    A traced leaf has no values; it is checked where it is decoded, as are arrays that a device is still computing.
    """
    if isinstance(seal, Tracer) or not _is_known(seal):
        return []
    found = np.asarray(seal)
    return [] if (found == SEAL).all() else found.reshape(-1).tolist()


def changed_arrays(shape: tuple[int, ...], what: str) -> str:
    """The message about a packed leaf of this shape whose arrays were changed."""
    if what == UNFIT:
        return f"a packed leaf of shape {shape} decodes to NaN: {what}; fix them, or leave the leaf dense with a rule"
    return (
        f"a packed leaf of shape {shape} was changed: {what}. Its arrays are codes, not weights, and functions of "
        "jax.tree reach into it; decode it first (btc_jax.btc_dequantize), or handle it as one with "
        "is_leaf=btc_jax.is_packed"
    )


def _is_known(array: Any) -> bool:
    """Whether the values are available, so that reading them does not wait."""
    if isinstance(array, np.ndarray):
        return True
    here = not array.is_deleted() and (array.is_fully_addressable or array.is_fully_replicated)
    return here and getattr(array, "is_ready", lambda: True)()
