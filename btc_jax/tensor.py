"""`BTCTensor`: the pytree node that replaces a leaf, and that models can use as if it were the array."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata
from jax.core import Tracer

from btc_jax import coding
from btc_jax._arraylike import BehavesAsArray
from btc_jax._mesh import like_leaf, refuse_staging
from btc_jax._typing import Array, Order
from btc_jax.allocate import Item, allocate, usual_target
from btc_jax.blocks import MAX_TAPS, ORDERS, tap_sizes
from btc_jax.codecs import Codec
from btc_jax.decoding import unpack
from btc_jax.intact import changes
from btc_jax.seal import SEAL, changed_arrays


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "header", "seal"),
    meta_fields=("shape", "dtype", "codec", "order"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BTCTensor(BehavesAsArray, AxisMetadata):
    """A packed leaf: the codes of its blocks in bit planes, and a header for each block.

    It decodes itself where an array is asked for: in Linen (which unboxes it), in the layers of NNX (which index it),
    in functions of `jax.numpy` and `jax.lax`, in operators, and in every method and attribute of `jax.Array`, such as
    `w.sum(axis=0)` or `w.T`. (`jnp.dot(x, self.w)` on the `nnx.Param` that holds it needs `self.w[...]`.) Its arrays
    are children of the pytree, so it passes through `jax.jit`, `jax.device_put` and the like; everything else is
    static.

    Attributes:
        planes: the packed codes, most significant bits first, as far as blocks have them; see `btc_jax.planes`.
        header: what each block stores besides its codes, by name; see the codec.
        shape: shape of the leaf.
        dtype: dtype of the leaf, and of what `dequantize` returns.
        codec: the codec that wrote it.
        order: the order in which the weights run through the blocks; see `btc_jax.blocks`.
        seal: two numbers that show whether the arrays were changed; see `btc_jax.seal`.

    Raises:
        TypeError: if a `jax.tree` function changed the arrays inside: arithmetic, a cast, or `zeros_like`, as in the
            `init` of an optimizer. Packed weights can be decoded, moved and saved, but not trained. Where a function is
            traced, values cannot be checked, and a changed leaf decodes to NaN. See `btc_jax.seal` for what shows.

    Example:
        >>> import btc_jax, jax.numpy as jnp
        >>> q = btc_jax.quantize_leaf(jnp.linspace(-1, 1, 4096).reshape(64, 64), btc_jax.Uniform(threshold=0.3))
        >>> q
        BTCTensor(shape=(64, 64), dtype=float32, bits=8.52, codec=Uniform(block_size=64, ...), order='output-major')
        >>> q.nbytes, q.dequantize().shape, q.sum(axis=0).shape
        (4364, (64, 64), (64,))
    """

    # Arrays; but JAX also builds nodes of whatever a function of leaves returned, or of what stands for many leaves.
    planes: Any
    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    codec: Codec
    order: Order
    seal: Any = dataclasses.field(default_factory=SEAL.copy)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # as arrays: == compares weights

    def __post_init__(self):
        if trouble := changes(self):
            raise TypeError(changed_arrays(self.shape, trouble))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the short last one included."""
        return -(-self.size // self.codec.block_size)

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
        return tuple(getattr(self.seal, "shape", ()))[:-1]

    @property
    def widths(self) -> Array:
        """Bits per weight of each block, `u8[blocks]`."""
        return self.codec.unpack_header(jax.tree.map(jnp.asarray, self.header), self.num_blocks)[0]

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
        return unpack(self.planes, self.header, self.seal, self.codec, self.shape, dtype, self.order)

    def __repr__(self) -> str:
        whole = all(hasattr(array, "dtype") for array in jax.tree.leaves(self))
        bits = f"{8 * self.nbytes / max(self.size * math.prod(self.stack), 1):.2f}" if whole else "unknown"
        stack = f"stack={self.stack}, " if self.stack else ""
        return (
            f"BTCTensor({stack}shape={self.shape}, dtype={np.dtype(self.dtype)}, bits={bits}, "
            f"codec={self.codec!r}, order={self.order!r})"
        )

    # Flax Linen unboxes every parameter that is an AxisMetadata, before it looks at its shape.

    def unbox(self) -> Array:
        return self.dequantize()

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        raise TypeError(f"{self!r} cannot be stacked by nn.scan or nn.vmap; decode the tree with btc_dequantize first")

    remove_axis = add_axis

    def block_until_ready(self) -> "BTCTensor":
        return jax.block_until_ready(self)

    # What a shape answers is not decoded.

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

    def __jax_array__(self) -> Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if any(isinstance(array, Tracer) for array in jax.tree.leaves(self)):
            return self.dequantize().__array__(dtype, copy=copy)
        with jax.ensure_compile_time_eval():  # a leaf that a traced function closes over has values, as arrays there do
            return self.dequantize().__array__(dtype, copy=copy)


def quantize_leaf(
    leaf: Any, codec: Codec, order: Order = "output-major", path: str = "leaf", slope: float | None = None
) -> BTCTensor:
    """Packs one floating array. One that is sharded is gathered: packed, it lies whole on every device of its mesh.

    Args:
        leaf: weights of any shape and floating dtype.
        codec: how the blocks are coded.
        order: how the weights run through the blocks.
        path: what error messages call the leaf.
        slope: for an adaptive codec, the squared error that saves a bit, over the mean square of the weights; without
            it, the one that comes to 4.5 effective bits. A tree is better shared out as a whole, by `btc_quantize`.

    Raises:
        ValueError: weights are NaN, infinite, or too large for the header; or the order is unknown.
        TypeError: the array is traced, or not floating.
    """
    if is_packed(leaf):
        return leaf
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"{path} is traced; the widths of its blocks are read on the host. Use btc_reconstruct inside jit"
        )
    refuse_staging(path)
    check_order(order, np.shape(leaf), path)
    dtype = np.dtype(getattr(leaf, "dtype", float))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} is {dtype}; only floating arrays can be quantized")
    array = jnp.asarray(leaf)
    if slope is not None and not 0 <= slope < 1e30:
        raise ValueError(f"{path}: slope is {slope!r}; it must be a number from 0 to 1e30")
    if codec.candidates != (codec,) or (codec.adaptive and slope is None):
        item = Item(path, lambda: array, array.shape, codec, order)
        (choice,), _ = allocate([item], usual_target([codec]), balance=0)
        codec, slope = choice.codec, choice.slope
    planes, header = coding.pack(leaf, codec, order, path, slope or 0.0)
    seal = like_leaf(jnp.asarray(SEAL), leaf)
    return BTCTensor(planes, header, array.shape, dtype, codec.stored, order, seal)


def check_order(order: str, shape: tuple[int, ...], what: str) -> None:
    """Refuses an order that is unknown, or would transform axes that are too long for taps."""
    if order not in ORDERS:
        raise ValueError(f"{what}: order is {order!r}; it can be {', '.join(map(repr, ORDERS))}")
    if math.prod(taps := tap_sizes(shape, order)) > MAX_TAPS:
        raise ValueError(f"{what}: order {order!r} would transform axes of {taps}, more than {MAX_TAPS} taps in all")


def is_packed(x: Any) -> bool:
    """Whether `x` is a `BTCTensor`; the `is_leaf` of functions over trees that hold some."""
    return isinstance(x, BTCTensor)
