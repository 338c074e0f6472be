"""A reader of one file, written from docs/format.md alone, with only numpy and json. It refuses nothing."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


def read_packed(path: Path) -> dict[str, np.ndarray]:
    """The packed leaves of a file, decoded."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    manifest = json.loads(header["__metadata__"]["btc_jax"])
    leaves = {}
    for leaf_path, number, *rest in manifest["leaves"]:
        how = manifest["formats"][number]
        if how["kind"] == "packed":
            begin, end = header[leaf_path]["data_offsets"]
            leaves[leaf_path] = _leaf(how, rest[0], data[start + begin : start + end])
    return leaves


def _leaf(how: dict[str, Any], shape: list[int], data: bytes) -> np.ndarray:
    codec = how["codec"]
    blocks = -(-math.prod(shape) // codec["block_size"])
    decode = _uniform if codec["id"] == "uniform" else _multilevel
    assert data[:4] == bytes.fromhex("b1504ca2")
    weights = decode(codec, blocks, data[4:]).reshape(-1)[: math.prod(shape)]
    dtype = getattr(ml_dtypes, how["dtype"]) if hasattr(ml_dtypes, how["dtype"]) else how["dtype"]
    return _placed(weights, shape, how["order"]).astype(dtype)


def _cut(data: bytes, *parts: tuple[Any, int]) -> tuple[list[np.ndarray], bytes]:
    """Arrays of these dtypes and lengths from the start of some bytes, and the remaining bytes."""
    arrays = []
    for dtype, length in parts:
        nbytes = np.dtype(dtype).itemsize * length
        arrays.append(np.frombuffer(data[:nbytes], dtype))
        data = data[nbytes:]
    return arrays, data


def _placed(weights: np.ndarray, shape: list[int], order: str) -> np.ndarray:
    axes = list(range(len(shape)))
    first, others = (axes[:2], axes[2:]) if order.startswith("stored") else (axes[::-1][:2], axes[:-2])
    placed = others + first if order.endswith("-taps") else first + others
    array = weights.reshape([shape[axis] for axis in placed])
    for axis in range(len(others)) if order.endswith("-taps") else ():
        array = np.moveaxis(np.tensordot(_cosines(array.shape[axis]).T, array, (1, axis)), 0, axis)
    return array.transpose(np.argsort(placed))


def _cosines(size: int) -> np.ndarray:
    k, t = np.arange(size)[:, None], np.arange(size)
    return np.where(k == 0, math.sqrt(1 / size), math.sqrt(2 / size)) * np.cos(np.pi * k * (2 * t + 1) / (2 * size))


def _uniform(codec: dict[str, Any], blocks: int, data: bytes) -> np.ndarray:
    widths = codec["widths"]
    extreme = (codec["header_dtype"], blocks)
    (maximum, minimum, bits), data = _cut(data, extreme, extreme, ("u1", -(-blocks // 8) if len(widths) == 2 else 0))
    wide = np.unpackbits(bits, count=blocks, bitorder="little") if len(widths) == 2 else np.zeros(blocks, int)
    width = np.where(wide == 1, widths[-1], widths[0])
    low, high = minimum.astype(np.float64)[:, None], maximum.astype(np.float64)[:, None]
    return low + _codes(widths, width, codec["block_size"], data) * ((high - low) / (2.0**width - 1)[:, None])


def _multilevel(codec: dict[str, Any], blocks: int, data: bytes) -> np.ndarray:
    (centre, header, step), data = _cut(data, ("<f4", 1), ("u1", blocks), ("<f4", 1))
    r, e = np.divmod(header.astype(int), 8)
    free = np.where(r > 0, r // 4 + 1, np.where(e > 0, 8, 0))
    width = free if codec["width"] is None else np.full(blocks, codec["width"])
    octaves = np.where(r > 0, r / 4, 8 + e * (e - 1) / 4)
    half = np.where((r > 0) | (e > 0), float(step[0]) * 2.0**octaves, 0)[:, None]
    n = 2.0 ** width[:, None]
    escaped = np.where(n[:, 0] > 1, -(0.75 / n[:, 0] + 0.25 / n[:, 0] ** 3), 0)
    middle = np.where(r > 0, (2 * e - 7) * 5 / 128, np.where(e > 0, escaped, 0))[:, None]
    widths = list(range(9)) if codec["width"] is None else [codec["width"]]
    u = (2 * _codes(widths, width, codec["block_size"], data) + 1 - n) / n
    return float(centre[0]) + half * (0.75 * u + 0.25 * u**3 + middle)


def _codes(widths: list[int], width: np.ndarray, size: int, data: bytes) -> np.ndarray:
    """The codes of all blocks, of these widths, from the planes, which must be all the remaining bytes."""
    codes, end = np.zeros((len(width), size), np.int64), 0
    for wanted in widths:
        for bits in (8, 4, 2, 1):
            if (wanted - end) & bits:
                end += bits
                present = np.flatnonzero(width >= end)
                row = -(-size * bits // 8)
                word = math.gcd(row, 4)
                (plane,), data = _cut(data, (f"<u{word}", len(present) * row // word))
                codes[present] = codes[present] << bits | _fields(plane.reshape(-1, row // word), bits, size)
    assert not data
    return codes


def _fields(plane: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The codes of the rows of a plane."""
    run = math.gcd(plane.shape[1], 8)
    lanes = 8 * plane.dtype.itemsize // bits
    words = plane.astype(np.int64).reshape(len(plane), plane.shape[1] // run, 1, run)
    codes = words >> bits * np.arange(lanes)[:, None] & (1 << bits) - 1
    return codes.reshape(len(plane), lanes * plane.shape[1])[:, :size]
