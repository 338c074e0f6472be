"""safetensors files, one or the shards of a Hugging Face index."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btc_jax.checkpoint.manifest import FORMAT
from btc_jax.large import Box
from btc_jax.leafspec import LeafSpec, Origin
from btc_jax.sources import kinds
from btc_jax.sources.base import (
    AGAIN,
    DTYPES,
    PACKED,
    Source,
    bytes_leaf,
    checked_shape,
    leaf_of,
    parse_json,
    readable,
    refuse,
)


class SafetensorsSource(Source):
    """One safetensors file, or the shards of an index. Plain reads: no page of a mapping stays in memory."""

    reads_parts = True

    def __init__(self, file: Path, shards: Sequence[Path] = ()):
        self._shards = shards
        self.places: dict[str, tuple[Path, int]] = {}
        super().__init__(file)

    @property
    def files(self) -> Sequence[Path]:
        return [self.file, *self._shards]

    def _scan(self) -> Iterator[LeafSpec]:
        for shard in self._shards or [self.file]:
            header, start = _read_header(shard)
            self.compressed |= _is_ours(header.pop("__metadata__", None))
            for leaf, offset in _placed(shard, header, start):
                self.places[leaf.path] = shard, offset
                yield leaf

    def _read(self, leaf: LeafSpec, box: Box) -> np.ndarray:
        file, offset = self.places[leaf.path]
        shape, starts = _runs(leaf.shape, box)
        values = np.empty((len(starts), math.prod(shape) // max(len(starts), 1) * leaf.dtype.itemsize), np.uint8)
        with file.open("rb", buffering=0) as stream:
            for start, run in zip(starts.tolist(), values, strict=True):
                stream.seek(offset + start * leaf.dtype.itemsize)
                if not _fill(stream, run.data):
                    raise ValueError(f"{file} ends inside of {leaf.path}: it was cut after it was opened; {AGAIN}")
        whole = values.reshape(-1).view(leaf.dtype).reshape(shape)
        return whole[*(0 if isinstance(part, int) else slice(None) for part in box), ...]


def _runs(shape: tuple[int, ...], box: Box) -> tuple[list[int], np.ndarray]:
    """The shape of a part of an array, indexed axes included with length 1, and where its weights lie: the starts of
    runs of equal length, the longest there are."""
    parts = [slice(i, i + 1) if isinstance(i, int) else i for i in box] + [slice(None)] * (len(shape) - len(box))
    ranges = [range(*part.indices(size)) for part, size in zip(parts, shape, strict=True)]
    lengths = list(map(len, ranges))
    cut = max((axis for axis, size in enumerate(shape) if lengths[axis] < size), default=0)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = [np.arange(found.start, found.stop) * stride for found, stride in zip(ranges, strides, strict=True)]
    first = [own[:1] if axis >= cut else own for axis, own in enumerate(places)]
    return lengths, functools.reduce(np.add.outer, first, np.int64(0)).reshape(-1)


def _fill(stream: Any, rest: memoryview) -> bool:
    """Reads until the memory is full; whether the file had enough."""
    while rest:
        count = stream.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True


def open_index(index: Path) -> Source:
    """The shards that an index names. Leaves of a shard that the index omits are read too."""
    text = index.read_bytes() if index.stat().st_size <= kinds.MAX_HEADER else b""
    fields = parse_json(index, text)
    shard_of = fields.get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(
            f"{index} has no weight_map from tensors to files, so it is not a safetensors index; open the file of the "
            "weights, or their folder"
        )
    shards = {name: index.parent / name for name in sorted(set(shard_of.values()))}
    for name, file in shards.items():
        if name in ("", "..") or name != Path(name).name or "\\" in name:
            raise ValueError(f"{index} names the file {name!r}, but only plain names in its own folder are followed")
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {name!r}, which is missing; put it next to the index")
        refuse(file, kinds.by_content(file))
    source = SafetensorsSource(index, list(shards.values()))
    for path, name in shard_of.items():
        if path not in source.places or source.places[path][0].name != name:
            raise ValueError(f"{index} places {path!r} in {name}, which does not hold it; download both again")
    source.compressed |= _is_ours(fields.get("metadata"))
    return source


def _is_ours(metadata: Any) -> bool:
    return isinstance(metadata, dict) and FORMAT in metadata


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, kinds.MAX_HEADER):
            raise ValueError(f"{file} is truncated or not safetensors: header {length}, file {size} bytes; {AGAIN}")
        return parse_json(file, stream.read(length)), 8 + length


def _placed(file: Path, header: dict[str, Any], start: int) -> Iterator[tuple[LeafSpec, int]]:
    """The leaves of a safetensors file with their offsets; together they must fill the file without a gap."""
    position, size = start, file.stat().st_size
    entries = sorted((_entry(file, *item) for item in header.items()), key=lambda entry: (*entry[:2], entry[2].path))
    for begin, end, leaf in entries:
        if start + begin != position or end - begin != leaf.nbytes:
            raise ValueError(f"{file}: {leaf.path} is said to lie at {begin}:{end}, which cannot be true; {AGAIN}")
        if start + end > size:
            raise ValueError(f"{file} is truncated: {leaf.path} ends at {start + end} of {size} bytes; {AGAIN}")
        yield leaf, position
        position = start + end
    if position != size:
        raise ValueError(f"{file} has {size - position} bytes that belong to no tensor; {AGAIN}")


def _entry(file: Path, path: str, entry: Any) -> tuple[int, int, LeafSpec]:
    with readable(file, f"describes {path!r} without a dtype, a shape or data_offsets"):
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = code in DTYPES or code in PACKED
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"{file}: {path!r} has data_offsets that are not integers; {AGAIN}")
    if not known:
        raise ValueError(
            f"{file}: {path!r} has dtype {code!s:.40}, which safetensors does not have; convert it to one of "
            f"{', '.join(DTYPES)}"
        )
    return begin, end, leaf_of(file, path, shape, DTYPES[code]) if code in DTYPES else _packed(file, path, shape, code)


def _packed(file: Path, path: str, shape: tuple[Any, ...], code: str) -> LeafSpec:
    """A leaf whose elements share bytes: the meaning of its bits is left to its writer."""
    shape = checked_shape(file, path, shape, PACKED[code])
    return bytes_leaf(path, -(-math.prod(shape) * PACKED[code] // 8), Origin(code, shape))
