"""The manifest of a file: what is stored for each leaf, and the containers they stand in. No file is touched here.

A manifest is `{"version", "formats", "tree", "leaves"}`. What many leaves have in common, such as their codec, is
listed once in `formats`; a leaf is a short list that begins with its path and the number of its format.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from btc_jax.checkpoint.dtypes import CODES as CODES
from btc_jax.checkpoint.dtypes import DTYPES, dtype_of
from btc_jax.checkpoint.errors import BTCFormatError, refusing
from btc_jax.checkpoint.record import FIELDS, LeafRecord, Tensor
from btc_jax.checkpoint.text import FORMAT as FORMAT
from btc_jax.checkpoint.text import VERSION, canonical
from btc_jax.pieces import MAX_PIECES
from btc_jax.seal import SEAL

MAX_LEAVES = 2**17
MAX_DIMENSIONS = 32

_DTYPE = re.compile(r"[a-z]+[0-9a-z_]*|key<[0-9a-z_]+>")
_CHECKSUM = re.compile(r"[0-9a-f]{8}")
_NO_CHECKSUM = "0" * 8


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The leaves of one file, and the containers they stand in (`None` where an index of several files has them)."""

    tree: Any
    leaves: tuple[LeafRecord, ...]

    def text(self) -> str:
        texts: dict[Any, str] = {}  # by identity: most leaves share the values that make their format
        numbers: dict[str, int] = {}
        leaves = []
        for leaf in self.leaves:
            same = (leaf.kind, leaf.dtype, *(id(leaf.details[name]) for name in FIELDS[leaf.kind]))
            text = texts.get(same) or texts.setdefault(same, canonical(leaf.format))
            leaves.append(leaf.to_json(numbers.setdefault(text, len(numbers))))
        rest = canonical({"tree": self.tree, "leaves": leaves})
        return f'{{"version":{VERSION},"formats":[{",".join(numbers)}],{rest[1:]}'

    def tensors(self) -> list[Tensor]:
        """All tensors in the order of the file: the widest first, so that each lies on a multiple of its size."""
        return sorted((t for leaf in self.leaves for t in leaf.tensors), key=lambda t: -DTYPES[t.code].itemsize)

    def places(self) -> Iterator[tuple[Tensor, int, int]]:
        """Each tensor, with where it begins and ends, in bytes after the header."""
        end = 0
        for tensor in self.tensors():
            begin, end = end, end + tensor.nbytes
            yield tensor, begin, end


def parse_manifest(fields: dict[str, Any], what: str) -> Manifest:
    """The manifest with these fields, all checked. It empties them as it goes, to save memory.

    Raises:
        BTCFormatError: if they do not fit.
    """
    with refusing(f"{what}: the manifest"):
        if list(fields) != ["version", "formats", "tree", "leaves"]:
            raise BTCFormatError(f"{what}: the manifest has the fields {str(list(fields))[:100]}")
        formats, written = [_checked_format(entry) for entry in fields["formats"]], fields["leaves"]
        if not isinstance(written, list) or len(written) > MAX_LEAVES:
            raise BTCFormatError(f"{what}: the manifest has more than {MAX_LEAVES:,} leaves, or not a list of them")
        _check_numbers([entry[1] for entry in written], formats)
        written.reverse()
        return Manifest(fields["tree"], tuple(_leaf(written.pop(), formats) for _ in range(len(written))))


def check_path(path: Any) -> None:
    """Refuse paths that would be dangerous if they were mistaken for files.

    Raises:
        BTCFormatError: if it is such a path, or not text.
    """
    fits = isinstance(path, str) and "\0" not in path and not path.startswith("/") and path != "__metadata__"
    if not fits or (".." in path and ".." in path.split("/")) or not (path.isascii() or _encodable(path)):
        raise BTCFormatError(
            f"a leaf has the path {str(path)[:60]!a}; absolute paths, '..', NUL and '__metadata__' are not allowed"
        )


def check_shape(shape: Any, path: str) -> tuple[int, ...]:
    """A shape that an array can have.

    Raises:
        BTCFormatError: if it is not one.
    """
    size = 1 if isinstance(shape, list | tuple) and len(shape) <= MAX_DIMENSIONS else 2**48
    for n in shape if size == 1 else ():
        size *= (n or 1) if type(n) is int and n >= 0 else 2**48
    if size >= 2**48:
        raise BTCFormatError(f"leaf {path!r} has the impossible shape {str(shape)[:60]}")
    return tuple(shape)


def dense_tensor(path: str, shape: Sequence[int], dtype: str, crc: str = _NO_CHECKSUM) -> Tensor:
    """The tensor of a dense leaf."""
    if dtype in CODES:
        return Tensor(path, CODES[dtype], tuple(shape), crc)
    return Tensor(path, "U8", (*shape, dtype_of(dtype).itemsize), crc)


def packed_tensor(path: str, nbytes: int, crc: str = _NO_CHECKSUM) -> Tensor:
    """The tensor of a packed leaf."""
    return Tensor(path, "U8", (nbytes,), crc)


def key_tensor(path: str, shape: Sequence[int], words: Sequence[int], crc: str = _NO_CHECKSUM) -> Tensor:
    """The tensor of typed PRNG keys."""
    return Tensor(path, "U32", (*shape, *words), crc)


