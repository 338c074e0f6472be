"""4-bit HIGGS: pairs of weights, after a Hadamard transform of their group, on the optimal grid of 256 points.

The package's kernels need CUDA; here its functions run with the torch reference kernels that it includes.
"""

import functools
from unittest import mock

import higgs_kernels.linear
import numpy as np
import torch
from higgs_kernels.grids import load_optimal_grid_2_256
from higgs_kernels.references import higgs_dequantize_2_256_torch, higgs_quantize_2_256_torch

from benchmarks.peers import Reconstruct, as_leaf, in_rows

REFERENCES = {
    "higgs_quantize_2_256_kernel": higgs_quantize_2_256_torch,
    "higgs_dequantize_2_256_kernel": higgs_dequantize_2_256_torch,
}


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {f"HIGGS 2x256, {size}": ("HIGGS", functools.partial(_reconstruct, size)) for size in (256, 1024)}


def _reconstruct(size: int, leaf: np.ndarray) -> tuple[np.ndarray, int]:
    rows = in_rows(leaf, size) * _signs(size)
    parts = [_part(rows[i : i + 65536 // size], size) for i in range(0, len(rows), 65536 // size)]
    decoded = np.concatenate([part for part, _ in parts]) * _signs(size)
    return as_leaf(decoded, leaf), sum(bits for _, bits in parts)


@functools.cache
def _signs(size: int) -> np.ndarray:
    """Random signs before the transform, the same for every group, as in the method's paper. The package omits them,
    which costs a decibel on convolutions."""
    return np.random.default_rng(0).choice(np.array((-1, 1), np.float32), size)


@mock.patch.multiple(higgs_kernels.linear, **REFERENCES)
def _part(rows: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Some of the rows at a time: the reference needs 256 numbers for every two weights."""
    grid = load_optimal_grid_2_256()
    codes, scales = higgs_kernels.linear.higgs_quantize_linear_2_256(torch.from_numpy(rows).half(), grid, size)
    decoded = higgs_kernels.linear.higgs_dequantize_linear_2_256(codes, scales, grid, size)
    return decoded.float().numpy(), 8 * (codes.nbytes + scales.nbytes)
