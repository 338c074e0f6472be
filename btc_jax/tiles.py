"""The blocks of a leaf, tile by tile: where they are, and how programs run over them.

On CPU, numpy cuts a leaf into blocks, so that nothing is compiled for its shape. On an accelerator, large leaves stay
there; small ones are also cut by numpy, and only their tiles go there.
"""

import dataclasses
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._mesh import gathered
from btc_jax._typing import Array, Order
from btc_jax.backends.xla import is_large, tile_rows
from btc_jax.blocks import axes, flattened, spare_of, tap_sizes, transformed
from btc_jax.large import LargeLeaf, Panels

S = TypeVar("S")
T = TypeVar("T")

_AHEAD = 1 + (os.cpu_count() or 1)
"""Tiles in flight at once."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a leaf, or of several.

    Attributes:
        flat: the numbers that run through them: on the host or in a file in any floating dtype, on an accelerator in
            float32. The last block may be short.
        spare: how many places of each block are padding, with its last weight, `f32[blocks]`.
        block_size: weights per block.
        device: where programs run; `None` for JAX's default.
    """

    flat: Any
    spare: np.ndarray
    block_size: int
    device: Any = None

    @property
    def count(self) -> int:
        return len(self.spare)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.count * self.block_size - int(self.spare.sum())

    @property
    def platform(self) -> str:
        return self.device.platform if self.device else jax.default_backend()

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """Some of the blocks in float32 on the host, as a matrix."""
        places = chosen[:, None] * self.block_size + np.arange(self.block_size)
        return np.asarray(self.flat[np.minimum(places, self.flat.size - 1)], np.float32)


def blocks_in(leaf: Any, block_size: int, order: Order) -> Blocks:
    """The blocks of a leaf with values."""
    device = None
    if isinstance(leaf, LargeLeaf) and not tap_sizes(leaf.shape, order):
        flat = Panels(leaf, order)
        return Blocks(flat, spare_of(flat.size, block_size), block_size)
    if isinstance(leaf, jax.Array):
        leaf = gathered(leaf)
        (device,) = leaf.devices()
    if device and is_large(leaf.size, device.platform):
        flat = _flattened(leaf, order)
    else:  # programs are compiled for one device of the kind, so use that
        flat, device = flattened(np.asarray(leaf), order), device and jax.local_devices(backend=device.platform)[0]
    return Blocks(flat, spare_of(flat.size, block_size), block_size, device)


@functools.partial(jax.jit, static_argnames="order")
def _flattened(leaf: Array, order: Order) -> Array:
    placed = leaf.transpose(axes(leaf.ndim, order)).astype(jnp.float32)
    return transformed(placed, tap_sizes(leaf.shape, order)).reshape(-1)


def results(
    program: Callable[..., T], blocks: Blocks, *numbers: Any, finish: Callable[[T], T] = lambda tile: tile
) -> list[T]:
    """The results of a program for each tile, as arrays over its blocks on the host; at least one, for a leaf of size
    0.

    Args:
        program: called with the tile, `f32[rows, block_size]`, its spare places, `f32[rows]`, the numbers of its rows,
            and the count of rows that matter.
        numbers: trees of numbers for all blocks, or of arrays with one for each.
        finish: applied to each result while the next are computed.
    """
    rows = tile_rows(blocks.block_size, is_large(blocks.size, blocks.platform))

    def started(start: int) -> T:
        tile, numbers_of_rows = _tile(blocks, start, rows), functools.partial(_for_rows, start=start, rows=rows)
        with jax.default_device(blocks.device):
            count = np.int32(min(rows, blocks.count - start))
            return program(tile, *jax.tree.map(numbers_of_rows, (blocks.spare, *numbers)), count)

    def finished(start: int, made: T) -> T:
        return finish(jax.tree.map(lambda array: np.asarray(array)[: blocks.count - start], made))

    return overlapped(started, finished, range(0, max(blocks.count, 1), rows))


def overlapped(start: Callable[[int], S], finish: Callable[[int, S], T], numbers: Sequence[int]) -> list[T]:
    """`finish(n, start(n))` for each number, where the next few are started before one is finished.

    A started program runs in another thread, one per core, while numpy works on finished results. (Threads of our own
    were slower: numpy's small steps wait for each other.)
    """
    waiting, done = deque[tuple[int, S]](), []
    for number in numbers:
        waiting.append((number, start(number)))
        if len(waiting) > _AHEAD:
            done.append(finish(*waiting.popleft()))
    return done + [finish(*pair) for pair in waiting]


def _for_rows(numbers: Any, start: int, rows: int) -> np.ndarray:
    numbers = np.asarray(numbers, np.float32)
    return np.full(rows, numbers) if numbers.ndim == 0 else filled_up(numbers[start : start + rows], rows)


def _tile(blocks: Blocks, start: int, rows: int) -> Any:
    """Blocks in float32; a short last one, and missing rows, are padded with the last weight."""
    part = blocks.flat[start * blocks.block_size : (start + rows) * blocks.block_size]
    if isinstance(part, jax.Array):
        return jnp.pad(part, (0, rows * blocks.block_size - part.size), mode="edge").reshape(rows, -1)
    if part.size == rows * blocks.block_size:
        return part.reshape(rows, -1).astype(np.float32, copy=False)
    tile = np.empty(rows * blocks.block_size, np.float32)
    tile[: part.size] = part
    tile[part.size :] = tile[part.size - 1] if part.size else 0
    return tile.reshape(rows, -1)


def filled_up(array: np.ndarray, rows: int) -> np.ndarray:
    """Pads with zeros to this many rows."""
    if len(array) == rows:
        return array
    full = np.zeros((rows, *array.shape[1:]), array.dtype)
    full[: len(array)] = array
    return full
