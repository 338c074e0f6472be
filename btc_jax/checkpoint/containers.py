"""Containers of Flax that a file can describe: the variables of NNX, with their metadata, and the boxes of Linen.

A file names a class only where it is one of Flax itself. Metadata are plain values; a tuple is a JSON array, and what
JSON does not have is an object with one key: `list`, `dict` or `spec` (a `PartitionSpec`).

NNX takes longer to import than all of this package, so only a file that holds something of it imports it.
"""

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
from jax.sharding import PartitionSpec

if TYPE_CHECKING:
    import flax.nnx

_BOXES = {kind.__name__: kind for kind in (nn.Partitioned, nn.LogicallyPartitioned)}

_USUAL = {"hijax": False, "ref": False, "eager_sharding": True}
"""Metadata that every variable has. How arrays are held (`hijax`, `ref`) belongs to the process, not to the values."""

_OF_THE_PROCESS = ("hijax", "ref")


def nnx_class(name: str) -> Any:
    """A class of NNX for `isinstance`; `()`, which nothing is an instance of, if NNX is not imported."""
    return getattr(sys.modules.get("flax.nnx"), name, ())


@functools.cache
def _variables() -> dict[str, type["flax.nnx.Variable"]]:
    """The variables of NNX itself, by name.

    One of a class of the user's comes back as the nearest of these: a file must not import its class.
    """
    from flax import nnx

    kinds = [kind for kind in vars(nnx).values() if isinstance(kind, type) and issubclass(kind, nnx.Variable)]
    return {kind.__name__: kind for kind in kinds}


def variable_class(variable: "flax.nnx.Variable") -> type["flax.nnx.Variable"]:
    """The class of NNX itself that is nearest to that of a variable."""
    return next(kind for kind in type(variable).__mro__ if _variables().get(kind.__name__) is kind)


def variable_metadata(variable: "flax.nnx.Variable") -> tuple[dict[str, Any], list[str]]:
    """The metadata that a file keeps, as JSON, and the names of those that it cannot keep."""
    kept, lost = {}, []
    for name, value in sorted(variable.get_metadata().items()):
        if name in _OF_THE_PROCESS or (name in _USUAL and value == _USUAL[name]):
            continue
        try:
            kept[name] = to_json(value)
        except TypeError:
            lost.append(name)
    return kept, lost


def make_variable(name: Any, value: Any, metadata: Any) -> "flax.nnx.Variable":
    """The variable of a file.

    Raises:
        ValueError: if there is no such class, or its metadata is invalid.
    """
    if name not in _variables() or not isinstance(metadata, dict) or any(key in metadata for key in _OF_THE_PROCESS):
        raise ValueError(f"there is no variable {str(name)[:40]!r} of NNX with {str(metadata)[:60]}")
    return _variables()[name].from_metadata(value, _USUAL | {key: from_json(item) for key, item in metadata.items()})


def is_box(tree: Any) -> bool:
    """Whether it is a box of Linen that a file can describe."""
    return _BOXES.get(type(tree).__name__) is type(tree)


def box_names(box: Any) -> tuple[Any, list[str]]:
    """The names of a box, as JSON, and the names of the fields that a file does not keep."""
    lost = [name for name in ("mesh", "rules") if getattr(box, name, None) is not None]
    return to_json(tuple(box.names)), lost


def make_box(name: Any, value: Any, names: Any) -> Any:
    """The box of a file.

    Raises:
        ValueError: if there is no such box, or it has other names.
    """
    if name not in _BOXES or not isinstance(names, list):
        raise ValueError(f"there is no box {str(name)[:40]!r} of Linen with the names {str(names)[:60]}")
    return _BOXES[name](value, from_json(names))


def to_json(value: Any) -> Any:
    """A plain value as JSON.

    Raises:
        TypeError: if it is not plain.

    Examples:
        >>> to_json(("a", None, [1.5]))
        ['a', None, {'list': [1.5]}]
    """
    if value is None or type(value) in (bool, int, str) or (type(value) is float and value - value == 0):
        return value
    if type(value) is tuple:
        return [to_json(item) for item in value]
    if type(value) is list:
        return {"list": [to_json(item) for item in value]}
    if type(value) is PartitionSpec:
        return {"spec": [to_json(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    raise TypeError(f"{str(value)[:60]} ({type(value).__name__}) is not a plain value")


def from_json(value: Any) -> Any:
    """Inverse of `to_json`.

    Raises:
        ValueError: if the JSON is of another form.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    ((kind, items),) = value.items()
    if kind == "dict" and isinstance(items, dict):
        return {key: from_json(item) for key, item in items.items()}
    if kind not in ("list", "spec") or not isinstance(items, list):
        raise ValueError(f"metadata have the unknown form {str(value)[:60]}")
    restored = [from_json(item) for item in items]
    return restored if kind == "list" else PartitionSpec(*restored)
