"""HQQ with its own optimizer: a float16 scale and zero point for every group of weights along a row."""

import functools

import numpy as np
import torch
from hqq.core.quantize import Quantizer

from benchmarks.peers import Reconstruct, as_leaf, in_rows

FORMATS = ((3, 64), (4, 64), (4, 128), (8, 128))


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {f"HQQ {bits}-bit, {size}": ("HQQ", functools.partial(_reconstruct, bits, size)) for bits, size in FORMATS}


def _reconstruct(bits: int, size: int, leaf: np.ndarray) -> tuple[np.ndarray, int]:
    rows = torch.from_numpy(in_rows(leaf, size))
    codes, meta = Quantizer.quantize(rows, bits, group_size=size, axis=1, bitpack=False, device="cpu")
    stored = {name: meta[name].to(torch.float16) for name in ("scale", "zero")}
    meta |= {name: value.to(torch.float32) for name, value in stored.items()} | {"compute_dtype": torch.float32}
    decoded = Quantizer.dequantize(codes, meta)
    # Counted as if packed without waste. The package packs ten 3-bit codes into 32 bits, which is not counted.
    return as_leaf(decoded.numpy(), leaf), bits * rows.numel() + 8 * sum(value.nbytes for value in stored.values())
