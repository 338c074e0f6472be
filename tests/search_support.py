"""What the tests of the search share."""

from typing import Any

import jax
import numpy as np

from btc_jax import (
    Uniform,
    btc_dequantize,
    btc_quantize,
    btc_search,
    is_packed,
)
from btc_jax.evaluate import Evaluation

CODEC = Uniform(threshold=0.0)
"""One width only, so that a shape compiles once for each block size."""


def params(scale=0.1):
    return {"kernel": (scale * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)}


PARAMS = params()


def search(evaluate=None, **arguments):
    return btc_search(PARAMS, evaluate, **{"codec": CODEC, "max_rmse": None, "progress": False} | arguments)


def true_rmse(size):
    """The error at a block size, computed by numpy."""
    decoded = btc_dequantize(btc_quantize(PARAMS, Uniform(size, threshold=0.0)))["kernel"]
    return float(np.sqrt(np.mean((np.asarray(decoded, np.float64) - PARAMS["kernel"]) ** 2)))


def scripted(*answers):
    """An evaluate function that returns these accuracies in turn, and raises those that are errors."""
    answers = iter(answers)

    def evaluate(tree):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return evaluate


def sizes(result):
    return [trial.codec.block_size for trial in result.trials]


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def by_bits(evaluate=None, **arguments):
    return btc_search(PARAMS, evaluate, **{"bits": (2, 6), "progress": False} | arguments)


def effective_bits(tree):
    return 8 * tree["kernel"].nbytes / PARAMS["kernel"].size


def accurate_from(bits):
    """An evaluate function that loses 5 points below this many effective bits."""
    return lambda tree: 0.9 if not is_packed(tree["kernel"]) or effective_bits(tree) >= bits else 0.85


def divergence(tree):
    """A divergence that falls as errors do."""
    error = np.asarray(tree["kernel"], np.float64) - PARAMS["kernel"]
    return float(np.mean(error**2) / np.mean(PARAMS["kernel"].astype(np.float64) ** 2))


def answers(kl: Any = None, accuracy: Any = None, agreement: Any = None) -> Any:
    """An evaluate function with these figures, each a number or a function of the tree."""

    def figure(value: Any, tree: Any) -> Any:
        return value(tree) if callable(value) else value

    return lambda tree: Evaluation(1, figure(accuracy, tree), None, 1, None, figure(agreement, tree), figure(kl, tree))


def budgets(result):
    return [trial.bits for trial in result.trials]
