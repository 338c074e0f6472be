"""llama.cpp's formats, through the shared library of the package llama-cpp-python.

This runs what `llama-quantize` runs without an importance matrix, single-threaded, and the reference decoder.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.peers import Reconstruct, as_leaf, in_rows

# The numbers are stored in GGUF files, so they never change.
TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ3_S": 21,
    "IQ4_XS": 23,
    "MXFP4": 39,
    "NVFP4": 40,
}


class _Traits(ctypes.Structure):
    """ggml's `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Format:
    """One of `TYPES`."""

    def __init__(self, name: str):
        self.name, self.number, self._ggml = name, TYPES[name], _library()
        self._traits = self._ggml.ggml_get_type_traits(self.number).contents
        found = self._traits.type_name.decode()
        if found.lower() != name.lower():
            raise ImportError(f"its library calls type {self.number} {found}, not {name}; it is too old or too new")

    @property
    def group(self) -> int:
        """Weights in one block of the format."""
        return self._traits.blck_size

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Encode contiguous float32 weights, a multiple of `group`, as the bytes of a one-row GGUF tensor."""
        stored = np.empty(rows.size // self.group * self._traits.type_size, np.uint8)
        written = self._ggml.ggml_quantize_chunk(self.number, _at(rows), _at(stored), 0, 1, rows.size, None)
        assert written == stored.nbytes
        return stored

    def decode(self, stored: np.ndarray, weights: int) -> np.ndarray:
        decoded = np.empty(weights, np.float32)
        self._traits.to_float(_at(stored), _at(decoded), weights)
        return decoded

    def reconstruct(self, leaf: np.ndarray) -> tuple[np.ndarray, int]:
        rows = in_rows(leaf, self.group)
        stored = self.encode(rows)
        return as_leaf(self.decode(stored, rows.size), leaf), 8 * stored.nbytes


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {f"llama.cpp {name}": ("llama.cpp", Format(name).reconstruct) for name in TYPES}


class _Init(ctypes.Structure):
    """ggml's `struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def matrix_product(kind: str, weights: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray]:
    """llama.cpp's own product of float32 rows `x` and a quantized matrix `[outputs, inputs]`, on one thread.

    Raises:
        ImportError: if llama.cpp is not installed.
    """
    form, base, cpu = Format(kind), _library(), ctypes.CDLL(str(next(_folder().glob("*ggml-cpu.*"))))
    for function in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
        getattr(base, function).restype = ctypes.c_void_p
    stored, (outputs, inputs) = form.encode(np.ascontiguousarray(weights).reshape(-1)), weights.shape
    cpu.ggml_cpu_init()
    context = ctypes.c_void_p(base.ggml_init(_Init(stored.nbytes + 2**26, None, False)))
    sizes = ctypes.c_int64(inputs), ctypes.c_int64(outputs), ctypes.c_int64(len(x))
    matrix = ctypes.c_void_p(base.ggml_new_tensor_2d(context, form.number, *sizes[:2]))
    rows = ctypes.c_void_p(base.ggml_new_tensor_2d(context, 0, sizes[0], sizes[2]))
    product = ctypes.c_void_p(base.ggml_mul_mat(context, matrix, rows))
    graph = ctypes.c_void_p(base.ggml_new_graph(context))
    base.ggml_build_forward_expand(graph, product)
    ctypes.memmove(base.ggml_get_data(matrix), _at(stored), stored.nbytes)
    ctypes.memmove(base.ggml_get_data(rows), _at(np.ascontiguousarray(x, np.float32)), 4 * x.size)
    result = (ctypes.c_float * (outputs * len(x))).from_address(base.ggml_get_data(product))

    def multiplied() -> np.ndarray:
        assert cpu.ggml_graph_compute_with_ctx(context, graph, 1) == 0
        return np.frombuffer(result, np.float32).reshape(len(x), outputs)

    return multiplied


def _folder() -> Path:
    """The folder of its libraries, without importing the package, which would load all of llama.cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'llama_cpp'")
    return Path(spec.submodule_search_locations[0]) / "lib"


@functools.cache
def _library() -> ctypes.CDLL:
    """ggml's base library."""
    folder = _folder()
    found = [p for p in sorted(folder.glob("*ggml-base*")) if p.suffix in (".so", ".dylib", ".dll")]
    if not found:
        raise ImportError(f"no library ggml-base in {folder}")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def _at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
