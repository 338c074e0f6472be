"""Checkpoints of every kind, which version 1 wrote once: `python -m tests.golden.make` writes those that are missing.

All weights are multiples of 1/64, and all blocks hold few of them, so each sum and each rounding is exact on every
machine. A file here is never changed or removed: it must be read, and written again with the same bytes, forever.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from btc_jax import BTCTensor, Uniform, quantize_leaf, save

FOLDER = Path(__file__).parent


class Point(NamedTuple):
    x: Any
    y: Any


def weights(shape: tuple[int, ...], spread: int = 64) -> np.ndarray:
    """Multiples of 1/64 within `spread`/128 around 0, the same on every machine."""
    numbers = np.arange(int(np.prod(shape)), dtype=np.int64)
    mixed = (numbers * 2654435761 + 12345) % 2**32 >> 16
    return ((mixed % (spread + 1) - spread // 2) / 64).astype(np.float32).reshape(shape)


def packed(shape: tuple[int, ...], codec: Uniform, order: Any = "output-major", dtype: Any = jnp.float32) -> BTCTensor:
    """Weights of which one half of the blocks is smooth and the other is not."""
    wide, smooth = weights(shape), weights(shape, 2)
    columns = np.arange(shape[-1]) % 2 == 0 if shape else True
    return quantize_leaf(jnp.asarray(np.where(columns, wide, smooth)).astype(dtype), codec, order)


def dense() -> Any:
    """A leaf of each dtype that has no twin, and what is not an array."""
    names = (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"),
        *("int64", "int32", "int16", "int8", "int4", "uint64", "uint32", "uint16", "uint8", "uint4", "bool"),
        *("complex64", "complex128"),
    )
    arrays = {name: np.asarray([[0, 1, 2], [3, 0, 1]]).astype(jnp.dtype(name)) for name in names}
    others = {"scalar": np.float32(0.5), "empty": np.zeros((0, 3), np.float32), "key": jax.random.key(7)}
    keys = jax.random.wrap_key_data(jnp.arange(6, dtype=jnp.uint32).reshape(3, 2), impl="threefry2x32")
    python = {"true": True, "int": -(2**70), "float": 0.1, "text": 'ß\u2028"\\', "none": None}
    return arrays | others | {"keys": keys, "python": python}


def containers() -> Any:
    small = packed((4, 16), Uniform(8))
    state = nnx.State({"layer": nnx.State({"kernel": nnx.Param(small), "mean": nnx.BatchStat(np.ones(2, np.float32))})})
    return {
        "list": [np.int32(1), (np.int32(2),), [], ()],
        "point": Point(np.float32(1), {"y": small}),
        "state": state,
        "numbers": {3: np.int8(3), 1: np.int8(1)},
        "empty": {},
        "dots": {"a.b": {"c/d": np.uint8(1)}, "": np.uint8(2)},
    }


@functools.cache
def codecs() -> Any:
    return {
        "float16": packed((6, 40), Uniform(32, threshold=0.125)),
        "float32": packed((6, 40), Uniform(32, threshold=0.125, header_dtype="float32")),
        "odd": packed((9, 7), Uniform(13, threshold=0.125), "stored"),
        "bits": packed((8, 16), Uniform(16, 3, 7, threshold=0.125)),
        "one_bit": packed((8, 16), Uniform(16, 1, 8, threshold=0.125)),
        "all_wide": packed((8, 16), Uniform(16, threshold=0.0)),
        "none_wide": packed((8, 16), Uniform(16, threshold=float("inf"))),
        "all_smooth": packed((8, 16), Uniform(16, threshold=64.0)),
        "kernel": packed((3, 3, 4, 5), Uniform(64, threshold=0.125)),
        "half": packed((5, 16), Uniform(32, threshold=0.125), dtype=jnp.bfloat16),
        "short": packed((3,), Uniform(32, threshold=0.125)),
        "scalar": packed((), Uniform(32, threshold=0.125)),
        "size_0": packed((0, 4), Uniform(32, threshold=0.125)),
        "zeros": quantize_leaf(jnp.zeros((4, 16)), Uniform(16)),
    }


TREES: dict[str, tuple[Callable[[], Any], int | None]] = {
    "dense": (dense, None),
    "containers": (containers, None),
    "codecs": (codecs, None),
    "shards": (codecs, 700),
}


def write(folder: Path, name: str) -> list[Path]:
    """Writes one of them into an empty folder, and returns its files."""
    tree, max_shard_bytes = TREES[name]
    save(folder / f"{name}.safetensors", tree(), max_shard_bytes=max_shard_bytes)
    return sorted(folder.iterdir())


if __name__ == "__main__":
    for name in TREES:
        if not (FOLDER / name).exists():
            (FOLDER / name).mkdir()
            print(*write(FOLDER / name, name))
