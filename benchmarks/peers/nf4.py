"""bitsandbytes' NF4: blocks of 64, whose absolute maxima are in turn quantized to 8 bits."""

from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from benchmarks.peers import Reconstruct, as_leaf, in_rows


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {"bitsandbytes NF4, 64": ("bitsandbytes", _reconstruct)}


def _reconstruct(leaf: np.ndarray) -> tuple[np.ndarray, int]:
    rows = torch.from_numpy(in_rows(leaf, 64))
    state: Any
    codes, state = quantize_4bit(rows, blocksize=64, compress_statistics=True, quant_type="nf4")
    stored = (codes, state.absmax, state.state2.absmax, state.offset)
    return as_leaf(dequantize_4bit(codes, state).numpy(), leaf), 8 * sum(tensor.nbytes for tensor in stored)
