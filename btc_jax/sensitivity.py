"""How much an error of each leaf moves the answers of a model: the diagonal of its Fisher information.

An error `d` of the weights moves the answers by a Kullback-Leibler divergence of about `d' F d / 2`, where `F` is the
Fisher information: the mean square of the gradient of the log-likelihood of answers that the model gives itself
(Kullback 1959; Amari 1998, Neural Computation 10(2), 251). Quantization errors are nearly independent of one another,
so only the diagonal counts, and one number per leaf is enough to allocate bits over leaves.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._errors import LeafError
from btc_jax._inputs import Described, drawn, that_fit
from btc_jax._progress import tracked
from btc_jax._ties import first_paths
from btc_jax._typing import PyTree
from btc_jax.evaluate import Apply, batch_of, count_examples
from btc_jax.tensor import is_packed
from btc_jax.tree import flatten

Head = Literal["classification", "next-token", "regression", "loss"]
"""What a model returns; see `btc_sensitivity`."""

_SHAPES = {
    "classification": "[batch, classes]",
    "next-token": "[batch, length, vocabulary]",
    "regression": "[batch, ...]",
    "loss": "[batch]",
}


def btc_sensitivity(
    apply: Apply,
    params: PyTree,
    inputs: PyTree = None,
    *,
    head: Head | None = None,
    vocabulary: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> PyTree:
    """Measures how much errors of each leaf move the answers of a model, so that bits can go where they matter most.

    `btc_quantize(params, bits=4.5, sensitivity=tree)` uses the result, as does everything else that allocates bits for
    a target. It needs no data: random inputs of the right shape are nearly as informative as real ones.

    The sensitivity of a leaf is its mean Fisher information: the square of the gradient of the log-likelihood of an
    answer that is drawn from the model's own distribution, averaged over inputs and over the weights of the leaf. To
    second order, errors `d` move the answers by a KL of half the sum of `sensitivity * d ** 2` over all weights. Next
    to the tree, the gradients of one batch are in memory.

    Args:
        apply: `apply(params, inputs) -> outputs`, such as `lambda p, x: model.apply({"params": p}, x)`; the outputs of
            an example must not depend on the rest of its batch.
        params: the float tree: Linen variables, an NNX state, any pytree.
        inputs: an array, or a pytree of them, with examples along the first axis. A `jax.ShapeDtypeStruct` in place of
            an array is filled with random numbers: normal ones, or tokens of the vocabulary. By default, 64 random ones
            of the shape that the leaves imply, if they do: rows of numbers, or texts of 32 tokens.
        head: what `apply` returns. `"classification"` is logits `[batch, classes]`; `"next-token"` logits `[batch,
            length, vocabulary]`, each position an answer; `"regression"` numbers of any shape, whose errors count
            squared, with a variance of 1; and `"loss"` a loss `[batch]` of your own, as of `inputs` that hold labels.
            By default the first or the second, by the number of axes.
        vocabulary: number of tokens, for random inputs of an integer dtype.
        batch_size: examples per step. More are faster, mostly on accelerators, and take more memory.
        seed: seed of the random inputs and answers.
        progress: show a bar on a terminal.

    Returns:
        A tree like `params` with one float32 number for each leaf, in nats per squared unit of the weights; 0 for
        leaves that are not floating. A leaf at two paths (tied weights) counts once, and has the same number at both.
        `save` and `load` keep it in a file.

    Raises:
        ValueError: if the outputs fit no head; if `apply` does not accept the inputs; if there are no inputs, and no
            shape or several fit; if there is no vocabulary for random tokens; if the gradient of a leaf, named by its
            path, is NaN or infinite; or if the tree is packed.

    Examples:
        >>> import btc_jax, jax, jax.numpy as jnp
        >>> params = {"a": jnp.eye(3), "b": 9 * jnp.eye(3)}
        >>> apply = lambda p, x: x @ p["a"] @ p["b"]
        >>> found = btc_jax.btc_sensitivity(apply, params, jax.ShapeDtypeStruct((64, 3), jnp.float32))
        >>> bool(found["a"] > 20 * found["b"])
        True
    """
    if head not in (None, *get_args(Head)):
        raise ValueError(f"head is {head!r}; it can be {', '.join(map(repr, get_args(Head)))}")
    paths, leaves, treedef = flatten(params)
    values = dict(zip(paths, leaves, strict=True))
    first = first_paths(values)
    moving = {path: leaf for path, leaf in values.items() if first[path] == path and _is_floating(leaf)}
    _refuse_tree(values, moving)

    def answer(moved: dict[str, Any], examples: PyTree) -> Any:
        return apply(treedef.unflatten([moved.get(first[path], values[path]) for path in paths]), examples)

    draws, answers = jax.random.split(jax.random.key(seed))
    if inputs is None:
        inputs, vocabulary = that_fit(functools.partial(answer, moving), moving, vocabulary)
    inputs = drawn(Described(inputs, vocabulary), draws)
    examples = count_examples(inputs)
    if examples < 1 or batch_size < 1:
        raise ValueError(f"{examples} examples in batches of {batch_size}: both must be 1 or more")
    head = _head(answer, moving, inputs, head)
    # Gradients of a loss of the user's do not cancel in the sum over a batch.
    batch = 1 if head == "loss" else min(batch_size, examples)
    squares = _mean_squares(answer, moving, inputs, head, range(0, examples - batch + 1, batch), answers, progress)
    return treedef.unflatten([np.float32(squares.get(first[path], 0.0)) for path in paths])


def _mean_squares(
    answer: Callable[..., Any],
    moving: dict[str, Any],
    inputs: PyTree,
    head: Head,
    starts: range,
    key: jax.Array,
    progress: bool,
) -> dict[str, float]:
    """The mean over examples, in batches that begin at `starts`; a last one that is not full is left out."""
    step = jax.jit(squares_of(answer, head))
    total = dict.fromkeys(moving, 0.0)
    for start in tracked(starts, "measuring sensitivities", progress):
        found = step(moving, batch_of(inputs, start, starts.step), jax.random.fold_in(key, start))
        for path, square in jax.device_get(found).items():
            total[path] += float(square) / (len(starts) * starts.step)
    for path, square in total.items():
        if not np.isfinite(square):
            raise LeafError(path, "the gradient holds NaN or infinity for these inputs; try others, or float32 weights")
    return total


def squares_of(answer: Callable[..., Any], head: Head) -> Callable[..., dict[str, jax.Array]]:
    """A function of leaves, inputs and a key: the mean square of the gradient of each leaf."""

    def squares(moving: dict[str, Any], examples: PyTree, key: jax.Array) -> dict[str, jax.Array]:
        gradients = jax.grad(lambda moved: _loss(answer(moved, examples), head, key))(moving)
        return {path: jnp.mean(jnp.square(gradient.astype(jnp.float32))) for path, gradient in gradients.items()}

    return squares


def _loss(outputs: jax.Array, head: Head, key: jax.Array) -> jax.Array:
    """The sum over a batch of minus the log-likelihood of answers drawn from the model's own distribution.

    Its gradient has a mean of zero for each example and position. So the mean square of the gradient of the sum is the
    sum of the mean squares, and one gradient is enough for a batch.
    """
    outputs = outputs.astype(jnp.float32)
    fixed = jax.lax.stop_gradient(outputs)
    if head == "loss":
        return outputs.sum()
    if head == "regression":
        return jnp.sum(outputs * jax.random.normal(key, outputs.shape))
    labels = jax.random.categorical(key, fixed)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[..., None], axis=-1)
    # An answer is a token: the squares of all positions of a text add up, and are to be averaged.
    return -chosen.sum() / np.sqrt(outputs.shape[1] if head == "next-token" else 1).astype(np.float32)


def _refuse_tree(values: dict[str, Any], moving: dict[str, Any]) -> None:
    if packed := [path for path, leaf in values.items() if is_packed(leaf)]:
        raise ValueError(f"{packed[0]} is packed, and has no gradient; measure the float tree, or btc_dequantize(tree)")
    if not moving:
        raise ValueError("the tree has no floating leaf; pass the parameters of a model")


def _head(answer: Callable[..., Any], moving: dict[str, Any], inputs: PyTree, head: Head | None) -> Head:
    """The head that was named, or the one that the outputs look like.

    Raises:
        ValueError: if the inputs do not fit the function, or its outputs fit no head.
    """
    examples = batch_of(inputs, 0, 1)
    try:
        outputs = jax.eval_shape(answer, moving, examples)
    except Exception as error:
        raise ValueError(f"apply does not take inputs of {_described(examples)}: {error}") from error
    shape = outputs.shape if isinstance(outputs, jax.ShapeDtypeStruct) else None
    found = head or {2: "classification", 3: "next-token"}.get(len(shape or ()), "")
    axes = {"classification": 2, "next-token": 3, "loss": 1}.get(found, len(shape or ()))
    fits = shape is not None and len(shape) == axes > 0 and shape[0] == 1 and _is_floating(outputs)
    if not fits or not found or (head is None and shape is not None and shape[-1] < 2):
        what = f"{outputs.dtype} of shape {shape}" if shape is not None else type(outputs).__name__
        wanted = " or ".join(f"{_SHAPES[name]} for head={name!r}" for name in ([head] if head else get_args(Head)))
        raise ValueError(f"apply returns {what} for one example; floating outputs are needed, {wanted}")
    return found  # pyright: ignore[reportReturnType]


def _described(inputs: PyTree) -> str:
    return ", ".join(f"{np.asarray(leaf).dtype}{list(np.shape(leaf))}" for leaf in jax.tree.leaves(inputs))


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
