"""What the tests of pieces share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax import (
    Policy,
    Rule,
    btc_quantize,
)

RNG = np.random.default_rng(0)


LAYERS, WIDTH = 6, 128


def stack(*shape, axis=0):
    """Layers with scales four octaves apart."""
    scales = np.geomspace(0.01, 0.16, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return (scales * RNG.standard_normal(shape)).astype(np.float32)


def packed_stack(leaf, axis: Any = 0, codec=None, **goal: Any):
    goal = goal or ({"bits": 4.5} if codec is None or codec.rate_controlled else {})
    return btc_quantize({"kernel": leaf}, policy=Policy(codec, (Rule("kernel", stack=axis),)), **goal)["kernel"]


def scanned(leaf, x):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, leaf)[0]
