"""Atomic writes, and checked reads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from btc_jax.checkpoint.errors import BTCFormatError

try:
    import fcntl
except ImportError:  # Windows: two processes must not save to one path at a time
    fcntl = None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which atomically replaces `path`, flushed to disk, when the block ends.

    It is written next to `path`, under one fixed name that is locked: a killed writer leaves at most that file, and the
    next writer takes it over.

    Raises:
        OSError: if it could not be written, or another process is writing it. What was at `path` is untouched.
    """
    temporary = temporary_of(path)
    with os.fdopen(_locked(temporary, path), "wb") as file:
        try:
            file.truncate()
            yield file
            file.flush()
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)  # who could read it still can, and nobody else
            os.fsync(file.fileno())
            os.replace(temporary, path)
            flush_folder(path.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            file.raw.close()  # what is still buffered must not fail again
            if isinstance(error, OSError):
                raise _not_written(path, error) from error
            raise


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """A lock on all files of a checkpoint at `path`, for as long as the block runs.

    Raises:
        OSError: if another process has it, or files cannot be made here.
    """
    lock = path.with_name(f".{path.name}.lock")
    handle = _locked(lock, path)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def temporary_of(path: Path) -> Path:
    """Where the new content of `path` is written."""
    return path.with_name(f".{path.name}.tmp")


def read_at(handle: int, offset: int, nbytes: int, what: str) -> np.ndarray:
    """Exactly so many bytes of an open file.

    Raises:
        BTCFormatError: if the file ends before that.
    """
    data = np.empty(nbytes, np.uint8)
    view, done = data.data, 0
    while done < nbytes:
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise BTCFormatError(f"{what}: the file ends {nbytes - done} bytes early; it is truncated")
        done += count
    return data


def crc32c(*parts: np.ndarray | bytes) -> str:
    """CRC-32C (Castagnoli) of concatenated bytes, as eight hexadecimal digits.

    Examples:
        >>> crc32c(b"1234", b"56789")
        'e3069283'
    """
    crc = 0
    for part in parts:
        data = part.reshape(-1).view(np.uint8) if isinstance(part, np.ndarray) else part
        crc = google_crc32c.extend(crc, data)  # pyright: ignore[reportArgumentType]  # takes arrays, without a copy
    return f"{crc:08x}"


def _locked(name: Path, path: Path) -> int:
    """An open file of this name, created if necessary, and locked for the writer of `path`."""
    while True:
        try:
            handle = os.open(name, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise _not_written(path, error) from error
        try:
            if fcntl is None:
                return handle
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have moved or removed the file between the two calls; then this locks nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(name)):
                    return handle
        except BlockingIOError as error:
            os.close(handle)
            message = f"{path}: another process is writing it; wait for that one"
            raise BlockingIOError(error.errno, message) from error
        os.close(handle)


def flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _not_written(path: Path, error: OSError) -> OSError:
    if isinstance(error.__cause__, OSError):  # ours already, of a file that belongs to this one
        return error
    return OSError(error.errno, f"{path} could not be written: {error.strerror}; what was there is untouched")
