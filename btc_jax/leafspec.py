"""What is known of a leaf without its values."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np


class Origin(NamedTuple):
    """The origin of a leaf that is read as bytes: the name of its dtype in the source, and its shape there."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """A leaf of a tree or of a file, without its values.

    Attributes:
        path: the keys of the leaf joined by `/`.
        shape: its shape.
        dtype: its dtype; `None` for what is not an array.
        sharding: where it is, if it is on devices.
        note: why the leaf cannot be quantized whatever the policy says, or empty.
        training: the part of the training that the containers around the leaf say it is, such as "optimizer state";
            empty for a parameter, or if only the path can tell.
        stacks: axes that the box around the leaf names as those of layers or experts.
        origin: of a leaf of a file that is not an array of numbers that numpy can hold; it is read as its bytes, uint8.

    Examples:
        >>> LeafSpec("layer_0/kernel", (64, 64), np.dtype("float32")).nbytes
        16384
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: Any = None
    note: str = ""
    training: str = ""
    stacks: tuple[int, ...] = ()
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """The last key of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of its values; 0 for what is not an array."""
        return 0 if self.dtype is None else math.prod(self.shape) * np.dtype(self.dtype).itemsize
