"""What the processes of one program find out together.

With `jax.distributed` every process runs the same calls and has some shards of an array. What depends on all of them,
such as one slope for a tree, is computed alike in each process from what all have found; weights stay where they are.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

K = TypeVar("K")
V = TypeVar("V")


def is_spread(array: Any) -> bool:
    """Whether an array lies in several processes, so that none may have all of it."""
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return False
    return not (array.is_fully_addressable or array.is_fully_replicated)


def together(find: Callable[[], dict[K, V]]) -> dict[K, V]:
    """What all processes find, by their common keys. Every process must call it, in the same order.

    Raises:
        Exception: if `find` raised in any process: the same in all, so that none waits for one that has failed.
    """
    if jax.process_count() == 1:
        return find()
    outcome: tuple[dict[K, V], Exception | None]
    try:
        outcome = find(), None
    except Exception as error:
        outcome = {}, error
    outcomes = [pickle.loads(data) for data in _of_all(pickle.dumps(outcome))]  # of our own processes
    for _, error in outcomes:
        if error is not None:
            raise error
    found: dict[K, V] = {}
    for mine, _ in outcomes:
        found = mine | found
    return found


def on_host(array: Any) -> np.ndarray:
    """All values of an array; of one that is spread, every process must ask for them."""
    if not is_spread(array):
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _of_all(data: bytes) -> list[bytes]:
    """The bytes of each process."""
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    mine = np.zeros(int(sizes.max()), np.uint8)
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]
