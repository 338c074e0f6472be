"""Write checkpoints without btc_jax: any manifest with valid checksums, and the header and payload that it implies."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

CODES = {"float32": "F32", "bool": "BOOL", "float64": "F64", "int32": "I32", "uint8": "U8", "bfloat16": "BF16"}
ITEMSIZES = {"F64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2}
SEAL = bytes.fromhex("b1504ca2")
UNIFORM = {"id": "uniform", "block_size": 4, "widths": [4, 8], "header_dtype": "float16"}
Change = Callable[[Any], Any]


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def signed(manifest: Any) -> dict[str, str]:
    written = manifest if isinstance(manifest, str) else text(manifest)
    return {"btc_jax": written, "btc_jax_crc32c": crc(written.encode("utf-8", "surrogatepass"))}


def write(path: Path, header: bytes, payload: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, which claims to be `length` bytes long."""
    header += b" " * (-len(header) % 8)
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + payload)
    return path


def dense_format(dtype: str = "float32") -> dict[str, Any]:
    return {"kind": "dense", "dtype": dtype}


def packed_format(codec: Any = None, order: Any = "output-major") -> dict[str, Any]:
    return {"kind": "packed", "dtype": "float32", "order": order, "codec": dict(UNIFORM if codec is None else codec)}


def dense(path: str, array: np.ndarray, number: int = 0) -> list[Any]:
    """The record of a dense leaf."""
    return [path, number, list(array.shape), crc(array.tobytes())]


def packed(data: bytes, shape: Any = (8,), number: int = 0, path: str = "w") -> list[Any]:
    """The record of a packed leaf."""
    return [path, number, list(shape), crc(data), len(data)]


def uniform(wide: tuple[int, ...] = (1, 0), **parts: bytes) -> bytes:
    """A packed leaf with blocks of 4 weights, wide according to `wide`; `parts` replace its own parts."""
    blocks = len(wide)
    usual = {
        "seal": SEAL,
        "maximum": np.ones(blocks, np.float16).tobytes(),
        "minimum": np.full(blocks, -1, np.float16).tobytes(),
        "wide": bytes([sum(bit << i for i, bit in enumerate(wide))]),
        "plane0": bytes(range(1, 1 + 2 * blocks)),
        "plane1": bytes(range(9, 9 + 2 * sum(wide))),
    }
    return b"".join((usual | parts).values())


def manifest(formats: list[Any], leaves: list[Any], tree: Any = None) -> dict[str, Any]:
    return {"version": 1, "formats": formats, "tree": ["paths", len(leaves), 0] if tree is None else tree} | {
        "leaves": leaves
    }


def tensors(fields: Any) -> list[tuple[str, str, list[int]]]:
    """Name, code and shape of all tensors in file order: the largest item size first."""
    found = [_tensor(fields["formats"][leaf[1]], *leaf) for leaf in fields["leaves"]]
    return sorted((tensor for tensor in found if tensor), key=lambda tensor: -ITEMSIZES.get(tensor[1], 1))


def _tensor(how: Any, path: Any, number: int, *rest: Any) -> Any:
    if how["kind"] == "packed":
        return path, "U8", [rest[2]]
    if how["kind"] == "key":
        return path, "U32", rest[0] + how["words"]
    return None if how["kind"] in ("python", "tied") else (path, CODES.get(how["dtype"], "U8"), rest[0])


def header_of(fields: Any, sign: Any = None) -> dict[str, Any]:
    """The header that a manifest implies, as JSON; if given, `sign` replaces the manifest in it."""
    header: dict[str, Any] = {"__metadata__": signed(fields if sign is None else sign)}
    end = 0
    for name, code, shape in tensors(fields):
        nbytes = math.prod(shape) * ITEMSIZES.get(code, 1)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return header


def checkpoint(path: Path, fields: Any, data: dict[str, bytes], header: Any = None) -> Path:
    """A checkpoint of this manifest and these tensors, optionally with another header."""
    payload = b"".join(data[tensor[0]] for tensor in tensors(fields))
    return write(path, text(header_of(fields) if header is None else header).encode(), payload)


def honest() -> tuple[dict[str, Any], dict[str, bytes]]:
    """A valid manifest of a packed leaf, a dense one and one tied to it, and its tensors."""
    array, data = np.arange(6, dtype=np.float32).reshape(2, 3), uniform()
    formats = [packed_format(), dense_format(), {"kind": "tied", "dtype": "float32"}]
    leaves = [packed(data), dense("a", array, 1), ["b", 2, [2, 3], "a"]]
    tree = ["dict", ["w", "a", "b"], [0, 1, 2]]
    return manifest(formats, leaves, tree), {"w": data, "a": array.tobytes()}


def with_header(folder: Path, change: Change) -> Path:
    """The valid file, its header changed in place by `change`."""
    fields, data = honest()
    header = header_of(fields)
    change(header)
    return checkpoint(folder / "m.safetensors", fields, data, header)


def with_manifest(folder: Path, change: Change) -> Path:
    """The valid file, its manifest changed in place by `change`, with valid checksums and the original header."""
    fields, data = honest()
    header = header_of(fields)
    change(fields)
    header["__metadata__"] = signed(fields)
    return checkpoint(folder / "m.safetensors", honest()[0], data, header)


def consistent(folder: Path, change: Change) -> Path:
    """The same, with the header that the changed manifest implies."""
    fields, data = honest()
    change(fields)
    return checkpoint(folder / "m.safetensors", fields, data)
