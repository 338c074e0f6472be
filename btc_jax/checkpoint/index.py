"""The index of a checkpoint in several files: which they are, and the tree of all their leaves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, BTCNotCompressedError
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.manifest import MAX_LEAVES, Manifest
from btc_jax.checkpoint.text import FORMAT, MAX_PARSED, MAX_TEXT, VERSION, canonical, open_signed, parsed_nbytes, signed

SUFFIX = ".safetensors"
MAX_SHARDS = 4096
MAX_HEADERS = 2 * MAX_TEXT
"""Bytes of the headers of all files of one checkpoint."""

_PREFIX = '{"metadata":{'


def index_of(path: Path) -> Path:
    """The index of a checkpoint in several files."""
    return path if path.name.endswith(".index.json") else path.parent / f"{path.name}.index.json"


def index_text(tree: Any, shards: Sequence[tuple[str, Manifest, str]]) -> str:
    """The index of several files: our signed manifest of tree and files, and Hugging Face's `weight_map`.

    Args:
        shards: name, manifest and text of the manifest of each file.
    """
    listed = [[name, crc32c(text.encode()), len(manifest.leaves)] for name, manifest, text in shards]
    metadata = signed(canonical({"version": VERSION, "tree": tree, "shards": listed}))
    tensors = [(tensor, name) for name, manifest, _ in shards for tensor in manifest.tensors()]
    size = sum(tensor.nbytes for tensor, _ in tensors)
    homes = canonical({tensor.name: name for tensor, name in tensors})
    return f'{_PREFIX}{metadata},"total_size":{size}}},"weight_map":{homes}}}'


def parse_index(data: bytes, path: Path) -> tuple[Any, list[tuple[str, str, int]]]:
    """The tree of an index, and name, checksum and number of leaves of each of its files.

    Raises:
        BTCFormatError, BTCIntegrityError: if it is not an index of ours, or damaged.
    """
    if f'{_PREFIX}"{FORMAT}"'.encode() not in data[:64]:
        raise BTCNotCompressedError(f"{path} has no btc_jax manifest, so it is not of a compressed checkpoint")
    fields, _, _ = open_signed(data, _PREFIX, str(path))
    if list(fields) != ["version", "tree", "shards"]:
        raise BTCFormatError(f"{path}: the manifest has the fields {str(list(fields))[:100]}")
    return fields["tree"], _listed(fields["shards"], path)


class Limits:
    """What all files of a checkpoint may take together; the same when they are written and when they are read."""

    def __init__(self, what: Any):
        self._what, self.headers, self._parsed, self._leaves = what, 0, 0, 0

    def add(self, header_bytes: int, text: str, leaves: int) -> None:
        """Counts one more file.

        Raises:
            BTCFormatError: if together they are too many.
        """
        self.headers, self._parsed = self.headers + header_bytes, self._parsed + parsed_nbytes(text)
        self._leaves += leaves
        if self.headers > MAX_HEADERS or self._parsed > MAX_PARSED or self._leaves > MAX_LEAVES:
            raise BTCFormatError(
                f"{self._what}: more than {MAX_LEAVES:,} leaves, or headers of {MAX_HEADERS:,} bytes; save parts of "
                "the tree apart"
            )


def check_index(data: bytes, tree: Any, shards: Sequence[tuple[str, Manifest, str]], path: Path) -> None:
    """Refuses an index that does not say what its files hold.

    Raises:
        BTCIntegrityError: if it does not match.
    """
    if index_text(tree, shards).encode() != data:
        raise BTCIntegrityError(f"{path} does not say what its files hold; it is damaged or forged")


def _listed(shards: Any, path: Path) -> list[tuple[str, str, int]]:
    if not isinstance(shards, list) or not all(isinstance(entry, list) and len(entry) == 3 for entry in shards):
        raise BTCFormatError(f"{path}: its list of files is malformed")
    if len(shards) > MAX_SHARDS or len({str(name) for name, _, _ in shards}) < len(shards):
        raise BTCFormatError(f"{path} names a file twice, or more than {MAX_SHARDS} files")
    for name, crc, count in shards:
        plain = isinstance(name, str) and Path(name).name == name and name.endswith(SUFFIX)
        if not plain or "\0" in name or not isinstance(crc, str) or type(count) is not int:
            raise BTCFormatError(f"{path} names the file {str(name)[:60]!r}, which is not one in its own folder")
    return [(name, crc, count) for name, crc, count in shards]
