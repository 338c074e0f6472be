"""What the tests of metrics share."""

import math

import numpy as np

from btc_jax import Policy, Uniform, btc_dequantize, btc_metrics, btc_quantize

WIDE_ONLY = Uniform(32, threshold=0.0, header_dtype="float32")


def weights(shape, seed=0, scale=1.0, dtype=np.float32):
    """Weights in smooth and rough runs, so that about half of the blocks are wide at a scale of 1."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    spread = np.repeat(rng.choice([0.01, 0.2], size // 64 + 1), 64)[:size]
    flat = scale * rng.standard_normal(size) * spread
    output_major = flat.reshape(shape[-1], shape[-2], *shape[:-2])
    return np.moveaxis(np.moveaxis(output_major, 1, -1), 0, -1).astype(dtype)


def all_leaves(codec, *rules, **fields):
    return Policy(codec, rules, names=("*",), min_size=0, **fields)


def measured(tree, policy):
    """The tree's metrics, and the decoded weights as seen by a model."""
    packed = btc_quantize(tree, policy=policy)
    return btc_metrics(tree, packed, policy=policy), btc_dequantize(packed)


def exact_errors(originals, decoded):
    """The error measures, in float64."""
    w = np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in originals])
    e = w - np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in decoded])
    signal, noise = np.sum(w**2), np.sum(e**2)
    return {
        "rmse": np.sqrt(np.mean(e**2)),
        "relative_rmse": np.sqrt(noise / signal),
        "sqnr_db": 10 * np.log10(signal / noise),
        "largest_error": np.abs(e).max(),
    }


def assert_errors(measures, originals, decoded):
    for name, value in exact_errors(originals, decoded).items():
        np.testing.assert_allclose(getattr(measures, name), value, rtol=2e-6, err_msg=name)
