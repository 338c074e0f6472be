"""How much the squared error of each leaf counts, where bits are shared out.

The divergence of the answers is about half the squared errors times the Fisher information of the weights: see
`btc_jax.sensitivity`. Where that was not measured, the shapes tell much of it: `benchmarks/answers.py` has the figures.
"""

from collections.abc import Sequence

import numpy as np

from btc_jax.allocate.leaves import LeafSet

_OF_SIZE, _OF_SCALE = -0.75, -0.5
"""Powers of the weights of a matrix, and of their scale, by which an error counts where nothing was measured."""
_TRUST = 0.5
"""Power of a measured sensitivity, beside the rest of that by shape: errors of few bits are too large for a second
order to tell all, and random inputs are not real ones."""
_RANGE = 40.0
"""Octaves below the largest sensitivity that are told apart."""


def octaves_of_weights(leaves: LeafSet, sensitivities: Sequence[float] | None, by_shape: bool) -> np.ndarray:
    """Powers of two, one a leaf; the weights of rules come on top.

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
