"""A reader of one file, written from docs/format.md alone: numpy, json, and nothing of btc_jax. It refuses nothing."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CODES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32}


def read_packed(path: Path) -> dict[str, np.ndarray]:
    """The packed leaves of a file, decoded."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    manifest = json.loads(header["__metadata__"]["btc_jax"])

    def tensor(name: str) -> np.ndarray:
        entry = header[name]
        begin, end = entry["data_offsets"]
        return np.frombuffer(data[start + begin : start + end], CODES[entry["dtype"]]).reshape(entry["shape"])

    leaves = [leaf for leaf in manifest["leaves"] if leaf["kind"] == "packed"]
    return {leaf["path"]: _leaf(leaf, {t[0].split("#")[1]: tensor(t[0]) for t in leaf["tensors"]}) for leaf in leaves}


def _leaf(leaf: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    codec, shape = leaf["codec"], leaf["shape"]
    blocks = -(-math.prod(shape) // codec["block_size"])
    decode = _uniform if codec["id"] == "uniform" else _multilevel
    weights = decode(codec, blocks, arrays).reshape(-1)[: math.prod(shape)]
    dtype = getattr(ml_dtypes, leaf["dtype"]) if hasattr(ml_dtypes, leaf["dtype"]) else leaf["dtype"]
    return _placed(weights, shape, leaf["order"]).astype(dtype)


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


def _uniform(codec: dict[str, Any], blocks: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    low, high, threshold = codec["low_bits"], codec["high_bits"], codec["threshold"]
    widths = [high] if threshold == 0 else [low] if threshold == "inf" else [low, high]
    wide = np.unpackbits(arrays["wide"], count=blocks, bitorder="little") if len(widths) == 2 else np.zeros(blocks, int)
    width = np.where(wide == 1, high, widths[0])
    low, high = (arrays[name].astype(np.float64)[:, None] for name in ("minimum", "maximum"))
    return low + _codes(widths, width, codec["block_size"], arrays) * ((high - low) / (2.0**width - 1)[:, None])


def _multilevel(codec: dict[str, Any], blocks: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    r, e = np.divmod(arrays["header"].astype(int), 8)
    free = np.where(r > 0, r // 4 + 1, np.where(e > 0, 8, 0))
    width = free if codec["width"] is None else np.full(blocks, codec["width"])
    octaves = np.where(r > 0, r / 4, 8 + e * (e - 1) / 4)
    half = np.where((r > 0) | (e > 0), float(arrays["step"][0]) * 2.0**octaves, 0)[:, None]
    n = 2.0 ** width[:, None]
    escaped = np.where(n[:, 0] > 1, -(0.75 / n[:, 0] + 0.25 / n[:, 0] ** 3), 0)
    middle = np.where(r > 0, (2 * e - 7) * 5 / 128, np.where(e > 0, escaped, 0))[:, None]
    widths = list(range(9)) if codec["width"] is None else [codec["width"]]
    u = (2 * _codes(widths, width, codec["block_size"], arrays) + 1 - n) / n
    return float(arrays["centre"][0]) + half * (0.75 * u + 0.25 * u**3 + middle)


def _codes(widths: list[int], width: np.ndarray, size: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The codes of all blocks, of these widths, from the planes."""
    codes, end, i = np.zeros((len(width), size), np.int64), 0, 0
    for wanted in widths:
        for bits in (8, 4, 2, 1):
            if (wanted - end) & bits:
                end += bits
                present = np.flatnonzero(width >= end)
                codes[present] = codes[present] << bits | _fields(arrays[f"plane{i}"], bits, size)
                i += 1
    return codes


def _fields(plane: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The codes of the rows of a plane."""
    run = math.gcd(plane.shape[1], 8)
    lanes = 8 * plane.dtype.itemsize // bits
    words = plane.astype(np.int64).reshape(len(plane), plane.shape[1] // run, 1, run)
    codes = words >> bits * np.arange(lanes)[:, None] & (1 << bits) - 1
    return codes.reshape(len(plane), lanes * plane.shape[1])[:, :size]
