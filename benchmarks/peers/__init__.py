"""Other quantizers, run through their own packages, each an optional install.

A peer takes one leaf of float32 weights and returns the dequantized leaf, and the total bits stored: codes, scales,
zero points, padding, constants of the tensor. Tables shared by all tensors are part of the format and do not count.
Leaves are read in their order in memory, as rows of one group each; the last group is padded with zeros, which count.
So no leaf is too narrow for a format.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np

Reconstruct = Callable[[np.ndarray], tuple[np.ndarray, int]]

INSTALLS = {
    "baselines": "btc_jax",
    "llama_cpp": "llama-cpp-python",
    "higgs": "higgs-kernels",
    "nf4": "bitsandbytes",
    "half_quadratic": "hqq",
    "tiles": "qwix",
    "ao": "torchao",
}
"""Modules of peers, and the package that each one runs."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A quantizer from another package.

    Attributes:
        name: its unique name in tables; a number after a comma is the group size.
        family: peers of one family share a marker in figures.
        reconstruct: leaf -> the dequantized float32 leaf, and the bits stored.
        source: its package and version.
    """

    name: str
    family: str
    reconstruct: Reconstruct
    source: str


def available(tell: Callable[[str], None] = print) -> list[Peer]:
    """The peers whose packages are installed; `tell` gets one line for each that is not."""
    return [peer for module in INSTALLS for peer in peers_of(module, tell)]


def peers_of(module: str, tell: Callable[[str], None] = print) -> Iterator[Peer]:
    """The peers of one of `INSTALLS`; none if its package is missing."""
    package = INSTALLS[module]
    try:
        formats = importlib.import_module(f"benchmarks.peers.{module}").formats()
    except ImportError as error:
        tell(f"{package} is left out: {error}. To include it: pip install {package}")
        return
    for name, (family, reconstruct) in formats.items():
        yield Peer(name, family, reconstruct, f"{package} {version(package)}")


def in_rows(leaf: np.ndarray, size: int) -> np.ndarray:
    """A leaf, in its order in memory, as float32 rows of `size` weights, the last one padded with zeros."""
    flat = np.asarray(leaf, np.float32).reshape(-1)
    return np.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def as_leaf(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of `in_rows`."""
    return np.asarray(rows, np.float32).reshape(-1)[: like.size].reshape(like.shape)
