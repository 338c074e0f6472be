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
from jax.sharding import NamedSharding, PartitionSpec

from btc_jax import coding
from btc_jax._typing import Array, Order
from btc_jax.allocate import Item, allocate, usual_target
from btc_jax.blocks import MAX_TAPS, ORDERS, tap_sizes
from btc_jax.codecs import Codec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "header"),
    meta_fields=("shape", "dtype", "codec", "order"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BTCTensor(AxisMetadata):
    """A packed leaf: the codes of its blocks in bit planes, and a header for each block.

    It decodes itself where an array is asked for: in Linen (which unboxes it), in the layers of NNX (which index it),
    in arithmetic, and in `jnp` functions. (`jnp.dot(x, self.w)` on the `nnx.Param` that holds it needs `self.w[...]`.)
    Its arrays are children of the pytree, so it passes through `jax.jit`, `jax.device_put` and the like; everything
    else is static.

    Attributes:
        planes: the packed codes, most significant bits first; see `btc_jax.planes`.
        header: what each block stores besides its codes, by name; see the codec.
        shape: shape of the leaf.
        dtype: dtype of the leaf, and of what `dequantize` returns.
        codec: the codec that wrote it.
        order: the order in which the weights run through the blocks; see `btc_jax.blocks`.

    Raises:
        TypeError: when a `jax.tree` function changed the arrays inside: a cast of all leaves, or `zeros_like`, as in
            the `init` of most optimizers (not of those whose state starts at another number, such as adagrad). Packed
            weights can be decoded, moved and saved, but not trained.

    Example:
        >>> import btc_jax, jax.numpy as jnp
        >>> q = btc_jax.quantize_leaf(jnp.linspace(-1, 1, 4096).reshape(64, 64), btc_jax.Uniform(threshold=0.3))
        >>> q
        BTCTensor(shape=(64, 64), dtype=float32, bits=8.52, codec=Uniform(block_size=64, ...), order='output-major')
        >>> q.nbytes, q.dequantize().shape
        (4360, (64, 64))
    """

    # Arrays; but JAX also builds nodes of whatever a function of leaves returned, or of what stands for many leaves.
    planes: Any
    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    codec: Codec
    order: Order

    def __post_init__(self):
        _refuse_changed_arrays(self)

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
        """Bytes of everything stored: planes and header."""
        arrays = jax.tree.leaves((self.planes, self.header))
        return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)

    @property
    def widths(self) -> Array:
        """Bits per weight of each block, `u8[blocks]`."""
        return self.codec.unpack_header(jax.tree.map(jnp.asarray, self.header), self.num_blocks)[0]

    def dequantize(self, dtype: Any = None) -> Array:
        """The weights as an array of `shape`, in `dtype` or the leaf's own."""
        dtype = jax.dtypes.canonicalize_dtype(self.dtype if dtype is None else dtype)
        return coding.unpack(self.planes, self.header, self.codec, self.shape, dtype, self.order)

    def __getitem__(self, index: Any) -> Array:
        return self.dequantize()[index]

    def __iter__(self) -> Iterator[Array]:
        return iter(self.dequantize())

    def __len__(self) -> int:
        return len(self.dequantize())

    def __jax_array__(self) -> Array:
        return self.dequantize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dequantize(), dtype=dtype)

    @property
    def T(self) -> Array:
        return self.dequantize().T

    def __repr__(self) -> str:
        whole = all(hasattr(array, "dtype") for array in jax.tree.leaves(self))
        bits = f"{8 * self.nbytes / max(self.size, 1):.2f}" if whole else "unknown"
        return (
            f"BTCTensor(shape={self.shape}, dtype={np.dtype(self.dtype)}, bits={bits}, "
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
    check_order(order, np.shape(leaf), path)
    dtype = np.dtype(getattr(leaf, "dtype", float))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} is {dtype}; only floating arrays can be quantized")
    array = _gathered(jnp.asarray(leaf))
    if slope is not None and not 0 <= slope < 1e30:
        raise ValueError(f"{path}: slope is {slope!r}; it must be a number from 0 to 1e30")
    if codec.candidates != (codec,) or (codec.adaptive and slope is None):
        item = Item(path, lambda: array, array.shape, codec, order)
        (choice,), _ = allocate([item], usual_target([codec]), balance=0)
        codec, slope = choice.codec, choice.slope
    planes, header = coding.pack(array, codec, order, path, slope or 0.0)
    return BTCTensor(planes, header, array.shape, dtype, codec.stored, order)


