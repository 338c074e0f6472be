"""The text of a file: what is stored for each leaf, and the one header that says so. No file is touched here.

Nothing in a header is believed. The manifest has a checksum, and from it the whole header is built anew and compared
with the one in the file; so names, dtypes, shapes and places of all tensors are right, or the file is refused.
"""

import dataclasses
import json
import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, BTCNotCompressedError, refusing
from btc_jax.checkpoint.files import crc32c

FORMAT = "btc_jax"
VERSION = 1
MAX_HEADER = 4 * 2**20
"""Bytes of a header: some 4,000 packed leaves. Larger trees go into several files."""

MAX_DIMENSIONS = 32

CODES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"},
    **{"float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
}
"""safetensors' names of dtypes. Any other is stored as U8, with the bytes of an element as last axis."""

_DTYPES = {code: jnp.dtype(name) for name, code in CODES.items()}

_DTYPE = re.compile(r"[a-z]+[0-9a-z_]*|key<[0-9a-z_]+>")
KINDS = ("packed", "dense", "key", "python")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file."""

    name: str
    code: str
    shape: tuple[int, ...]
    crc32c: str

    @property
    def numpy_dtype(self) -> np.dtype:
        return _DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """What is stored for one leaf.

    Attributes:
        path: the leaf's path.
        kind: `packed`, `dense` (an array), `key` (typed PRNG keys) or `python` (a number or text of Python).
        shape, dtype: of the leaf.
        tensors: its tensors, in the order in which they are stored.
        details: codec and order of a packed leaf, `impl` of keys, `value` of what is Python's.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[Tensor, ...]
    details: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        tensors = [[t.name, t.code, t.shape, t.crc32c] for t in self.tensors]
        fields = {"path": self.path, "kind": self.kind, "shape": self.shape, "dtype": self.dtype, "tensors": tensors}
        return fields | self.details


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The leaves of one file, and the containers they stand in (`None` where an index of several files has them)."""

    tree: Any
    leaves: tuple[LeafRecord, ...]

    def text(self) -> str:
        return canonical({"version": VERSION, "tree": self.tree, "leaves": [leaf.to_json() for leaf in self.leaves]})

    def tensors(self) -> list[Tensor]:
        """All tensors in the order of the file: the widest first, so that each lies on a multiple of its size."""
        return sorted((t for leaf in self.leaves for t in leaf.tensors), key=lambda t: -t.numpy_dtype.itemsize)

    def places(self) -> dict[str, int]:
        """Where each tensor begins, in bytes after the header."""
        places, end = {}, 0
        for tensor in self.tensors():
            places[tensor.name] = end
            end += tensor.nbytes
        return places

    def header(self) -> bytes:
        """The JSON header of the safetensors file, filled up with spaces to a multiple of 8 bytes.

        Raises:
            ValueError: two leaves have the same name, or there are too many for one file.
        """
        places, tensors = self.places(), self.tensors()
        if len(places) < len(tensors) or "__metadata__" in places:
            raise ValueError("two leaves of the tree have the same path, or one has the path __metadata__; rename it")
        metadata = signed(self.text())
        entries = {
            t.name: {"dtype": t.code, "shape": t.shape, "data_offsets": [places[t.name], places[t.name] + t.nbytes]}
            for t in tensors
        }
        header = canonical({"__metadata__": metadata} | entries).encode()
        if len(header) > MAX_HEADER:
            raise ValueError(
                f"{len(self.leaves)} leaves need a header of {len(header):,} bytes, more than {MAX_HEADER:,}; "
                "split the file with max_shard_bytes"
            )
        return header + b" " * (-len(header) % 8)


def canonical(value: Any) -> str:
    """The one way in which a value is written as JSON here."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def signed(text: str) -> dict[str, str]:
    """A manifest with its checksum, as safetensors metadata."""
    return {FORMAT: text, f"{FORMAT}_crc32c": crc32c(text.encode())}


