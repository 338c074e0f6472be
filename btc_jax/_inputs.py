"""Inputs that a model takes, drawn at random."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import PyTree
from btc_jax.policy.kinds import is_embedding, order_of

_EXAMPLES, _LENGTH = 64, 32
"""Examples that are drawn where none are given, and tokens of each."""
_IMAGES = (32, 28, 64, 96, 224, 384)
"""Heights and widths of images to try."""
REMEDY = (
    "give its shape, with as many examples as are to be drawn: inputs=jax.ShapeDtypeStruct((64, 32, 32, 3), 'float32')"
)


class Described(NamedTuple):
    """Inputs as shapes, and the number of tokens, for integers."""

    inputs: PyTree
    vocabulary: int | None = None


def drawn(described: Described, key: jax.Array) -> PyTree:
    """The inputs with random numbers in place of shapes: normal ones, or tokens of the vocabulary, all as likely.

    Raises:
        ValueError: if integers are requested without a vocabulary, or anything but numbers.
    """
    leaves, treedef = jax.tree.flatten(described.inputs)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten([_drawn(leaf, described.vocabulary, key) for leaf, key in zip(leaves, keys, strict=False)])


def _drawn(leaf: Any, vocabulary: int | None, key: jax.Array) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    what = f"inputs hold {leaf.dtype} of shape {leaf.shape} to be drawn at random"
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.asarray(jax.random.normal(key, leaf.shape, leaf.dtype))
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        raise ValueError(f"{what}, which cannot be; give an array")
    if vocabulary is None or vocabulary < 1:
        raise ValueError(f"{what}, and vocabulary is {vocabulary}; give the number of tokens, such as vocabulary=32000")
    return np.asarray(jax.random.randint(key, leaf.shape, 0, vocabulary, leaf.dtype))


def that_fit(apply: Callable[[PyTree], Any], leaves: Mapping[str, Any], vocabulary: int | None) -> Described:
    """The one kind of inputs that a model can take, as far as its leaves tell: tokens, or rows of numbers, or images.

    Args:
        apply: what the model does to one example.
        leaves: its leaves by path.
        vocabulary: number of tokens, if the inputs are tokens.

    Raises:
        ValueError: if none of those tried fits, or several do.
    """
    fitting = [found for found in _tried(leaves, vocabulary) if _fits(apply, found.inputs)]
    if len(fitting) == 1:
        return fitting[0]
    shapes = " and ".join(str(list(found.inputs.shape[1:])) for found in fitting[:2])
    why = f"examples of shapes {shapes} both fit the model" if fitting else "no shape that was tried fits the model"
    raise ValueError(f"inputs are not given, and {why}; {REMEDY}")


def _tried(leaves: Mapping[str, Any], vocabulary: int | None) -> list[Described]:
    rows = [leaf.shape[0] for path, leaf in leaves.items() if len(leaf.shape) == 2 and is_embedding(path)]
    if tokens := vocabulary or max(rows, default=0):
        return [Described(jax.ShapeDtypeStruct((_EXAMPLES, _LENGTH), jnp.dtype(jnp.int32)), tokens)]
    shapes = [shape for path, leaf in leaves.items() for shape in _shapes(path, leaf.shape)]
    return [
        Described(jax.ShapeDtypeStruct((_EXAMPLES, *shape), jnp.dtype(jnp.float32)))
        for shape in dict.fromkeys(shapes)
        if math.prod(shape)
    ]


def _shapes(path: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of one example, if this is the matrix of the first layer."""
    stored = order_of(path) == "stored"
    if len(shape) == 2:
        return [(shape[1] if stored else shape[0],)]
    return [(size, size, shape[2]) for size in _IMAGES] if len(shape) == 4 and not stored else []


def _fits(apply: Callable[[PyTree], Any], inputs: Any) -> bool:
    one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
    try:
        jax.eval_shape(apply, one)
    except Exception:  # whatever a model raises for inputs that do not fit it
        return False
    return True
