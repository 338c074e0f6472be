"""What the tests of packed leaves as arrays share."""

from typing import Any

import numpy as np

from btc_jax import Multilevel, Uniform
from btc_jax.packing import quantize_leaf

CODECS = [Uniform(32, threshold=0.0), Multilevel(slope=0.004)]


def leaf(codec=CODECS[0], shape=(6, 16)) -> Any:  # type checkers know only JAX's arrays
    return quantize_leaf(np.random.default_rng(0).standard_normal(shape).astype(np.float32), codec)
