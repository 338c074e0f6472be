"""The header of a safetensors file, which its manifest implies to the last byte.

A header is not trusted, nor even parsed: the manifest that it begins with has a checksum, and the rest is written again
from the manifest and compared. So names, dtypes, shapes and places of all tensors are right, or the file is refused.
"""

from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, BTCNotCompressedError
from btc_jax.checkpoint.manifest import Manifest, parse_manifest
from btc_jax.checkpoint.record import Tensor
from btc_jax.checkpoint.text import FORMAT, MAX_TEXT, open_signed, quoted, signed

_PREFIX = '{"__metadata__":{'
START = f'{_PREFIX}"{FORMAT}"'.encode()
"""What the header of each of our files begins with."""


def header_of(manifest: Manifest, text: str | None = None) -> bytes:
    """The header of a file with this manifest, filled up with spaces to a multiple of 8 bytes.

    Args:
        text: `manifest.text()`, where that is known.

    Raises:
        ValueError: if there are too many leaves for one file.
    """
    entries = ",".join(_entry(*place) for place in manifest.places())
    metadata = signed(manifest.text() if text is None else text)
    header = f"{_PREFIX}{metadata}}}{',' * bool(entries)}{entries}}}".encode()
    if len(header) > MAX_TEXT:
        raise ValueError(
            f"{len(manifest.leaves):,} leaves need a header of {len(header):,} bytes, more than {MAX_TEXT:,}; "
            "split the file with max_shard_bytes"
        )
    return header + b" " * (-len(header) % 8)


def parse_header(header: bytes, data_bytes: int, what: str) -> tuple[Manifest, str, dict[str, int]]:
    """The manifest of a file with this header and so many bytes after it, checked in full.

    Returns:
        The manifest, its text, and where each tensor begins in the data, by name.

    Raises:
        BTCFormatError, BTCIntegrityError: if the header does not say what the manifest implies, or is damaged.
    """
    if START not in header[:64]:
        raise BTCNotCompressedError(f"{what} has no btc_jax manifest, so it is not a compressed checkpoint")
    fields, text, position = open_signed(header, _PREFIX, what)
    manifest, places, end = parse_manifest(fields, what), {}, 0
    if header[position : position + 1] != b"}":
        raise BTCIntegrityError(f"{what}: the header has other metadata than its manifest; it is damaged or forged")
    position += 1
    for tensor, begin, end in manifest.places():
        places[tensor.name] = begin
        position = _after(header, position, _entry(tensor, begin, end), what)
    if header[position:] != b"}" + b" " * (-(position + 1) % 8):
        raise BTCIntegrityError(f"{what}: the header has more than its manifest asks for; it is damaged or forged")
    if end != data_bytes:
        raise BTCFormatError(f"{what} holds {data_bytes} bytes of data; its manifest says {end}; it is truncated")
    return manifest, text, places


def _entry(tensor: Tensor, begin: int, end: int) -> str:
    """The entry of a tensor in the header."""
    shape = ",".join(map(str, tensor.shape))
    return f'{quoted(tensor.name)}:{{"dtype":"{tensor.code}","shape":[{shape}],"data_offsets":[{begin},{end}]}}'


def _after(header: bytes, position: int, entry: str, what: str) -> int:
    """The position after an entry, which must be the one that the manifest implies."""
    expected = f",{entry}".encode()
    if not header.startswith(expected, position):
        found = header[position : position + len(expected)].decode("ascii", "replace")
        raise BTCIntegrityError(
            f"{what}: the header has {found[:200]!r} where its manifest asks for {entry[:200]!r}; damaged or forged"
        )
    return position + len(expected)
