"""JSON in files: its canonical form, and a bound on the memory that reading it takes.

A JSON text of a few megabytes can become gigabytes of small Python objects. So its parts are counted before it is
parsed, and after it was parsed it is written again and compared: anything ambiguous in JSON, such as a repeated key,
spaces, or another form of a number, makes a different text, and is refused.
"""

import json
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue]
from json.encoder import encode_basestring_ascii
from typing import Any

from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError
from btc_jax.checkpoint.files import crc32c

FORMAT = "btc_jax"
VERSION = 1

MAX_TEXT = 32 * 2**20
"""Bytes of the header of a file, and of an index: over 100,000 leaves."""
MAX_PARSED = 192 * 10**6
"""Bytes that the manifests of a checkpoint may take in memory."""

_COSTS = {"[": 100, "{": 250, '"': 30, ",": 50, ":": 50}
"""Bytes of the Python objects that a character of JSON stands for, at most: a list, a dict, half a text, an item."""

quoted = encode_basestring_ascii
"""A text in canonical JSON."""


def canonical(value: Any) -> str:
    """A value in canonical JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parsed_nbytes(text: str) -> int:
    """Bytes that a JSON text takes at most while it is parsed and compared.

    Examples:
        >>> parsed_nbytes('["a",1]')
        231
    """
    return 3 * len(text) + sum(cost * text.count(character) for character, cost in _COSTS.items())


def parse(text: str, what: str) -> Any:
    """The value of a canonical JSON text that is not trusted.

    Raises:
        BTCFormatError: if it is not canonical JSON, too deep, or of too many parts.
    """
    if parsed_nbytes(text) > MAX_PARSED:
        raise BTCFormatError(f"{what} has {len(text):,} characters of too many parts; it is damaged or forged")
    try:
        value = json.loads(text)
        same = canonical(value) == text
    except (ValueError, RecursionError) as error:
        raise BTCFormatError(f"{what} is not valid JSON: {str(error)[:200]}") from error
    if not same:
        raise BTCFormatError(f"{what} is not canonical JSON, or has a key twice; it is damaged or forged")
    return value


def signed(text: str) -> str:
    """A manifest and its checksum, as they begin the JSON object of safetensors metadata."""
    return f'"{FORMAT}":{quoted(text)},"{FORMAT}_crc32c":"{crc32c(text.encode())}"'


def open_signed(header: bytes, prefix: str, what: str) -> tuple[dict[str, Any], str, int]:
    """The manifest that a header begins with, after `prefix`: its fields, its text, and where its signature ends.

    Raises:
        BTCFormatError: if there is none, or of another version.
        BTCIntegrityError: if its checksum is wrong.
    """
    start = f'{prefix}"{FORMAT}":"'
    if not header.startswith(start.encode()):
        raise BTCFormatError(f"{what} does not begin with a btc_jax manifest; it is damaged")
    try:
        text, _ = scanstring(header.decode("ascii"), len(start), True)
        end = prefix + signed(text)
    except ValueError as error:
        raise BTCFormatError(f"{what}: the manifest is not valid text: {str(error)[:200]}") from error
    if not header.startswith(end.encode()):
        raise BTCIntegrityError(f"{what}: the manifest does not match its checksum; the file is damaged")
    return _versioned(text, what), text, len(end)


def open_metadata(data: bytes, what: str) -> dict[str, Any]:
    """The manifest in a JSON object that holds it and its checksum, and need not be canonical.

    Raises:
        BTCFormatError: if there is none, or of another version.
        BTCIntegrityError: if its checksum is wrong.
    """
    try:
        found: Any = json.loads(data) if parsed_nbytes(data.decode()) <= MAX_PARSED else None
        text, crc = found[FORMAT], found[f"{FORMAT}_crc32c"]
        stored = crc32c(text.encode())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise BTCFormatError(f"{what} does not hold a btc_jax manifest: {str(error)[:200]}") from error
    if crc != stored:
        raise BTCIntegrityError(f"{what}: the manifest does not match its checksum; it is damaged")
    return _versioned(text, what)


def _versioned(text: str, what: str) -> dict[str, Any]:
    """The fields of a manifest of a version that can be read."""
    fields = parse(text, f"{what}: the manifest")
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is not int:
        raise BTCFormatError(f"{what} has no format version; this btc_jax reads version {VERSION}")
    if version != VERSION:
        raise BTCFormatError(f"{what} has format version {str(version)[:20]}; this btc_jax reads version {VERSION}")
    return fields
