"""How a packed leaf behaves as a `jax.Array`: one rule for all attributes, methods and operators."""

import contextlib
from typing import Any, NoReturn

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
_PLACES = {"sharding", "device", "devices", "committed", "is_fully_addressable", "is_fully_replicated"}


def behave_as_array(cls: Any) -> None:
    """Gives a class with `dequantize()` every public attribute and operator of `jax.Array` that it does not define.

    Each is that of the decoded array, except where the array lies, which its own arrays tell.
    """
    own = {*vars(cls), *cls.__annotations__}
    for name in sorted((set(dir(jax.Array)) - _OF_OBJECTS | _OPERATORS | _PLACES) - own):
        if name.startswith("_") and not name.startswith("__"):
            continue
        kind = _place if name in _PLACES else _operator if name.startswith("__") else _attribute
        setattr(cls, name, kind(name))
    _explain_to_lax(cls)


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.dequantize(), name))


def _place(name: str) -> property:
    return property(lambda self: getattr(jax.tree.leaves(self)[-1], name))  # the seal, which is always there


def _operator(name: str) -> Any:
    def operator(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.dequantize(), name)(*args, **kwargs)

    operator.__name__ = name
    return operator


def _explain_to_lax(cls: Any) -> None:
    """Functions of `jax.lax` take no array-likes. JAX's own error then speaks of `__jax_array__`; ours says what to do.

    There is no public place for this, so where JAX has moved it, its own error stays.
    """

    def refuse(leaf: Any) -> NoReturn:
        raise TypeError(
            f"{leaf!r} is passed to a function of jax.lax, which takes arrays only; pass leaf.dequantize(), or decode "
            "the tree where the model is called: model(btc_jax.btc_dequantize(params), x), also inside jax.jit"
        )

    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import core

        core.pytype_aval_mappings[cls] = refuse
