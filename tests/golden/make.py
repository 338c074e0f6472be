"""Checkpoints of every kind, as written by version 1: `python -m tests.golden.make` writes those that are missing.

All weights are multiples of 1/64, and blocks are small, so every sum and rounding is exact on every machine. Files here
are never changed or removed: they must always be readable, and written again with the same bytes.
"""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from btc_jax import BTCTensor, Multilevel, Uniform, save
from btc_jax.checkpoint import BTCTreeWarning
from btc_jax.packing import quantize_leaf
from btc_jax.planes import pack_planes, plane_specs

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
    """Weights with half of the blocks smooth, and the other half not."""
    wide, smooth = weights(shape), weights(shape, 2)
    columns = np.arange(shape[-1]) % 2 == 0 if shape else True
    return quantize_leaf(jnp.asarray(np.where(columns, wide, smooth)).astype(dtype), codec, order)


def dense() -> Any:
    """A leaf of each remaining dtype, and leaves that are not arrays."""
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
    named = nnx.Param(
        np.ones((2, 2), np.float32), out_sharding=("a", None), eager_sharding=False, tag="t", more=[1, {}]
    )
    return {
        "boxes": {
            "dense": nn.Partitioned(np.ones((2, 2), np.float32), ("a", None)),
            "packed": nn.LogicallyPartitioned(packed((4, 16), Uniform(8)), (("a", "b"), "c")),  # pyright: ignore
        },
        "frozen": FrozenDict({"a": {"b": np.int8(1)}, "c": nnx.Cache(np.int8(2))}),
        "named": nnx.State({"kernel": named, "count": nnx.RngCount(np.ones((), np.uint32), tag="t")}),  # pyright: ignore
        "ordered": OrderedDict(z=np.int8(1), a=small),
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


def bare(shape: tuple[int, ...], codec: Multilevel, headers: Sequence[int], order: Any = "stored", **more: Any):
    """A leaf with these headers, repeated, and meaningless codes: nothing here depends on an encoder."""
    (form,) = codec.formats
    blocks = -(-int(np.prod(shape)) // form.block_size)
    header = np.resize(np.array(headers, np.uint8), blocks)
    numbers = {name: np.array([more.get(name, usual)], np.float32) for name, usual in (("centre", 0), ("step", 2**-6))}
    widths = np.asarray(form.unpack_header({"header": header, **numbers}, blocks)[0])
    codes = (
        np.arange(blocks * form.block_size, dtype=np.uint32).reshape(blocks, form.block_size) * np.uint32(2654435761)
        >> 7
    )
    codes = jnp.asarray(codes & ((1 << widths.astype(np.uint32)) - 1)[:, None])
    specs = plane_specs(form.widths)
    rows = pack_planes(codes, jnp.asarray(widths), specs)
    present = [np.flatnonzero(widths >= spec.end) for spec in specs]
    planes = tuple(plane[blocks] for plane, blocks in zip(rows, present, strict=True) if blocks.size)
    stored = {"centre": numbers["centre"], "header": header, "step": numbers["step"]}
    dtype = np.dtype(more.get("dtype", np.float32))
    return BTCTensor(planes, map_to_jax(stored), shape, dtype, form, order)


def map_to_jax(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}


ALL_WIDTHS = (0, 11, 40, 79, 106, 140, 170, 205, 252, 1, 7, 255, 8, 3)
"""Headers of every width, with extreme ranges and offsets, and with escapes."""


@functools.cache
def multilevel() -> Any:
    return {
        "mixed": bare((9, 50), Multilevel(), ALL_WIDTHS),
        "centred": bare((9, 50), Multilevel(), ALL_WIDTHS[::-1], centre=0.375, step=3 * 2**-9),
        "blocks_64": bare((20, 50), Multilevel(64), ALL_WIDTHS, "output-major"),
        "blocks_48": bare((30, 24), Multilevel(48), ALL_WIDTHS),
        "taps": bare((3, 3, 4, 14), Multilevel(), ALL_WIDTHS, "output-major-taps"),
        "stored_taps": bare((14, 4, 3, 2), Multilevel(), ALL_WIDTHS, "stored-taps"),
        "taps_of_one_axis": bare((5, 8, 12), Multilevel(16), ALL_WIDTHS, "output-major-taps"),
        "no_taps": bare((9, 50), Multilevel(), ALL_WIDTHS, "output-major-taps"),
        "half": bare((9, 50), Multilevel(), ALL_WIDTHS, dtype=jnp.bfloat16),
        "width_0": bare((9, 50), Multilevel(width=0), ALL_WIDTHS),
        "width_3": bare((9, 50), Multilevel(width=3), ALL_WIDTHS),
        "width_4": bare((9, 50), Multilevel(width=4), ALL_WIDTHS),
        "width_7_taps": bare((3, 3, 4, 14), Multilevel(width=7), ALL_WIDTHS, "output-major-taps"),
        "width_8": bare((9, 50), Multilevel(width=8), ALL_WIDTHS),
        "zeros": bare((9, 50), Multilevel(), (0,)),
        "short": bare((3,), Multilevel(), (170,)),
        "scalar": bare((), Multilevel(), (252,)),
        "size_0": bare((0, 4), Multilevel(), (0,)),
        "auto": quantize_leaf(packed((6, 40), Uniform(8)).dequantize(), Uniform(8, threshold="auto"), slope=2.0**-8),
    }


TREES: dict[str, tuple[Callable[[], Any], int | None]] = {
    "dense": (dense, None),
    "containers": (containers, None),
    "codecs": (codecs, None),
    "shards": (codecs, 700),
    "multilevel": (multilevel, None),
}


def write(folder: Path, name: str) -> list[Path]:
    """Write one of them into an empty folder, and return its files."""
    return write_tree(folder, name, TREES[name][0]())


def write_tree(folder: Path, name: str, tree: Any) -> list[Path]:
    """Write a tree as one of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BTCTreeWarning)  # of the named tuple
        save(folder / f"{name}.safetensors", tree, max_shard_bytes=TREES[name][1])
    return sorted(folder.iterdir())


if __name__ == "__main__":
    for name in TREES:
        if not (FOLDER / name).exists():
            (FOLDER / name).mkdir()
            print(*write(FOLDER / name, name))
