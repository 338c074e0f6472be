"""A save that is killed, or that finds the disk full, leaves the old checkpoint or the new one, whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import btc_jax
from btc_jax import Uniform, load, open_checkpoint, quantize_leaf, save
from btc_jax.checkpoint.read import index_of

KILLS = 100


def tree(number: int):
    """Trees of which every leaf says which tree it is from."""
    values = jnp.asarray(np.arange(number, number + 6000, dtype=np.float32).reshape(60, 100))
    packed = quantize_leaf(values, Uniform(32, threshold=1.0, header_dtype="float32"))
    dense = {f"dense{i}": np.full((700, 10), number, np.float32) for i in range(6)}
    return {"packed": packed, **dense, "number": number}


def number_of(path: Path) -> int:
    """Which tree is there; every leaf is read, its checksum compared, and says the same."""
    with open_checkpoint(path) as checkpoint:
        leaves = {leaf: checkpoint.read_numpy(leaf) for leaf in checkpoint.records}
    number = leaves.pop("number")
    packed = leaves.pop("packed")
    assert np.asarray(packed.header["minimum"]).reshape(-1)[0] == number or number == 0
    assert len(leaves) == 6
    assert all((leaf == number).all() for leaf in leaves.values())
    return number


def saving_child(path: Path, modes: list[int | None]) -> int:
    """A fork that saves two trees in turn, as one file or as several, until it is killed; jax only lives in its parent.

    What it forks from has its arrays in numpy, so the child never calls jax.
    """
    from btc_jax.checkpoint.leaves import to_arrays
    from btc_jax.checkpoint.structure import describe
    from btc_jax.checkpoint.write import write_leaves
    from btc_jax.tree import flatten

    stored = []
    for number in (0, 1000):
        paths, leaves, _ = flatten(tree(number))
        stored.append((describe(tree(number)), [to_arrays(*pair) for pair in zip(paths, leaves, strict=True)]))
    child = os.fork()
    if child:
        return child
    try:
        for i in range(10**9):
            write_leaves(path, *stored[i % 2], modes[i % len(modes)])
    finally:
        os._exit(1)
