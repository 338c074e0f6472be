"""Histograms of weights in units of their root mean square."""

import numpy as np

Histogram = tuple[int, ...]
"""Number of weights in each bin; the first and the last also hold what lies beyond."""

LIMIT = 4.0
"""Root mean squares that a histogram reaches on each side: of Gaussian weights, 1 in 16,000 lies beyond."""
_BINS = 81
"""An odd number, so that zero, where narrow blocks have a level, lies in the middle of a bin."""
_CHUNK = 2**20

EDGES = np.linspace(-LIMIT, LIMIT, _BINS + 1)


def histogram(weights: np.ndarray, rms: float) -> Histogram:
    """Counts weights of any shape and floating dtype; all of a leaf of zeros lie in the middle.

    Examples:
        >>> import numpy as np
        >>> counts = histogram(np.array([-9.0, 0.0, 0.01, 9.0]), 1.0)
        >>> counts[0], counts[40], counts[80], sum(counts)
        (1, 2, 1, 4)
    """
    flat, counts = weights.reshape(-1), np.zeros(_BINS, np.int64)
    scale = _BINS / (2 * LIMIT * rms) if rms else 0.0
    for i in range(0, flat.size, _CHUNK):
        places = np.floor(flat[i : i + _CHUNK].astype(np.float64) * scale + _BINS / 2)
        counts += np.bincount(np.clip(places, 0, _BINS - 1).astype(np.int64), minlength=_BINS)
    return tuple(counts.tolist())
