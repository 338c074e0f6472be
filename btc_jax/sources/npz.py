"""The `.npz` of `numpy.savez`, never with pickles."""

import zipfile

import numpy as np

from btc_jax.large import Box
from btc_jax.leafspec import LeafSpec, Origin
from btc_jax.sources.base import AGAIN, Source, bytes_leaf, leaf_of, readable

MAX_DEFLATE = 1032  # deflate cannot shrink further, so a larger claimed size is false
_PICKLED = "pickled"
_BETTER = "save arrays of numbers by name, and bfloat16 as safetensors.flax.save_file(arrays, 'weights.safetensors')"


class NpzSource(Source):
    """The `.npz` of `numpy.savez`, plain or compressed. Foreign byte orders are read as the machine's own.

    bfloat16 and the other dtypes that numpy does not know lost their names in the file, so they are read as bytes, and
    so are pickles, which can run code.
    """

    def _scan(self) -> list[LeafSpec]:
        with readable(self.file, "is a damaged .npz file"):
            self._zip = zipfile.ZipFile(self.file)
        leaves = [self._describe(member) for member in self._zip.infolist()]
        if leaves and all(leaf.origin for leaf in leaves):
            what = ", ".join(sorted({leaf.note for leaf in leaves})[:3])
            raise ValueError(
                f"{self.file} has no array of numbers: {leaves[0].path} and all others are {what}; {_BETTER}"
            )
        return leaves

    def _describe(self, member: zipfile.ZipInfo) -> LeafSpec:
        path = member.filename.removesuffix(".npy")
        if path == member.filename:
            raise ValueError(f"{self.file} holds {path!r}, which is not an array of numpy; take it out, or rename it")
        with readable(self.file, f"is damaged at {path}"), self._zip.open(member) as stream:
            first = np.lib.format.read_magic(stream) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            start = stream.tell()
        size = member.file_size - start
        pickled = bytes_leaf(path, size, Origin(_PICKLED, shape))
        leaf = pickled if dtype.hasobject else leaf_of(self.file, path, shape, dtype.newbyteorder("="))
        if size != leaf.nbytes or member.file_size > MAX_DEFLATE * (member.compress_size + 1):
            raise ValueError(f"{self.file}: {path} has another size than {dtype}{list(shape)}; {AGAIN}")
        return leaf

    def _read(self, leaf: LeafSpec, box: Box) -> np.ndarray:
        with readable(self.file, f"is damaged at {leaf.path}"), self._zip.open(f"{leaf.path}.npy") as stream:
            if leaf.note == _PICKLED:
                member = stream.read()  # never opened
                return np.frombuffer(bytearray(member[len(member) - leaf.shape[0] :]), np.uint8)[*box, ...]
            values = np.lib.format.read_array(stream, allow_pickle=False)
            return values.astype(values.dtype.newbyteorder("="), copy=False)[*box, ...]

    def close(self) -> None:
        super().close()
        self._zip.close()
