"""The header of a safetensors file, which its manifest implies to the last byte.

Nothing in a header is believed, and it is not even parsed: the manifest that it begins with has a checksum, and the
rest is written again from the manifest and compared. So names, dtypes, shapes and places of all tensors are right, or
the file is refused.
"""

from collections.abc import Iterator

from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, BTCNotCompressedError
from btc_jax.checkpoint.manifest import Manifest, Tensor, parse_manifest
from btc_jax.checkpoint.text import FORMAT, MAX_TEXT, open_signed, quoted, signed

_PREFIX = '{"__metadata__":{'
START = f'{_PREFIX}"{FORMAT}"'.encode()
"""What the header of each of our files begins with."""


def header_of(manifest: Manifest, text: str | None = None) -> bytes:
    """The header of a file with this manifest, filled up with spaces to a multiple of 8 bytes.

    Args:
        text: `manifest.text()`, where that is known.

    Raises:
        ValueError: there are too many leaves for one file.
    """
    entries = ",".join(entry for _, entry in _entries(manifest))
    metadata = signed(manifest.text() if text is None else text)
    header = f"{_PREFIX}{metadata}}}{',' * bool(entries)}{entries}}}".encode()
    if len(header) > MAX_TEXT:
        raise ValueError(
            f"{len(manifest.leaves):,} leaves need a header of {len(header):,} bytes, more than {MAX_TEXT:,}; "
            "split the file with max_shard_bytes"
        )
    return header + b" " * (-len(header) % 8)


def parse_header(header: bytes, data_bytes: int, what: str) -> tuple[Manifest, str]:
    """The manifest of a file with this header and so many bytes after it, checked in full; and its text.

    Raises:
        BTCFormatError, BTCIntegrityError: the header does not say what the manifest implies, or is damaged.
    """
    if START not in header[:64]:
        raise BTCNotCompressedError(f"{what} has no btc_jax manifest, so it is not a compressed checkpoint")
    fields, text, end = open_signed(header, _PREFIX, what)
    manifest = parse_manifest(fields, what)
    _check_entries(manifest, header, end, what)
    expected = sum(tensor.nbytes for leaf in manifest.leaves for tensor in leaf.tensors)
    if expected != data_bytes:
        raise BTCFormatError(f"{what} holds {data_bytes} bytes of data; its manifest says {expected}; it is truncated")
    return manifest, text


def places_of(manifest: Manifest) -> dict[str, int]:
    """Where each tensor begins, in bytes after the header, by name."""
    places, end = {}, 0
    for tensor in manifest.tensors():
        places[tensor.name] = end
        end += tensor.nbytes
    return places


def _entries(manifest: Manifest) -> Iterator[tuple[Tensor, str]]:
    """Each tensor and its entry in the header."""
    end = 0
    for tensor in manifest.tensors():
        begin, end = end, end + tensor.nbytes
        shape = ",".join(map(str, tensor.shape))
        offsets = f'"data_offsets":[{begin},{end}]'
        yield tensor, f'{quoted(tensor.name)}:{{"dtype":"{tensor.code}","shape":[{shape}],{offsets}}}'


def _check_entries(manifest: Manifest, header: bytes, end: int, what: str) -> None:
    """Compares all that follows the signed manifest, which ends at `end`, with what it implies."""
    position = end + 1
    if header[end:position] != b"}":
        raise BTCIntegrityError(f"{what}: the header has other metadata than its manifest; it is damaged or forged")
    for tensor, entry in _entries(manifest):
        expected = f",{entry}".encode()
        if not header.startswith(expected, position):
            found = header[position : position + len(expected)].decode("ascii", "replace")
            raise BTCIntegrityError(
                f"{what}: the header has {found[:150]!r}, where its manifest asks for {entry[:150]!r} "
                f"(tensor {tensor.name[:60]!r}); the file is damaged or forged"
            )
        position += len(expected)
    if header[position:] != b"}" + b" " * (-(position + 1) % 8):
        raise BTCIntegrityError(f"{what}: the header has more than its manifest asks for; it is damaged or forged")
