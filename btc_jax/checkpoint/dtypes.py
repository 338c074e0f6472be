"""The dtypes of stored arrays, by the names of numpy and of safetensors."""

import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from btc_jax.checkpoint.errors import BTCFormatError

CODES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"},
    **{"float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
}
"""safetensors' names of dtypes. Any other is stored as U8, with the bytes of an element as last axis."""

DTYPES = {code: jnp.dtype(name) for name, code in CODES.items()}

_PLAIN = re.compile(r"(bool|u?int|b?float|complex)[0-9a-z_]*")
_OF_SOME_MACHINES = ("float96", "float128", "complex192", "complex256")


def is_storable(dtype: Any) -> bool:
    """Whether arrays of a dtype are stored."""
    return (dtype.kind in "biufc" or jnp.issubdtype(dtype, jnp.number)) and dtype.name not in _OF_SOME_MACHINES


@functools.lru_cache(maxsize=1024)
def dtype_of(name: str) -> np.dtype:
    """The dtype of a name in a file, if arrays of it are stored.

    Raises:
        BTCFormatError: if they are not. Only plain names are passed to numpy, which accepts much else.
    """
    dtype = jnp.dtype(name) if _PLAIN.fullmatch(name) and len(name) < 30 else None
    if dtype is None or dtype.name != name or not is_storable(dtype):
        raise BTCFormatError(f"the dtype {name[:60]!r} is unknown")
    return dtype
