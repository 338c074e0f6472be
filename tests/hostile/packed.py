"""Invalid packed leaves, and invalid codecs."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.forge import SEAL, UNIFORM, checkpoint, consistent, manifest, packed, packed_format, uniform

FILE = "m.safetensors"


def unknown_codec(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(id="../../evil"))


def codec_with_unknown_field(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(rounds=3))


def codec_of_huge_blocks(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(block_size=2**62))


def codec_of_blocks_beyond_numbers(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(block_size=10**400))


def codec_with_a_threshold(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(threshold=0.05))


def codec_widths_as_text(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(widths="48"))


def codec_widths_falling(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(widths=[8, 4]))


def codec_of_many_widths(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(widths=[4, 8] * 10**5))


def codec_without_wide(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(widths=[8]))


def codec_of_other_bits(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(widths=[3, 8]))


def codec_bits_true(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0]["codec"].update(widths=[True, 8]))


def _packed(folder: Path, data: bytes, shape: Any = (8,), codec: Any = None) -> Path:
    """A file with one packed leaf of these bytes."""
    fields = manifest([packed_format(codec)], [packed(data, shape)])
    return checkpoint(folder / FILE, fields, {"w": data})


def packed_shape_too_large(folder: Path) -> Path:
    return _packed(folder, uniform(), [2**40])


def packed_shape_too_small(folder: Path) -> Path:
    return _packed(folder, uniform(), [4])


def packed_bytes_too_many(folder: Path) -> Path:
    return _packed(folder, uniform() + b"\0")


def packed_bytes_too_few(folder: Path) -> Path:
    return _packed(folder, uniform()[:-1])


def packed_bytes_of_nothing(folder: Path) -> Path:
    return _packed(folder, b"")


def packed_bytes_of_a_seal(folder: Path) -> Path:
    return _packed(folder, SEAL)


def seal_of_zeros(folder: Path) -> Path:
    return _packed(folder, uniform(seal=bytes(4)))


def seal_turned_round(folder: Path) -> Path:
    return _packed(folder, uniform(seal=SEAL[::-1]))


def seal_missing(folder: Path) -> Path:
    return _packed(folder, uniform(seal=b""))


def widths_that_ask_for_more_rows(folder: Path) -> Path:
    return _packed(folder, uniform(wide=(1, 0)).replace(bytes([1, 1, 2, 3, 4]), bytes([3, 1, 2, 3, 4])))


def widths_that_ask_for_fewer_rows(folder: Path) -> Path:
    return _packed(folder, uniform(wide=(1, 0)).replace(bytes([1, 1, 2, 3, 4]), bytes([0, 1, 2, 3, 4])))


def plane_missing(folder: Path) -> Path:
    return _packed(folder, uniform(plane1=b""))


def plane_of_wider_words(folder: Path) -> Path:
    return _packed(folder, uniform(plane0=bytes(8)))


def plane_too_many(folder: Path) -> Path:
    return _packed(folder, uniform(plane2=b"\1"))


def header_missing(folder: Path) -> Path:
    return _packed(folder, uniform(minimum=b""))


def header_of_other_floats(folder: Path) -> Path:
    return _packed(folder, uniform(minimum=np.full(2, -1, np.float32).tobytes()))


def many_leaves_of_other_codecs(folder: Path) -> Path:
    """Each would be slow if a codec had to be compiled to know what it stores. The last one is invalid."""
    formats, records, payload = [], [], {}
    for i in range(3000):
        size, last = 8 + i, b"\0" if i == 2999 else b""
        data = SEAL + np.full(2, -1, np.float16).tobytes() + bytes((size + 1) // 2) + last
        formats.append(packed_format(UNIFORM | {"block_size": size, "widths": [4]}, "stored"))
        records.append(packed(data, [size], i, f"w{i}"))
        payload[f"w{i}"] = data
    return checkpoint(folder / FILE, manifest(formats, records), payload)
