"""What the tests of allocation share."""

import math

import numpy as np

from btc_jax import (
    is_packed,
)
from tests import oracle
from tests.multilevel_support import same_bytes


def tree_of(scales=(1.0, 0.05, 3.0), seed=0):
    """Gaussian, Laplacian and heavy-tailed leaves of different scales, and a dense one."""
    rng = np.random.default_rng(seed)
    draws = (rng.standard_normal, lambda size: rng.laplace(size=size), lambda size: rng.standard_t(4, size))
    leaves = {f"{i}/kernel": scale * draws[i % 3]((64, 64)) for i, scale in enumerate(scales)}
    return {path: leaf.astype(np.float32) for path, leaf in leaves.items()} | {"bias": np.ones(100, np.float32)}


TREE = tree_of()


def bits_of(leaf):
    return 8 * leaf.nbytes / leaf.size


def all_bits(packed):
    leaves = [leaf for leaf in packed.values() if is_packed(leaf)]
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


def sqnr_of(tree, packed, path):
    return oracle.sqnr_db(tree[path], packed[path].dequantize())


def totals(tree, packed):
    """SQNR and rmse over all packed weights."""
    paths = [path for path, leaf in packed.items() if is_packed(leaf)]
    pairs = [(np.asarray(tree[path], np.float64), np.asarray(packed[path].dequantize(), np.float64)) for path in paths]
    flat = [np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in (0, 1)]
    return oracle.sqnr_db(*flat), math.sqrt(np.mean((flat[0] - flat[1]) ** 2))


def same_trees(a, b):
    return all(same_bytes(x, b[path]) for path, x in a.items() if is_packed(x))
