"""How much the squared error of each leaf counts in the allocation. The divergence of the answers is about half the sum
of squared errors times the Fisher information of the weights: see `btc_jax.sensitivity`. If that was not measured,
shapes predict much of it: `benchmarks/answers.py` prints the figures.
"""

from collections.abc import Sequence

import numpy as np

from btc_jax.allocate.leaves import LeafSet

_OF_SIZE, _OF_SCALE = -0.75, -0.5
"""Exponents of a matrix's number of weights, and of their scale, in the weight of an error if nothing was measured."""
_TRUST = 0.5
"""Exponent of a measured sensitivity, the rest going to that by shape: at few bits errors are too large for a
second-order estimate, and random inputs are not real ones."""
_RANGE = 40.0
"""Octaves below the largest sensitivity that are distinguished."""


def octaves_of_weights(leaves: LeafSet, sensitivities: Sequence[float] | None, by_shape: bool) -> np.ndarray:
    """Weights as powers of two, one for each leaf; those of rules are added to them.

    Args:
        sensitivities: measured ones, or `None`.
        by_shape: where none were measured, estimate them; else all errors count the same.
    """
    if sensitivities is None and not by_shape:
        return np.zeros(len(leaves.items))
    sizes = np.array([item.matrix or item.size for item in leaves.items])
    shapes = _OF_SIZE * np.log2(np.maximum(sizes, 1)) + _OF_SCALE * _log2(leaves.scale)
    return shapes if sensitivities is None else _TRUST * _log2(np.array(sensitivities)) + (1 - _TRUST) * shapes


def _log2(values: np.ndarray) -> np.ndarray:
    largest = values.max(initial=0.0)
    return np.log2(np.maximum(values, largest * 2.0**-_RANGE)) if largest else np.zeros(len(values))
