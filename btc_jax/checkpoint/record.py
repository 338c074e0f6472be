"""What is stored for one leaf, and the tensor that holds it."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from btc_jax.checkpoint.dtypes import DTYPES

ERRORS = ("rmse", "relative_rmse", "largest_error")
"""The measured errors of a packed leaf, in the order of its record."""

FIELDS = {"packed": ("order", "codec"), "dense": (), "key": ("impl", "words"), "python": (), "tied": ()}
"""What a format adds to kind and dtype."""


class Tensor(NamedTuple):
    """One tensor of a safetensors file."""

    name: str
    code: str
    shape: tuple[int, ...]
    crc32c: str

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class LeafRecord:
    """What is stored for one leaf.

    Attributes:
        path: the leaf's path.
        kind: `packed`, `dense` (an array), `key` (typed PRNG keys), `python` (a number or text of Python) or `tied`
            (the same object as an earlier leaf, which is stored there).
        shape, dtype: of the leaf.
        tensors: the tensor that holds it; none for `python` and `tied`.
        details: `codec`, `order` and, if it was measured, `error` of a packed leaf; `origin` of a dense one that holds
            the bytes of another dtype; `impl` and `words` of keys; `value` of what is Python's; `of`, the path of the
            leaf that a tied one is.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[Tensor, ...]
    details: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes stored for the leaf."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def format(self) -> dict[str, Any]:
        """What many leaves have in common."""
        return {"kind": self.kind, "dtype": self.dtype} | {name: self.details[name] for name in FIELDS[self.kind]}

    def to_json(self, number: int) -> list[Any]:
        """The record in a manifest in which its format has this number."""
        if self.kind == "python":
            return [self.path, number, self.details["value"]]
        if self.kind == "tied":
            return [self.path, number, self.shape, self.details["of"]]
        fields = [self.path, number, self.shape, self.tensors[0].crc32c]
        if self.kind == "packed":
            error, cut = self.details.get("error"), self.details.get("cut")
            errors = [error[name] for name in ERRORS] if error else None
            more = [errors, *cut] if cut else [errors] if error else []
            return [*fields, self.nbytes, *more]
        return [*fields, *([self.details["origin"]] if "origin" in self.details else [])]
