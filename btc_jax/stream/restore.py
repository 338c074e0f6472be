"""A compressed checkpoint back into a plain safetensors file."""

import errno
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from btc_jax.checkpoint.files import whole_file
from btc_jax.checkpoint.manifest import CODES
from btc_jax.checkpoint.read import Checkpoint, open_checkpoint
from btc_jax.checkpoint.text import canonical
from btc_jax.checkpoint.write import index_of, real_path
from btc_jax.stream.compress import OnLeaf, refuse_source
from btc_jax.stream.plan import PathLike


def restore_file(path: PathLike, target: PathLike, *, on_leaf: OnLeaf | None = None) -> int:
    """Decodes a checkpoint into a plain safetensors file with the original names and dtypes; returns its bytes.

    Raises:
        BTCFormatError: the checkpoint cannot be read, or is damaged.
        ValueError: a leaf is no array, or of a dtype that safetensors cannot hold.
        OSError: the target could not be written.
    """
    target = real_path(target)
    if index_of(target).exists():
        raise FileExistsError(errno.EEXIST, f"{index_of(target)} is an index of the same name; name another file")
    with open_checkpoint(path) as checkpoint:
        refuse_source(target, checkpoint.files)
        entries = _plain_entries(checkpoint)
        header = canonical(entries).encode()
        header += b" " * (-len(header) % 8)
        with whole_file(target) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in entries:
                dtype = jnp.dtype(checkpoint.records[name].dtype)
                array = np.ascontiguousarray(checkpoint.read(name, dense=True), dtype)
                file.write(array.reshape(-1).view(np.uint8).data)
                if on_leaf:
                    on_leaf(name, array.nbytes)
            return file.tell()


def _plain_entries(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header of a plain safetensors file with all leaves, the widest numbers first."""
    entries, end = {}, 0
    for path, record in checkpoint.records.items():
        if record.dtype not in CODES:
            raise ValueError(f"{path} is {record.dtype}; a safetensors file cannot hold that")
    for path, record in sorted(checkpoint.records.items(), key=lambda item: -jnp.dtype(item[1].dtype).itemsize):
        nbytes = math.prod(record.shape) * jnp.dtype(record.dtype).itemsize
        place = [end, end + nbytes]
        entries[path] = {"dtype": CODES[record.dtype], "shape": record.shape, "data_offsets": place}
        end += nbytes
    return entries
