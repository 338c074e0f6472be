"""What the tests of the multilevel codec share."""

import math

import numpy as np

from btc_jax import Multilevel
from btc_jax.packing import quantize_leaf

LEAF = (50, 61)
"""95 full blocks of 32 and one of 10. Compiling dominates, so most tests share this shape and layout."""


def weights(seed, shape=LEAF, octaves=(-8, 3)):
    """Gaussian weights, every 32 with another scale from a wide range."""
    rng, size = np.random.default_rng(seed), math.prod(shape)
    scales = np.repeat(2.0 ** rng.uniform(octaves[0], octaves[1], -(-size // 32)), 32)[:size]
    return (rng.standard_normal(size) * scales).reshape(shape).astype(np.float32)


def packed(leaf, slope=2.0**-8, **fields):
    return quantize_leaf(leaf, Multilevel(**fields), "stored", slope=slope)


def same_bytes(a, b):
    """Whether two packed leaves have the same headers and planes; not the leaf's own numbers, which are its scale."""
    planes = [[np.asarray(plane).tobytes() for plane in tensor.planes] for tensor in (a, b)]
    headers = [np.asarray(tensor.header["header"]).tobytes() for tensor in (a, b)]
    return planes[0] == planes[1] and headers[0] == headers[1]
