"""Dense checkpoint files of other systems, opened without their values and read one leaf at a time."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from btc_jax.sources import kinds
from btc_jax.sources.base import DTYPES as DTYPES
from btc_jax.sources.base import KINDS, refuse, unknown
from btc_jax.sources.base import PACKED as PACKED
from btc_jax.sources.base import Source as Source
from btc_jax.sources.npz import NpzSource
from btc_jax.sources.safetensors import SafetensorsSource, open_index
from btc_jax.sources.trees import MsgpackSource, OrbaxSource, orbax_item


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a dense checkpoint of another system. Its leaves are known at once; `Source.read` returns the values of one.

    Supported are a safetensors file; a Hugging Face folder of them, or its `*.safetensors.index.json`; the `.npz` of
    `numpy.savez`, never with pickles; the item or step folder of an Orbax checkpoint (needs the extra `orbax`).
    A Flax msgpack file is read too, but only as a whole: it takes its own size in memory until it is closed.
    Leaves that are not arrays of numbers that numpy can hold are read as their bytes: see `LeafSpec.origin`.

    Raises:
        FileNotFoundError: if the path, or a shard that its index names, does not exist.
        ValueError: if its kind is not supported (the message names the kind, if known, and how to convert it), or if it
            is truncated, damaged or ambiguous, or holds Python objects.
        ImportError: if it is an Orbax checkpoint, and the extra is not installed.

    Examples:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/net.npz", kernel=np.ones((2, 3), np.float32))
        ...     with open_source(f"{folder}/net.npz") as source:
        ...         print(source.leaves[0].shape, source.read("kernel").sum())
        (2, 3) 6.0
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; give {KINDS}")
    return _open_folder(file) if file.is_dir() else _open_file(file)


def _open_file(file: Path) -> Source:
    if not file.is_file():
        raise ValueError(f"{file} {unknown()}")
    refuse(file, kinds.by_content(file))
    reader = _READERS.get(file.suffix.lower()) or _READERS.get(_suffix_by_content(file))
    if not reader:
        refuse(file, kinds.by_name(file))
        reader = _READERS.get(_suffix_of_msgpack(file))
    if not reader:
        raise ValueError(f"{file} {unknown()}")
    return reader(file)


_READERS: dict[str, Callable[[Path], Source]] = {
    **{".safetensors": SafetensorsSource, ".npz": NpzSource, ".msgpack": MsgpackSource, ".json": open_index}
}


def _suffix_by_content(file: Path) -> str:
    """The suffix that the content of the file implies, if that is certain."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if kinds.is_safetensors(start):
        return ".safetensors"
    return ".npz" if kinds.is_zip(start) and kinds.members(file) else ""


def _suffix_of_msgpack(file: Path) -> str:
    """A msgpack map can be recognised only by its first byte."""
    with file.open("rb") as stream:
        start = stream.read(1)
    return ".msgpack" if b"\x80" <= start <= b"\x8f" or start in (b"\xde", b"\xdf") else ""


def _open_folder(folder: Path) -> Source:
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:8])
            raise ValueError(
                f"{folder} holds {len(found)} files {pattern} and no index of them; open one by its name: {names}"
            )
        if found:
            return _open_file(found[0])
    item = orbax_item(folder)
    return _refuse_folder(folder) if item is None else OrbaxSource(item)


def _refuse_folder(folder: Path) -> NoReturn:
    """Raise an error that says what in the folder can be opened, or what the folder is."""
    inside = sorted({str(path.relative_to(folder)) for path in _readable_inside(folder)})
    if inside:
        listed = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "")
        raise ValueError(f"{folder} is not a checkpoint itself; open what is in it: {listed}")
    refuse(*kinds.in_folder(folder))
    raise ValueError(f"{folder} is a folder of an unknown kind; give {KINDS}")


def _readable_inside(folder: Path) -> Iterator[Path]:
    """Files in a folder, and folders in it that are checkpoints, as in the folder of a diffusers pipeline."""
    for pattern in ("*.npz", "*.msgpack"):
        yield from folder.glob(pattern)
    for file in folder.glob("*/*.safetensors"):
        alone = len(list(file.parent.glob("*.safetensors"))) == 1 or next(file.parent.glob("*.index.json"), None)
        yield file.parent if alone else file
    for pattern in ("*/*.npz", "*/*.msgpack"):
        yield from folder.glob(pattern)
