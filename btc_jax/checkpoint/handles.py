"""One safetensors file with a manifest of ours, open for reading; of many files only some are open at a time."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError, BTCNotCompressedError
from btc_jax.checkpoint.files import crc32c, read_at
from btc_jax.checkpoint.header import START, parse_header
from btc_jax.checkpoint.manifest import Manifest
from btc_jax.checkpoint.record import Tensor
from btc_jax.checkpoint.text import MAX_TEXT

MAX_OPEN = 64
"""Files that one checkpoint keeps open. Systems allow a process some hundreds of them."""


class Handles:
    """The open files of one checkpoint: those that were used last."""

    def __init__(self):
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._known: dict[Path, tuple[int, ...]] = {}

    def of(self, path: Path) -> int:
        """The handle of a file, which is opened again if need be.

        Raises:
            BTCFormatError: if it is not the file any more that was opened first.
        """
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            if path not in self._known:
                raise
            raise BTCFormatError(f"{path} was removed while the checkpoint was open") from error
        if self._known.setdefault(path, _identity(handle)) != _identity(handle):
            os.close(handle)
            raise BTCFormatError(f"{path} was replaced while the checkpoint was open")
        self._open[path] = handle
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return handle

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class File:
    """One safetensors file with a manifest of ours.

    Attributes:
        path: where it is.
        start: where its data begin.
        manifest, text: its manifest, and that as text.
        places: where each tensor begins in its data, by name.
    """

    def __init__(self, path: Path, handles: Handles):
        if path.exists() and not path.is_file():
            raise BTCNotCompressedError(f"{path} is a folder or a device, not a file of a compressed checkpoint")
        self.path, self._handles = path, handles
        self.manifest, self.text, self.places = self._read_manifest(handles.of(path))

    def read(self, tensor: Tensor, checksums: bool) -> np.ndarray:
        """The tensor in the dtype that it is stored in."""
        handle, place = self._handles.of(self.path), self.start + self.places[tensor.name]
        data = read_at(handle, place, tensor.nbytes, str(self.path))
        if checksums and crc32c(data) != tensor.crc32c:
            raise BTCIntegrityError(f"{self.path}: tensor {tensor.name!r} does not match its checksum; it is damaged")
        return data.view(tensor.numpy_dtype).reshape(tensor.shape)

    def _read_manifest(self, handle: int) -> tuple[Manifest, str, dict[str, int]]:
        size, what = os.fstat(handle).st_size, str(self.path)
        if size < 8:
            raise BTCFormatError(f"{what} has {size} bytes; it is not a checkpoint, or it is truncated")
        length = int.from_bytes(read_at(handle, 0, 8, what).tobytes(), "little")
        if length > min(size - 8, MAX_TEXT):
            ours = START in read_at(handle, 8, min(size - 8, 64), what).tobytes()
            claim = (
                f"{what} claims a header of {length:,} bytes; it has {size:,} bytes, and headers at most {MAX_TEXT:,}"
            )
            if ours:
                raise BTCFormatError(f"{claim}; it is truncated or damaged")
            raise BTCNotCompressedError(f"{claim}, so it is not a compressed checkpoint, or it is damaged")
        header = bytes(read_at(handle, 8, length, what).data)
        self.start = 8 + length
        return parse_header(header, size - self.start, what)


def _identity(handle: int) -> tuple[int, ...]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