def check_order(order: str, shape: tuple[int, ...], what: str) -> None:
    """Refuses an order that is unknown, or would transform axes that are too long for taps."""
    if order not in ORDERS:
        raise ValueError(f"{what}: order is {order!r}; it can be {', '.join(map(repr, ORDERS))}")
    if math.prod(taps := tap_sizes(shape, order)) > MAX_TAPS:
        raise ValueError(f"{what}: order {order!r} would transform axes of {taps}, more than {MAX_TAPS} taps in all")


def _gathered(leaf: Array) -> Array:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
        return jax.device_put(leaf, NamedSharding(sharding.mesh, PartitionSpec()))
    return leaf


def is_packed(x: Any) -> bool:
    """Whether `x` is a `BTCTensor`; the `is_leaf` of functions over trees that hold some."""
    return isinstance(x, BTCTensor)


def _refuse_changed_arrays(tensor: BTCTensor) -> None:
    """Raises if the arrays are not packed weights. JAX also builds nodes of other things, such as masks: those pass."""
    planes = [plane for plane in jax.tree.leaves(tensor.planes) if isinstance(plane, jax.Array | np.ndarray)]
    header = tensor.header if isinstance(tensor.header, dict) else {}
    changed = [plane.dtype for plane in planes if not jnp.issubdtype(plane.dtype, jnp.unsignedinteger)]
    for name, stored in tensor.codec.stored_header(0).items():
        array = header.get(name)
        if isinstance(array, jax.Array | np.ndarray) and array.dtype != stored.dtype:
            changed.append(array.dtype)
    if changed:
        raise TypeError(
            f"arrays of a packed leaf of shape {tensor.shape} became {changed[0]}. Packed weights cannot be cast or "
            "differentiated; decode the tree with btc_dequantize first"
        )
    if any(plane.ndim < 2 for plane in planes):
        raise TypeError(f"a packed leaf of shape {tensor.shape} cannot be sliced by lax.scan or vmap; decode it first")
    if _starts_with_zero(header.get(tensor.codec.witness)):
        raise TypeError(
            f"the header of a packed leaf of shape {tensor.shape} became zeros, as an optimizer's init makes them. "
            "Packed weights cannot be trained; decode the tree with btc_dequantize first, or train other leaves "
            "(optax.masked)"
        )


def _starts_with_zero(array: Any) -> bool:
    if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, Tracer) or array.size == 0:
        return False
    if isinstance(array, jax.Array) and (array.is_deleted() or not array.is_fully_addressable):
        return False
    with jax.ensure_compile_time_eval():  # nodes of constants are also built while others are traced
        first = np.asarray(array[(0,) * array.ndim])
    return not any(first.tobytes())


def _decoded_operator(name: str) -> Any:
    def operator(self: BTCTensor, *args: Any) -> Any:
        return getattr(self.dequantize(), name)(*args)

    return operator


# A user's own layer calculates with its parameters: `x @ self.w`, `self.w.T`.
for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    setattr(BTCTensor, f"__{_name}__", _decoded_operator(f"__{_name}__"))
    setattr(BTCTensor, f"__r{_name}__", _decoded_operator(f"__r{_name}__"))
for _name in ("neg", "pos", "abs", "lt", "le", "gt", "ge"):
    setattr(BTCTensor, f"__{_name}__", _decoded_operator(f"__{_name}__"))
for _name in (
    *("astype", "reshape", "transpose", "swapaxes", "ravel", "flatten", "squeeze"),
    *("sum", "mean", "min", "max", "std", "var", "dot"),
):
    setattr(BTCTensor, _name, _decoded_operator(_name))