def parse_json(data: bytes, what: str) -> Any:
    """JSON of which nothing is believed yet.

    Raises:
        BTCFormatError: it is no JSON, too deep, or has a key twice.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise BTCFormatError(f"{what} is no valid JSON: {str(error)[:200]}") from error


def open_signed(metadata: Any, what: str) -> Any:
    """The manifest in signed metadata.

    Raises:
        BTCFormatError: there is none, or of another version.
        BTCIntegrityError: its checksum is wrong.
    """
    if not isinstance(metadata, dict) or not isinstance(metadata.get(FORMAT), str):
        raise BTCNotCompressedError(f"{what} has no btc_jax manifest, so it is not a compressed checkpoint")
    text = metadata[FORMAT]
    try:
        stored = crc32c(text.encode())
    except UnicodeEncodeError as error:
        raise BTCFormatError(f"{what}: the manifest is no valid text: {error.reason}") from error
    if metadata.get(f"{FORMAT}_crc32c") != stored:
        raise BTCIntegrityError(f"{what}: the manifest does not match its checksum; the file is damaged")
    manifest = parse_json(text.encode(), f"{what}: the manifest")
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise BTCFormatError(f"{what} has no format version; this btc_jax reads version {VERSION}")
    if version != VERSION:
        raise BTCFormatError(f"{what} has format version {str(version)[:20]}; this btc_jax reads version {VERSION}")
    return manifest


def parse_header(header: bytes, data_bytes: int, what: str) -> Manifest:
    """The manifest of a file with this header and so many bytes after it, checked in full.

    Raises:
        BTCFormatError, BTCIntegrityError: the header does not say what the manifest implies, or is damaged.
    """
    entries = parse_json(header, f"{what}: the header")
    fields = open_signed(entries.get("__metadata__") if isinstance(entries, dict) else None, what)
    manifest = parse_manifest(fields, what)
    with refusing(f"{what}: the manifest"):
        if manifest.header() != header:
            raise BTCIntegrityError(f"{what}: {_first_difference(manifest, entries)}; the file is damaged or forged")
    expected = sum(tensor.nbytes for tensor in manifest.tensors())
    if expected != data_bytes:
        raise BTCFormatError(f"{what} holds {data_bytes} bytes of data; its manifest says {expected}; it is truncated")
    return manifest


def parse_manifest(fields: dict[str, Any], what: str) -> Manifest:
    try:
        with refusing("the manifest"):
            return Manifest(fields["tree"], tuple(_leaf(leaf) for leaf in fields["leaves"]))
    except BTCFormatError as error:
        raise BTCFormatError(f"{what}: {error}") from error


def _leaf(fields: dict[str, Any]) -> LeafRecord:
    details = dict(fields)
    path, kind, shape, dtype, tensors = (details.pop(name) for name in ("path", "kind", "shape", "dtype", "tensors"))
    check_path(path)
    error = details.get("error", {})
    if not isinstance(error, dict) or not all(value is None or type(value) is float for value in error.values()):
        raise BTCFormatError(f"leaf {path!r} has malformed errors, {str(error)[:60]}")
    if kind not in KINDS or not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise BTCFormatError(f"leaf {path!r} is of the unknown kind {str(kind)[:20]!r}")
    return LeafRecord(path, kind, _shape(shape, path), dtype, tuple(_tensor(t, path) for t in tensors), details)


def check_path(path: Any) -> None:
    """Refuses paths that would be dangerous if somebody took them for files."""
    text = isinstance(path, str) and not any("\ud800" <= c <= "\udfff" for c in path)
    if not text or "\0" in path or path.startswith("/") or ".." in path.split("/"):
        raise BTCFormatError(f"a leaf has the path {str(path)[:60]!r}; absolute paths, '..' and NUL are not allowed")


def _tensor(fields: Any, path: str) -> Tensor:
    name, code, shape, crc = fields
    if not isinstance(name, str) or code not in _DTYPES or not isinstance(crc, str) or len(crc) != 8:
        raise BTCFormatError(f"leaf {path!r} has a malformed tensor, {str((name, code, crc))[:80]}")
    if name != path and not name.startswith(f"{path}#"):
        raise BTCFormatError(f"leaf {path!r} has the tensor {name[:60]!r} of another leaf")
    return Tensor(name, code, _shape(shape, path), crc)


def _shape(shape: Any, path: str) -> tuple[int, ...]:
    fits = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
    if not fits or math.prod(max(n, 1) for n in shape) >= 2**48:
        raise BTCFormatError(f"leaf {path!r} has the impossible shape {str(shape)[:60]}")
    return tuple(shape)


def _first_difference(manifest: Manifest, entries: dict[str, Any]) -> str:
    places = manifest.places()
    for t in manifest.tensors():
        place = [places[t.name], places[t.name] + t.nbytes]
        expected = {"dtype": t.code, "shape": list(t.shape), "data_offsets": place}
        if entries.get(t.name) != expected:
            return f"tensor {t.name!r} is {str(entries.get(t.name))[:100]} in the header, {expected} in the manifest"
    extra = sorted(entries.keys() - places.keys() - {"__metadata__"})
    return f"the header has the tensor {extra[0]!r}, the manifest has not" if extra else "the header is not as written"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:60]!r} stands there twice")
        result[key] = value
    return result


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
