"""Safe reading of CIFAR's Python batches: nothing is called except what creates a plain numpy array.

A pickle names the functions that rebuild its objects, and an ordinary `pickle.load` calls whatever it names. Here a
name must stand for one of the few functions below, or the file is refused.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def load_pickle(path: Path) -> Any:
    """The contents of a pickle of arrays, bytes, strings, numbers, lists and dicts.

    Raises:
        ValueError: if the file is not such a pickle; the message is one line that names it.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path}: not a pickle of plain arrays ({_short(error)}); get the file again") from error


def _short(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:120]


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, which the pickle then fills."""
    if kind != _NDARRAY:
        raise pickle.UnpicklingError("it creates an object that is not a plain array")
    return np.empty(0, np.uint8)


def _dtype(code: Any, *_: Any) -> np.dtype:
    dtype = np.dtype(code.decode("ascii") if isinstance(code, bytes) else code)
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"arrays of {dtype} are not allowed")
    return dtype


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    return np.frombuffer(buffer, _dtype(dtype)).reshape(shape, order=order)  # pyright: ignore


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(_encode(data), _dtype(dtype))[0]


def _encode(text: Any, encoding: str = "latin1") -> bytes:
    """For readers in Python 2, Python 3 writes bytes as a string and a call of this function."""
    return text if isinstance(text, bytes) else text.encode("latin1")


def _no_bytes() -> bytes:
    """The call that Python 3 writes for empty bytes, for readers in Python 2."""
    return b""


_NDARRAY = "numpy.ndarray"
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,  # only a name: calling it is an error
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytearray"): bytearray,
    ("__builtin__", "bytearray"): bytearray,
    ("__builtin__", "bytes"): _no_bytes,
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _frombuffer),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside")