def error_of_list(values: Sequence[float | None]) -> dict[str, float | None]:
    """The errors of a packed leaf by name, from those that its record has."""
    rmse, relative, largest = values
    decibels = -20 * math.log10(relative) if relative else None
    return {"rmse": rmse, "relative_rmse": relative, "sqnr_db": decibels, "largest_error": largest}


def _checked_format(fields: Any) -> dict[str, Any]:
    kind, dtype = (fields.get("kind"), fields.get("dtype")) if isinstance(fields, dict) else (None, None)
    if kind not in FIELDS or list(fields) != ["kind", "dtype", *FIELDS[kind]]:
        raise BTCFormatError(f"a leaf is of the unknown kind {str(fields)[:60]}")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise BTCFormatError(f"a leaf has the unknown dtype {str(dtype)[:60]!a}")
    if kind == "key":
        check_shape(fields["words"], "of a key")
    return fields


def _leaf(fields: Any, formats: list[dict[str, Any]]) -> LeafRecord:
    path, number, *rest = fields
    check_path(path)
    if type(number) is not int or not 0 <= number < len(formats):
        raise BTCFormatError(f"leaf {path!r} is of the unknown format {str(number)[:20]}")
    return _KINDS[formats[number]["kind"]](path, formats[number], *rest)


def _dense(path: str, how: dict[str, Any], shape: Any, crc: Any, *origin: Any) -> LeafRecord:
    shape, more = check_shape(shape, path), {}
    if origin:
        (written,) = origin
        dtype, stored = written
        if not isinstance(dtype, str) or len(dtype) > 64:
            raise BTCFormatError(f"leaf {path!r} has a malformed origin, {str(written)[:60]}")
        more = {"origin": [dtype, list(check_shape(stored, path))]}
    tensor = dense_tensor(path, shape, how["dtype"], _checksum(crc, path))
    return LeafRecord(path, "dense", shape, how["dtype"], (tensor,), more)


def _key(path: str, how: dict[str, Any], shape: Any, crc: Any) -> LeafRecord:
    shape = check_shape(shape, path)
    tensor = key_tensor(path, shape, how["words"], _checksum(crc, path))
    check_shape(tensor.shape, path)
    return LeafRecord(path, "key", shape, how["dtype"], (tensor,), {"impl": how["impl"], "words": how["words"]})


def _packed(
    path: str, how: dict[str, Any], shape: Any, crc: Any, nbytes: Any, error: Any = None, *cut: Any
) -> LeafRecord:
    if type(nbytes) is not int or not 0 <= nbytes < 2**48:
        raise BTCFormatError(f"leaf {path!r} has {str(nbytes)[:60]} bytes")
    details = {"codec": how["codec"], "order": how["order"]}
    if error is not None:
        details["error"] = _error(error, path)
    if cut:
        details["cut"] = _cut(cut, check_shape(shape, path), nbytes, path)
    tensor = packed_tensor(path, nbytes, _checksum(crc, path))
    return LeafRecord(path, "packed", check_shape(shape, path), how["dtype"], (tensor,), details)


def _cut(cut: Sequence[Any], shape: tuple[int, ...], nbytes: int, path: str) -> list[list[int]]:
    """Validated numbers of pieces and axes of stacks of a leaf of this shape."""
    pieces, stacks = cut
    numbers = all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in (pieces, stacks))
    fits = numbers and len(pieces) == len(shape) and len(set(stacks)) == len(stacks)
    fits = fits and all(axis < len(shape) and pieces[axis] == shape[axis] for axis in stacks)
    # Every piece has a seal, so few bytes cannot claim many pieces.
    fits = fits and all(n and size % n == 0 for n, size in zip(pieces, shape, strict=True))
    if not fits or math.prod(pieces) > min(nbytes // SEAL.nbytes, MAX_PIECES):
        raise BTCFormatError(
            f"leaf {path!r} is cut into {str(pieces)[:60]} pieces, {str(stacks)[:60]}, which cannot be"
        )
    return [pieces, stacks]


def _error(values: Any, path: str) -> dict[str, float | None]:
    for value in values:
        if value is not None and not (type(value) is float and value >= 0):
            raise BTCFormatError(f"leaf {path!r} has malformed errors, {str(values)[:60]}")
    return error_of_list(values)


def _python(path: str, how: dict[str, Any], value: Any) -> LeafRecord:
    return LeafRecord(path, "python", (), how["dtype"], (), {"value": value})


def _tied(path: str, how: dict[str, Any], shape: Any, of: Any) -> LeafRecord:
    check_path(of)
    return LeafRecord(path, "tied", check_shape(shape, path), how["dtype"], (), {"of": of})


_KINDS = {"packed": _packed, "dense": _dense, "key": _key, "python": _python, "tied": _tied}


def _check_numbers(numbers: list[Any], formats: list[dict[str, Any]]) -> None:
    """Refuses formats that are not listed once each, in the order of the leaves that have them."""
    texts = {canonical(entry) for entry in formats}
    if list(dict.fromkeys(numbers)) != list(range(len(formats))) or len(texts) < len(formats):
        raise BTCFormatError("its formats are not those of its leaves, in their order")


def _checksum(crc: Any, path: str) -> str:
    if not isinstance(crc, str) or not _CHECKSUM.fullmatch(crc):
        raise BTCFormatError(f"leaf {path!r} has a malformed checksum, {str(crc)[:60]!a}")
    return crc


def _encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False
