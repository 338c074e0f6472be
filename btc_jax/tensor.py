"""`BTCTensor`: the pytree node that replaces a leaf, and that models use as if it were the array."""

import dataclasses
import functools
import html
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata
from jax.core import Tracer

from btc_jax._arraylike import BehavesAsArray
from btc_jax._typing import Array, Order
from btc_jax.decoding import on_cpu, unpack, unpack_pieces, widths_of_pieces
from btc_jax.formats import Format
from btc_jax.intact import changes
from btc_jax.pieces import at
from btc_jax.processes import is_spread, on_host
from btc_jax.seal import SEAL, changed_arrays
from btc_jax.tables import as_html, comparison_table, shape_cell


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "header", "seal"),
    meta_fields=("piece", "dtype", "format", "order", "stacks"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BTCTensor(BehavesAsArray, AxisMetadata):
    """A packed leaf: the codes of its blocks in bit planes, and a header for each block.

    It decodes itself where an array is needed: in Linen (which unboxes it), in the layers of NNX (which index it), in
    functions of `jax.numpy` and `jax.lax`, in operators, and in every method and attribute of `jax.Array`, such as
    `w.sum(axis=0)` or `w.T`. (`jnp.dot(x, self.w)` on the `nnx.Param` that holds it needs `self.w[...]`.) Its arrays
    are children of the pytree, so it passes through `jax.jit`, `jax.device_put` and the like; everything else is
    static.

    Attributes:
        planes: the packed codes, most significant bits first, for the blocks that have them; see `btc_jax.planes`.
        header: what each block stores besides its codes, by name; see the format.
        piece: shape of a piece; of the leaf, unless it is cut into pieces: see `btc_jax.pieces`.
        dtype: dtype of the leaf, and of what `dequantize` returns.
        format: what the arrays mean, not how they were encoded.
        order: the layout, in which the weights run through the blocks; see `btc_jax.blocks`.
        seal: two numbers that show whether the arrays were changed; see `btc_jax.seal`.
        stacks: of a leaf that is cut into pieces, the axes along which it is a stack, in the order in which they are
            mapped over; `None` for one that is whole.

    Raises:
        TypeError: if a `jax.tree` function changed the arrays inside: arithmetic, a cast, or `zeros_like`, as in the
            `init` of an optimizer. Packed weights can be decoded, moved and saved, but not trained. While a function is
            traced, values cannot be checked, and a changed leaf decodes to NaN. For what is detected, see
            `btc_jax.seal`.

    Examples:
        >>> import btc_jax, jax.numpy as jnp
        >>> q = btc_jax.packing.quantize_leaf(jnp.linspace(-1, 1, 4096).reshape(64, 64), btc_jax.Uniform(threshold=0.3))
        >>> q
        BTCTensor(shape=(64, 64), dtype=float32, bits=8.52, format=UniformFormat(...), order='output-major')
        >>> q.nbytes, q.dequantize().shape, q.sum(axis=0).shape
        (4364, (64, 64), (64,))
    """

    # Arrays; but JAX also builds nodes of whatever a function of leaves returned, or of what stands for many leaves.
    planes: Any
    header: Any
    piece: tuple[int, ...]
    dtype: np.dtype
    format: Format
    order: Order
    seal: Any = dataclasses.field(default_factory=SEAL.copy)
    stacks: tuple[int, ...] | None = None

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as arrays: == compares weights

    def __post_init__(self) -> None:
        if trouble := changes(self):
            raise TypeError(changed_arrays(self.shape, trouble))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        kept, pieces = self.kept, self.pieces
        if self.stacks is None or len(kept) != len(pieces):  # or no arrays, but what stands for them
            return self.piece
        sizes = iter(self.piece)
        return tuple(count if is_stack else count * next(sizes) for count, is_stack in zip(pieces, kept, strict=True))

    @property
    def pieces(self) -> tuple[int, ...]:
        """Number of pieces along each axis; empty for a leaf that is whole."""
        return self._leading[len(self.stack) :]

    @property
    def _leading(self) -> tuple[int, ...]:
        return tuple(getattr(self.seal, "shape", ()))[:-1]

    @property
    def kept(self) -> tuple[bool, ...]:
        """For each remaining axis of a leaf of pieces, whether it is one of its stacks; empty for a whole leaf.

        `jax.vmap` and `lax.scan` slice stacks, and take their axes away.
        """
        if self.stacks is None:
            return ()
        whole = len(self.piece) + len(self.stacks)
        gone = self.stacks[: max(whole - len(self._leading), 0)]
        return tuple(axis in self.stacks for axis in range(whole) if axis not in gone)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, including the short last one of each piece."""
        return math.prod(self.pieces) * -(-math.prod(self.piece) // self.format.block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored: planes, header and seal."""
        return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in jax.tree.leaves(self))

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of packed leaves that were stacked, for `jax.vmap` and `lax.scan` to map over."""
        own = 0 if self.stacks is None else len(self.piece) + len(self.stacks)
        return self._leading[: max(len(self._leading) - own, 0)]

    @property
    def widths(self) -> Array:
        """Bits per weight of each block, `u8[blocks]`."""
        arrays = self.header.values()
        read = all(map(on_cpu, arrays)) or any(map(is_spread, arrays))  # then nothing is compiled for their number
        header = jax.tree.map(on_host if read else jnp.asarray, self.header)
        widths = widths_of_pieces(self.format, header, self.num_blocks, self.pieces)
        return jax.device_put(widths) if read else widths

    def dequantize(self, dtype: Any = None) -> Array:
        """The weights as an array of `shape`, in `dtype` or the leaf's own.

        Raises:
            TypeError: if it is a stack of packed leaves, outside of `jax.vmap` and `lax.scan` over them, or its arrays
                do not fit each other.
        """
        if self.stack:
            raise TypeError(
                f"{math.prod(self.stack)} packed leaves of shape {self.shape} are stacked; map over them with jax.vmap "
                "or lax.scan, or decode them (btc_jax.btc_dequantize) before they are stacked"
            )
        self.__post_init__()  # a device may have been computing the arrays before
        dtype = jax.dtypes.canonicalize_dtype(self.dtype if dtype is None else dtype)
        if self.stacks is None:
            return unpack(self.planes, self.header, self.seal, self.format, self.piece, dtype, self.order)
        if len(self.kept) != len(self.pieces):
            raise TypeError(
                f"a packed leaf of pieces of shape {self.piece} lost an axis along which it is cut into shards, not "
                "stacked; say which axes are mapped over when it is quantized: Rule(pattern, stack=0)"
            )
        return unpack_pieces(self.planes, self.header, self.seal, self.format, self.piece, self.kept, dtype, self.order)

    def __repr__(self) -> str:
        whole = all(hasattr(array, "dtype") for array in jax.tree.leaves(self))
        bits = f"{8 * self.nbytes / max(self.size * math.prod(self.stack), 1):.2f}" if whole else "unknown"
        stack = f"stack={self.stack}, " if self.stack else ""
        return (
            f"BTCTensor({stack}shape={self.shape}, dtype={np.dtype(self.dtype)}, bits={bits}, "
            f"format={self.format!r}, order={self.order!r})"
        )

    def _repr_html_(self) -> str:
        arrays = jax.tree.leaves(self)
        if self.stack or not all(isinstance(x, np.ndarray | jax.Array) and not is_spread(x) for x in arrays):
            return f"<pre>{html.escape(repr(self))}</pre>"
        widths, counts = np.unique(np.asarray(self.widths), return_counts=True)
        row = {
            "shape": shape_cell(self.shape),
            "dtype": str(np.dtype(self.dtype)),
            "bits": 8 * self.nbytes / max(self.size, 1),
            "bytes": self.nbytes,
            "blocks": self.num_blocks,
            "widths": ", ".join(f"{count} of {width} bits" for width, count in zip(widths, counts, strict=True)),
        }
        return as_html(comparison_table([row], "Packed leaf"))

    # Flax Linen unboxes every parameter that is an AxisMetadata before it checks its shape.

    def unbox(self) -> Array:
        return self.dequantize()

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return self  # the shape follows from the arrays, which are sliced and stacked already

    remove_axis = add_axis

    def block_until_ready(self) -> "BTCTensor":
        return jax.block_until_ready(self)

    # What the shape alone answers needs no decoding.

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"the truth value of an array of shape {self.shape} is ambiguous; use .any() or .all()")
        return bool(self.dequantize())

    def __iter__(self) -> Iterator[Array]:
        return iter(self.dequantize())

    def __getitem__(self, index: Any) -> Array:
        """As for the decoded array; of a stack of pieces, only the requested piece is decoded."""
        if self.kept[:1] == (True,) and not self.stack and is_one_place(index):
            place = range(self.shape[0])[index] if isinstance(index, int | np.integer) else index
            return jax.tree.map(lambda array: array[place], self).dequantize()
        return self.dequantize()[index]

    def __jax_array__(self) -> Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if any(isinstance(array, Tracer) for array in jax.tree.leaves(self)):
            return self.dequantize().__array__(dtype, copy=copy)
        with jax.ensure_compile_time_eval():  # a leaf that a traced function closes over has values, as arrays there do
            return self.dequantize().__array__(dtype, copy=copy)


def is_one_place(index: Any) -> bool:
    """Whether an index selects a single element of an axis."""
    if isinstance(index, bool | np.bool_):
        return False
    return isinstance(index, int | np.integer) or (
        isinstance(index, jax.Array) and index.ndim == 0 and jnp.issubdtype(index.dtype, jnp.integer)
    )


def is_packed(x: Any) -> bool:
    """Whether `x` is a `BTCTensor`; the `is_leaf` of functions over trees that hold some. It never raises.

    Returns:
        `True` for a packed leaf, `False` for anything else.

    Examples:
        >>> import btc_jax, jax, jax.numpy as jnp
        >>> tree = btc_jax.btc_quantize({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
        >>> [is_packed(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_packed)]
        [False, True]
    """
    return isinstance(x, BTCTensor)


def pieces_in(leaf: BTCTensor) -> dict[tuple[int, ...], BTCTensor]:
    """The pieces of a leaf by their places, each a packed leaf by itself, on the host."""
    whole = jax.tree.map(np.asarray, (leaf.planes, leaf.header, leaf.seal))
    found = {}
    for index in np.ndindex(leaf.pieces):
        planes, header, seal = at(whole, index)
        found[index] = BTCTensor(planes, header, leaf.piece, leaf.dtype, leaf.format, leaf.order, seal)
    return found
