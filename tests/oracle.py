"""The codecs in plain numpy, block by block: an independent implementation to compare the package with."""

import numpy as np
from scipy.fft import dctn, idctn


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


# The multilevel codec and the transformed orders, from their descriptions alone. All in float64.


def multilevel_grid(header, step):
    """Width, half-range and middle of the block with this header byte."""
    r, offset = divmod(int(header), 8)
    if header == 0:
        return 0, 0.0, 0.0
    if r == 0:
        half = step * 2.0 ** (8 + offset * (offset - 1) / 4)
        return 8, half, escaped_middle(half, 8)
    half = step * 2.0 ** (r / 4)
    return r // 4 + 1, half, half * (2 * offset - 7) * 5 / 128


def escaped_middle(half, width):
    """The middle of a grid whose code n / 2 is the centre."""
    n = 2**width
    return -half * (0.75 / n + 0.25 / n**3) if width else 0.0


def multilevel_levels(header, step, centre=0.0, width=None):
    """The levels of a block: `2 ** width` weights, ascending; without payload, one."""
    own, half, middle = multilevel_grid(header, step)
    n = 2 ** (own if width is None else width)
    if 0 < header < 8 and width is not None:
        middle = escaped_middle(half, width)
    u = (2 * np.arange(n) + 1 - n) / n
    return centre + middle + half * (0.75 * u + 0.25 * u**3)


def nearest(levels, block):
    """Index of the nearest level for each weight; levels are ascending."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, block)


def multilevel_costs(blocks, step, centre, slope, bits_per_width):
    """Squared error plus slope times bits of each block, for each of the 256 headers: `[256, blocks]`."""
    costs = []
    for header in range(256):
        levels = multilevel_levels(header, step, centre)
        errors = blocks - levels[nearest(levels, blocks)]
        costs.append((errors**2).sum(1) + slope * bits_per_width * multilevel_grid(header, step)[0])
    return np.array(costs)


def unpacked_rows(plane, bits, block_size):
    """The codes in the rows of a plane: words in runs of J, with code `j + i * J` of a run in bits `i * bits`."""
    rows, words = plane.shape
    run, lanes = np.gcd(words, 8), 8 * plane.itemsize // bits
    shifts = bits * np.arange(lanes, dtype=plane.dtype)
    fields = plane.reshape(rows, words // run, 1, run) >> shifts[:, None] & plane.dtype.type(2**bits - 1)
    return fields.reshape(rows, words * lanes)[:, :block_size].astype(np.int64)


def codes_of(planes, widths, possible, block_size):
    """The codes of blocks: each plane holds the next bits, most significant first, of the blocks that have them."""
    codes, end, planes = np.zeros((len(widths), block_size), np.int64), 0, iter(planes)
    for width in possible:
        for bits in (8, 4, 2, 1):
            if (width - end) & bits:
                end += bits
                present = widths >= end
                if not present.any():
                    continue  # a plane without rows is left out
                codes[present] = codes[present] << bits | unpacked_rows(np.asarray(next(planes)), bits, block_size)
    return codes


def multilevel_codes(tensor):
    """The codes of all blocks of a packed leaf."""
    width = tensor.format.width
    headers = np.asarray(tensor.header["header"])
    widths = np.array([multilevel_grid(h, 1.0)[0] if width is None else width for h in headers], np.int64)
    return codes_of(tensor.planes, widths, range(9) if width is None else (width,), tensor.format.block_size)


def multilevel_blocks(tensor):
    """The weights of all blocks of a packed leaf, in the order of the blocks."""
    step, centre = (float(np.asarray(tensor.header[name])[0]) for name in ("step", "centre"))
    grids = [multilevel_levels(h, step, centre, tensor.format.width) for h in np.asarray(tensor.header["header"])]
    return np.array([levels[codes] for levels, codes in zip(grids, multilevel_codes(tensor), strict=True)])


def run_of(ndim, order):
    """Axes in layout order, and how many of the first are transformed."""
    axes = list(range(ndim))
    channels, taps = (axes[:2], axes[2:]) if order.startswith("stored") else (axes[::-1][:2], axes[:-2])
    return (taps + channels, len(taps)) if order.endswith("taps") else (channels + taps, 0)


def flattened(leaf, order):
    """The numbers of a leaf in the order of its blocks."""
    run, taps = run_of(np.ndim(leaf), order)
    placed = np.asarray(leaf, np.float64).transpose(run)
    transformed = dctn(placed, axes=range(taps), norm="ortho") if taps and placed.size else placed
    return np.asarray(transformed).reshape(-1)


def unflattened(flat, shape, order):
    """The leaf with these numbers in its blocks; the inverse of `flattened`."""
    run, taps = run_of(len(shape), order)
    placed = np.reshape(flat, [shape[axis] for axis in run])
    plain = idctn(placed, axes=range(taps), norm="ortho") if taps and placed.size else placed
    return np.asarray(plain).transpose(np.argsort(run))


def multilevel_decoded(tensor):
    """The weights of a packed leaf."""
    size = int(np.prod(tensor.shape))
    return unflattened(multilevel_blocks(tensor).reshape(-1)[:size], tensor.shape, tensor.order)


def sqnr_db(original, decoded):
    """Signal-to-quantization-noise ratio in dB; infinite without noise."""
    original, decoded = np.asarray(original, np.float64), np.asarray(decoded, np.float64)
    noise = ((original - decoded) ** 2).sum()
    return 10 * np.log10((original**2).sum() / noise) if noise else np.inf
