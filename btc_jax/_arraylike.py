"""Makes a packed leaf behave as a `jax.Array`: all public attributes, methods and operators by one rule."""

import contextlib
from typing import TYPE_CHECKING, Any

import jax

_OPERATORS = {
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__float__",
    "__int__",
    "__complex__",
    "__index__",
}
_OF_OBJECTS = {*dir(object), "__copy__", "__deepcopy__", "__module__", "__slots__", "__weakref__"}
_PLACES = {
    "sharding",
    "device",
    "devices",
    "committed",
    "is_deleted",
    "is_fully_addressable",
    "is_fully_replicated",
    "is_ready",
    "platform",
}
# Concrete arrays have these, `jax.Array` does not declare them.
_CONCRETE = {"aval", "clone", "tobytes", "tolist", "weak_type", "__dlpack__", "__dlpack_device__"}


class BehavesAsArray:
    """Base of a class with `dequantize()`: it gets every public attribute and operator of `jax.Array` that it lacks.

    Each is that of the decoded array, except for its placement, which its own arrays tell.
    """

    # As jax.Array: numpy arrays and numbers on the left of an operator leave it to the reflected one, also under jit.
    __array_priority__ = 100

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        __getitem__: Any
        __setitem__: Any
        __contains__: Any
        __add__: Any
        __radd__: Any
        __sub__: Any
        __rsub__: Any
        __mul__: Any
        __rmul__: Any
        __matmul__: Any
        __rmatmul__: Any
        __truediv__: Any
        __rtruediv__: Any
        __floordiv__: Any
        __rfloordiv__: Any
        __mod__: Any
        __rmod__: Any
        __pow__: Any
        __rpow__: Any
        __neg__: Any
        __pos__: Any
        __abs__: Any
        __round__: Any
        __lt__: Any
        __le__: Any
        __gt__: Any
        __ge__: Any
        __float__: Any
        __int__: Any
        __complex__: Any
        __index__: Any

    else:

        def __init_subclass__(cls) -> None:
            own = {*vars(cls), *cls.__annotations__}
            for name in sorted(((set(dir(jax.Array)) - _OF_OBJECTS) | _OPERATORS | _PLACES | _CONCRETE) - own):
                if name.startswith("_") and not name.startswith("__"):
                    continue
                setattr(cls, name, _kind(name)(name))
            _pass_to_lax(cls)


def _kind(name: str) -> Any:
    if name in _PLACES:
        return _place
    # Operators are looked up in the class, so they are functions there.
    is_operator = name.startswith("__") and not isinstance(getattr(jax.Array, name, None), property)
    return _operator if is_operator else _attribute


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.dequantize(), name))


def _place(name: str) -> property:
    return property(lambda self: getattr(jax.tree.leaves(self)[-1], name))  # the seal, which is always there


def _operator(name: str) -> Any:
    def operator(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.dequantize(), name)(*args, **kwargs)

    operator.__name__ = name
    return operator


def _pass_to_lax(cls: Any) -> None:
    """Functions of `jax.lax`, and layers that call them, take the decoded array.

    JAX has no public place for this, as `__jax_array__` is for `jax.numpy` only. Where the private one has moved, JAX's
    own error tells the user to convert the leaf.
    """
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        from jax._src import dtypes

        dtypes.canonicalize_value_handlers[cls] = lambda leaf: leaf.dequantize()
