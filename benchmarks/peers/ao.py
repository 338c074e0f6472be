"""torchao's integers, with a float16 scale and an integer zero point for every group of weights."""

import functools
from typing import Any

import numpy as np
import torch
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

from benchmarks.peers import Reconstruct, as_leaf, in_rows

# Bits per code, group size, whether there is a zero point.
FORMATS = ((3, 32, True), (4, 32, True), (4, 128, True), (8, 128, False))


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {
        f"torchao int{bits}, {size}": ("torchao", functools.partial(_reconstruct, bits, size, zeros))
        for bits, size, zeros in FORMATS
    }


def _reconstruct(bits: int, size: int, zeros: bool, leaf: np.ndarray) -> tuple[np.ndarray, int]:
    rows = torch.from_numpy(in_rows(leaf, size))
    linear = torch.nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(rows)
    mapping = MappingType.ASYMMETRIC if zeros else MappingType.SYMMETRIC
    quantize_(linear, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(size), mapping, torch.float16))
    packed: Any = linear.weight
    # The package stores codes and zero points in bytes; they are counted at their width.
    stored = bits * (packed.qdata.numel() + zeros * packed.zero_point.numel()) + 8 * packed.scale.nbytes
    return as_leaf(packed.dequantize().float().detach().numpy(), leaf), stored
