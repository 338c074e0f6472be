"""The paper's algorithm 1 in plain numpy, block by block: an independent calculation to hold the package against."""

import numpy as np


def output_major(leaf):
    """Weights in the order of a PyTorch kernel: (kh, kw, in, out) as (out, in, kh, kw)."""
    leaf = np.asarray(leaf)
    if leaf.ndim > 1:
        leaf = np.moveaxis(np.moveaxis(leaf, -1, 0), -1, 1)
    return leaf.reshape(-1)


def outwards(low, high, dtype):
    """The largest number of `dtype` not above `low`, and the smallest not below `high`."""
    dtype = np.dtype(dtype).type
    lo, hi = dtype(low), dtype(high)
    if lo > low:
        lo = np.nextafter(lo, dtype(-np.inf))
    if hi < high:
        hi = np.nextafter(hi, dtype(np.inf))
    return lo, hi


def quantize_block(w, low_bits, high_bits, threshold, header_dtype="float16"):
    """Equations 1 to 5 of one float32 block: (bits, codes, minimum, maximum, reconstruction, step)."""
    sigma = np.sqrt(np.mean((w.astype(np.float64) - w.astype(np.float64).mean()) ** 2))
    bits = low_bits if sigma < threshold else high_bits
    lo, hi = outwards(w.min(), w.max(), header_dtype)
    step = (np.float32(hi) - np.float32(lo)) / np.float32(2**bits - 1)
    codes = np.rint((w - np.float32(lo)) / step) if step > 0 else np.zeros_like(w)
    return bits, codes.astype(np.uint8), lo, hi, np.float32(lo) + codes.astype(np.float32) * step, step


def quantize(flat, block_size, low_bits=4, high_bits=8, threshold=0.05, header_dtype="float16"):
    """All blocks of a flat float32 array, the last one short."""
    starts = range(0, flat.size, block_size)
    return [quantize_block(flat[i : i + block_size], low_bits, high_bits, threshold, header_dtype) for i in starts]
