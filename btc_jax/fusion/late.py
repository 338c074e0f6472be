"""A leaf whose decoding is deferred, and the views taken of it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from btc_jax._typing import Array
from btc_jax.blocks import axes, inverse, tap_sizes
from btc_jax.primitives import decode_p
from btc_jax.primitives.whole import arguments

VIEWS = {"transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "copy", "copy_p"}
"""Primitives that can be deferred together with the decoding of a leaf."""


class Late(NamedTuple):
    """Operands of `decode_p`, and the equations that make a value of them: the decoding first, then views."""

    arrays: Sequence[Any]
    steps: tuple[JaxprEqn, ...]

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the decoding."""
        return self.steps[0].params

    @property
    def dtype(self) -> Any:
        return result_of(self.steps[-1]).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(result_of(self.steps[-1]).shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of its arrays: those of a stack of leaves."""
        return arguments(self.arrays, self.params["names"], self.params["waits"])[2].shape[:-1]

    def waiting(self, after: Array | None) -> tuple[list[Any], dict[str, Any]]:
        """Operands and parameters of a decoding that begins once an array is computed."""
        if after is None or self.params["waits"]:
            return list(self.arrays), self.params
        return [*self.arrays, after], {**self.params, "waits": True}

    def decoded(self, after: Array | None) -> Any:
        """The value."""
        arrays, params = self.waiting(after)
        value = decode_p.bind(*arrays, **params)
        for view in self.steps[1:]:
            (value,) = bind(view, [value])
        return value


def result_of(eqn: JaxprEqn) -> Any:
    """Shape and dtype of the first result of an equation."""
    return eqn.outvars[0].aval


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The results of one equation."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


class Layout(NamedTuple):
    """How the weights of a late leaf are laid out, if a kernel can use that.

    Attributes:
        sizes: sizes of its axes, in the order in which the weights run through the blocks.
        dims: for each dimension of the value, the axes it is made of, outermost first.
        rounding: the dtype that the weights were rounded to, `float32` or `bfloat16`.
    """

    sizes: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    rounding: Any


def layout_of(late: Late) -> Layout | None:
    """The layout of a leaf that is whole, not transformed, and seen through views of its axes only."""
    shape, order, lead = late.params["shape"], late.params["order"], late.lead
    dtypes = {jnp.dtype(late.params["dtype"]), *(jnp.dtype(result_of(step).dtype) for step in late.steps)}
    if math.prod(lead) != 1 or math.prod(tap_sizes(shape, order)) > 1 or not dtypes <= {*_DTYPES}:
        return None
    permutation = axes(len(shape), order)
    sizes = tuple(shape[axis] for axis in permutation)
    dims: list[tuple[int, ...]] = [*[()] * len(lead), *((place,) for place in inverse(permutation))]
    for view in late.steps[1:]:
        found = _seen(view, dims, sizes)
        if found is None:
            return None
        dims = found
    rounding = _DTYPES[1] if _DTYPES[1] in dtypes else _DTYPES[0]
    # An axis of length 1 lies anywhere.
    return Layout(sizes, tuple(tuple(axis for axis in dim if sizes[axis] > 1) for dim in dims), rounding)


_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def _seen(view: JaxprEqn, dims: list[tuple[int, ...]], sizes: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """The axes that the dimensions of a value are made of after a view of it."""
    before = [math.prod(sizes[axis] for axis in dim) for dim in dims]
    after = result_of(view).shape
    match view.primitive.name:
        case "transpose":
            return [dims[i] for i in view.params["permutation"]]
        case "squeeze":
            return [dim for i, dim in enumerate(dims) if i not in view.params["dimensions"]]
        case "broadcast_in_dim":
            if math.prod(after) != math.prod(before):
                return None
            given = dict(zip(view.params["broadcast_dimensions"], dims, strict=True))
            return [given.get(i, ()) for i in range(len(after))]
        case "reshape":
            return _merged(dims, before, after) if view.params.get("dimensions") is None else None
        case _:
            return dims


def _merged(
    dims: Sequence[tuple[int, ...]], before: Sequence[int], after: Sequence[int]
) -> list[tuple[int, ...]] | None:
    """The axes of the dimensions of a reshaped value, each a product of whole axes."""
    queue = [axes for dim, size in zip(dims, before, strict=True) if size > 1 for axes in [(dim, size)]]
    found = []
    for size in after:
        here: tuple[int, ...] = ()
        while size > 1:
            if not queue or size % queue[0][1]:
                return None
            dim, own = queue.pop(0)
            here, size = here + dim, size // own
        found.append(here)
    return found


def first(value: Any) -> Array:
    """A number of an array, to wait for."""
    return jnp.asarray(value).reshape(-1)[0].astype(jnp.float32)


def can_wait_for(value: Any) -> bool:
    """Whether a value is an array of floats, as activations are."""
    if isinstance(value, Late):
        return False
    aval = jax.typeof(value)
    return bool(np.prod(aval.shape)) and jnp.issubdtype(aval.dtype, jnp.floating)
