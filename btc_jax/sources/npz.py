"""The `.npz` of `numpy.savez`, never with pickles."""

import zipfile

import numpy as np

from btc_jax.sources.base import AGAIN, Source, SourceLeaf, leaf_of, nbytes_of, readable

MAX_DEFLATE = 1032  # deflate shrinks no further: a member of a zip that says so lies


class NpzSource(Source):
    """The `.npz` of `numpy.savez`, plain or compressed. Foreign byte orders are read as the machine's own.

    bfloat16 and the other dtypes that numpy does not know lost their names in the file, so they are read as bytes.
    """

    def _scan(self) -> list[SourceLeaf]:
        with readable(self.file, "is a damaged .npz file"):
            self._zip = zipfile.ZipFile(self.file)
        return [self._describe(member) for member in self._zip.infolist()]

    def _describe(self, member: zipfile.ZipInfo) -> SourceLeaf:
        path = member.filename.removesuffix(".npy")
        if path == member.filename:
            raise ValueError(f"{self.file} holds {path!r}, which is not an array of numpy; take it out, or rename it")
        with readable(self.file, f"is damaged at {path}"), self._zip.open(member) as stream:
            first = np.lib.format.read_magic(stream) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            start = stream.tell()
        if dtype.hasobject:
            raise ValueError(f"{self.file}: {path} is pickled, and pickles can run code; save it as numbers")
        leaf = leaf_of(self.file, path, shape, dtype.newbyteorder("="))
        if start + nbytes_of(leaf) != member.file_size or member.file_size > MAX_DEFLATE * (member.compress_size + 1):
            raise ValueError(f"{self.file}: {path} has another size than {dtype}{list(shape)}; {AGAIN}")
        return leaf

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        with readable(self.file, f"is damaged at {leaf.path}"), self._zip.open(f"{leaf.path}.npy") as stream:
            values = np.lib.format.read_array(stream, allow_pickle=False)
            return values.astype(values.dtype.newbyteorder("="), copy=False)

    def close(self) -> None:
        super().close()
        self._zip.close()
