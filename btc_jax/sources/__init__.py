"""Dense checkpoint files of other systems, opened without their values and read one leaf at a time."""

import os
from pathlib import Path

from btc_jax.sources.base import KINDS, MAX_HEADER
from btc_jax.sources.base import Source as Source
from btc_jax.sources.base import SourceLeaf as SourceLeaf
from btc_jax.sources.npz import NpzSource
from btc_jax.sources.safetensors import SafetensorsSource, open_index
from btc_jax.sources.trees import MsgpackSource, OrbaxSource, orbax_item


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a dense checkpoint of another system. Its leaves are known at once; `Source.read` gives the values of one.

    Read are: a safetensors file; a Hugging Face folder of them, or its `*.safetensors.index.json`; the `.npz` of
    `numpy.savez`, never with pickles; the item or step folder of an Orbax checkpoint (needs the extra `orbax`).
    A Flax msgpack file is read too, but only as a whole: it takes its own size in memory until it is closed.

    Raises:
        FileNotFoundError: the path, or a shard that its index names, does not exist.
        ValueError: it is of no kind that is read, truncated, damaged, ambiguous, or holds a dtype that is not read.
        ImportError: an Orbax checkpoint, and the extra is not installed.

    Example:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/net.npz", kernel=np.ones((2, 3), np.float32))
        ...     with open_source(f"{folder}/net.npz") as source:
        ...         print(source.leaves[0], source.read("kernel").sum())
        SourceLeaf(path='kernel', shape=(2, 3), dtype=dtype('float32')) 6.0
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; give {KINDS}")
    return _open_folder(file) if file.is_dir() else _open_file(file)


def _open_file(file: Path) -> Source:
    kinds = {".safetensors": SafetensorsSource, ".npz": NpzSource, ".msgpack": MsgpackSource, ".json": open_index}
    kind = file.is_file() and (kinds.get(file.suffix) or kinds.get(_suffix_by_content(file)))
    if not kind:
        raise ValueError(f"{file} is of an unknown kind; give {KINDS}")
    return kind(file)


def _suffix_by_content(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return ".safetensors"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ".npz"
    return ".msgpack" if b"\x80" <= start[:1] <= b"\x8f" or start[:1] in (b"\xde", b"\xdf") else ""


def _open_folder(folder: Path) -> Source:
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} files {pattern} and no index of them; open one by its name")
        if found:
            return _open_file(found[0])
    return OrbaxSource(orbax_item(folder))
