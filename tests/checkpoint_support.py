"""What the tests of checkpoints share."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import (
    is_packed,
)


def same(a: Any, b: Any) -> None:
    """Check that two trees have the same leaves, bit for bit."""
    leaves = [jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)[0] for tree in (a, b)]
    assert [keys for keys, _ in leaves[0]] == [keys for keys, _ in leaves[1]]
    for (_, x), (_, y) in zip(*leaves, strict=True):
        same_leaf(x, y)


def same_leaf(x: Any, y: Any) -> None:
    if is_packed(x):
        assert (x.shape, x.dtype, x.format, x.order) == (y.shape, y.dtype, y.format, y.order)
        same([*x.planes, x.header], [*y.planes, y.header])
    elif isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        assert x.dtype == y.dtype
        assert np.array_equal(jax.random.key_data(x), jax.random.key_data(y))
    elif isinstance(x, jax.Array | np.ndarray | np.generic):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    else:
        assert type(x) is type(y)
        assert x == y or x != x


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "m.safetensors"


def params(sizes=(64, 96, 32)):
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal(shape).astype(np.float32) for shape in pairwise(sizes)]
    return {f"Dense_{i}": {"kernel": k, "bias": np.ones(k.shape[1], np.float32)} for i, k in enumerate(kernels)}
