"""The library of kernels, loaded once per process: the one shipped with the package, or one built at first use."""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from btc_jax.formats.multilevel import HALVES, MIDDLES, ON_A_LEVEL, WIDTHS
from btc_jax.native.build import HERE, NAME, BuildError, build

SWITCH = "BTC_JAX_NATIVE"
"""Environment variable: `0` disables the library; `portable` or `avx2` limits the instruction set."""
TARGETS = {
    "btc_decode": "btc_ffi_decode",
    "btc_multiply": "btc_ffi_multiply",
    "btc_rows": "btc_ffi_rows",
    "btc_tile": "btc_ffi_tile",
}
"""Custom calls of XLA, and the library functions that implement them."""


class Library(NamedTuple):
    """The loaded library.

    Attributes:
        functions: the library itself.
        path: the file.
        instructions: the instruction set in use: `"portable"`, `"avx2"` or `"avx512"`.
    """

    functions: Any
    path: Path
    instructions: str


@functools.cache
def _loaded() -> Library | str:
    wanted = os.environ.get(SWITCH, "avx512")
    if wanted == "0":
        return f"{SWITCH}=0"
    if wanted not in ("1", "portable", "avx2", "avx512"):
        raise ValueError(f"{SWITCH} is {wanted!r}; it can be 0, 1, portable, avx2 or avx512")
    try:
        own = HERE / NAME
        return load(own if own.exists() else build(cache_folder()), "avx512" if wanted == "1" else wanted)
    except (BuildError, OSError) as error:
        logging.getLogger("btc_jax").warning("packed weights are decoded by XLA, without native kernels: %s", error)
        return str(error)


def library() -> Library | None:
    """The library, or `None` if there is none; `why_not` tells why.

    Raises:
        ValueError: if the environment variable `BTC_JAX_NATIVE` has an unknown value.
    """
    found = _loaded()
    return found if isinstance(found, Library) else None


def why_not() -> str:
    """Why there is no library; empty if there is."""
    found = _loaded()
    return found if isinstance(found, str) else ""


def cache_folder() -> Path:
    """Where the library is kept once it is built."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "btc_jax"


def load(path: Path, most: str = "avx512") -> Library:
    """Loads a library and makes its functions known to XLA.

    Raises:
        OSError: if it cannot be loaded.
    """
    functions = ctypes.CDLL(str(path))
    functions.btc_start.restype = ctypes.c_char_p
    middles = np.tile(MIDDLES, (10, 1))
    middles[:9, 1:8], middles[9, 1:8] = ON_A_LEVEL[:, None], ON_A_LEVEL[8]
    instructions = functions.btc_start(*pointers([WIDTHS, HALVES, middles]), most.encode())
    for target, name in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(functions, name)), platform="cpu")
    return Library(functions, path, instructions.decode())


def pointers(arrays: Sequence[np.ndarray]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]
