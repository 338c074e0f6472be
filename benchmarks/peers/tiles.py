"""qwix: symmetric integers, or NF4, with a bfloat16 scale for every group of weights."""

import functools

import jax.numpy as jnp
import numpy as np
import qwix

from benchmarks.peers import Reconstruct, as_leaf, in_rows

# Name of the type, bits per code, group size.
FORMATS = (("int4", 4, 32), ("int4", 4, 64), ("nf4", 4, 64), ("int8", 8, 128))


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {
        f"qwix {kind}, {size}": ("qwix", functools.partial(_reconstruct, kind, bits, size))
        for kind, bits, size in FORMATS
    }


def _reconstruct(kind: str, bits: int, size: int, leaf: np.ndarray) -> tuple[np.ndarray, int]:
    rows = in_rows(leaf, size)
    # In float32, the default, scales would cost 16 more bits per group for no visible gain.
    packed = qwix.quantize(jnp.asarray(rows), kind, channelwise_axes=[0], scale_dtype=jnp.bfloat16)
    decoded = qwix.dequantize(packed.astype(jnp.float32))
    return as_leaf(np.asarray(decoded), leaf), bits * rows.size + 8 * packed.scale.nbytes
