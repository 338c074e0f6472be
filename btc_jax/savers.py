"""Support for packed leaves in `flax.serialization` and `jax.export`.

(Orbax's own checkpointers need none: they store the arrays of a packed leaf, and restore it into a template.)
"""

import json
from typing import Any

import numpy as np
from flax import serialization
from jax import export

from btc_jax.checkpoint.manifest import canonical
from btc_jax.formats import Format, check_registered, format_from_json
from btc_jax.tensor import BTCTensor

NAME = "btc_jax.BTCTensor"


def register() -> None:
    """Register `BTCTensor` with both; importing `btc_jax` does it."""
    serialization.register_serialization_state(BTCTensor, _to_state, _from_state, override=True)
    export.register_pytree_node_serialization(
        BTCTensor, serialized_name=NAME, serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
    )


def _to_state(leaf: BTCTensor) -> dict[str, Any]:
    planes = {str(i): plane for i, plane in enumerate(leaf.planes)}
    return {
        "planes": planes,
        "header": dict(leaf.header),
        "seal": leaf.seal,
        NAME: _text(leaf.piece, leaf.dtype, leaf.format, leaf.order, leaf.stacks),
    }


def _from_state(target: BTCTensor, state: Any) -> BTCTensor:
    """The leaf that was saved, in any format and widths; `target` gives its shape and dtype."""
    if not isinstance(state, dict) or NAME not in state:
        raise ValueError(f"the state of a packed leaf of shape {target.shape} is of another kind of leaf")
    piece, dtype, form, order, stacks = _parsed(state[NAME])
    planes = tuple(state["planes"][str(i)] for i in range(len(state["planes"])))
    leaf = BTCTensor(planes, dict(state["header"]), piece, dtype, form, order, state["seal"], stacks)
    if (leaf.shape, dtype) != (target.shape, np.dtype(target.dtype)):
        found, here = f"{dtype}{list(leaf.shape)}", f"{target.dtype}{list(target.shape)}"
        raise ValueError(f"a packed leaf is {found} in the file, {here} here")
    return leaf


def _text(piece: tuple[int, ...], dtype: Any, form: Format, order: str, stacks: tuple[int, ...] | None) -> str:
    check_registered(form)
    return canonical([piece, np.dtype(dtype).name, form.to_json(), order, stacks])


def _parsed(text: str) -> tuple[tuple[int, ...], np.dtype, Any, Any, tuple[int, ...] | None]:
    piece, dtype, form, order, stacks = json.loads(text)
    return tuple(piece), np.dtype(dtype), format_from_json(form), order, None if stacks is None else tuple(stacks)


def _to_bytes(static: Any) -> bytes:
    return _text(*static).encode()


def _from_bytes(data: bytes) -> Any:
    return _parsed(bytes(data).decode())
