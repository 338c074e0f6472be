"""Writes checkpoints without btc_jax: any manifest, rightly signed, and the header and payload that it asks for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

ITEMSIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U16": 2}
Change = Callable[[Any], Any]


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def signed(manifest: Any) -> dict[str, str]:
    written = manifest if isinstance(manifest, str) else text(manifest)
    return {"btc_jax": written, "btc_jax_crc32c": crc(written.encode("utf-8", "surrogatepass"))}


def write(path: Path, header: bytes, payload: bytes = b"", length: int | None = None) -> Path:
    """A file of this header, which claims to be `length` bytes long."""
    header += b" " * (-len(header) % 8)
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + payload)
    return path


def leaf(path: str, array: np.ndarray, **changes: Any) -> dict[str, Any]:
    """The record of a dense leaf of float32."""
    tensor = [path, "F32", list(array.shape), crc(array.tobytes())]
    fields = {"path": path, "kind": "dense", "shape": list(array.shape), "dtype": "float32", "tensors": [tensor]}
    return fields | changes


def packed(block_size: int = 4, wide: tuple[int, ...] = (1, 0)) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The record and the tensors of a leaf `w` of two blocks, wide where `wide` says so."""
    parts: dict[str, tuple[str, list[int], bytes]] = {
        "plane0": ("U16", [len(wide), 1], bytes(range(1, 1 + 2 * len(wide)))),
        "plane1": ("U16", [sum(wide), 1], bytes(range(9, 9 + 2 * sum(wide)))),
        "maximum": ("F16", [len(wide)], np.ones(len(wide), np.float16).tobytes()),
        "minimum": ("F16", [len(wide)], np.full(len(wide), -1, np.float16).tobytes()),
        "wide": ("U8", [1], bytes([sum(bit << i for i, bit in enumerate(wide))])),
    }
    record = {
        **{"path": "w", "kind": "packed", "shape": [block_size * len(wide)], "dtype": "float32"},
        "tensors": [[f"w#{name}", code, shape, crc(data)] for name, (code, shape, data) in parts.items()],
        "codec": {
            **{"id": "uniform", "block_size": block_size, "low_bits": 4, "high_bits": 8, "threshold": 0.05},
            "header_dtype": "float16",
        },
        "order": "output-major",
    }
    return record, {f"w#{name}": data for name, (_, _, data) in parts.items()}


def manifest(*leaves: dict[str, Any], tree: Any = None) -> dict[str, Any]:
    tree = ["dict", "", [leaf["path"] for leaf in leaves], list(range(len(leaves)))] if tree is None else tree
    return {"version": 1, "tree": tree, "leaves": list(leaves)}


def order(fields: Any) -> list[list[Any]]:
    """All tensors as they lie in a file: the widest numbers first."""
    tensors = [tensor for record in fields["leaves"] for tensor in record["tensors"]]
    return sorted(tensors, key=lambda tensor: -ITEMSIZES.get(tensor[1], 1))


def header_of(fields: Any, sign: Any = None) -> dict[str, Any]:
    """The header that a manifest asks for, as JSON; `sign` is put into it instead of the manifest."""
    header: dict[str, Any] = {"__metadata__": signed(fields if sign is None else sign)}
    end = 0
    for name, code, shape, _ in order(fields):
        nbytes = math.prod(shape) * ITEMSIZES.get(code, 1)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return header


def checkpoint(path: Path, fields: Any, data: dict[str, bytes], header: Any = None) -> Path:
    """A checkpoint of this manifest and these tensors, or with another header."""
    payload = b"".join(data[tensor[0]] for tensor in order(fields))
    return write(path, text(header_of(fields) if header is None else header).encode(), payload)


def honest() -> tuple[dict[str, Any], dict[str, bytes]]:
    """A manifest without a lie, of a packed and of a dense leaf, and its tensors."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    record, data = packed()
    return manifest(record, leaf("a", array)), data | {"a": array.tobytes()}


def with_header(folder: Path, change: Change) -> Path:
    """The honest file, its header changed in place by `change`."""
    fields, data = honest()
    header = header_of(fields)
    change(header)
    return checkpoint(folder / "m.safetensors", fields, data, header)


def with_manifest(folder: Path, change: Change) -> Path:
    """The honest file, its manifest changed in place by `change`, rightly signed, the header as honest."""
    fields, data = honest()
    header = header_of(fields)
    change(fields)
    header["__metadata__"] = signed(fields)
    return checkpoint(folder / "m.safetensors", honest()[0], data, header)


def consistent(folder: Path, change: Change) -> Path:
    """The same, with the header that the changed manifest asks for."""
    fields, data = honest()
    change(fields)
    return checkpoint(folder / "m.safetensors", fields, data)
