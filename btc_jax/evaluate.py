"""Accuracy of a model, and how far its answers are from those of the float model, for any apply function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from btc_jax._progress import tracked
from btc_jax._typing import PyTree
from btc_jax.fusion import fused
from btc_jax.processes import on_host

Apply = Callable[[PyTree, Any], Any]
"""`apply(params, inputs) -> logits [batch, ..., classes]`, such as `lambda p, x: model.apply({"params": p}, x)`."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How good a model's answers are, and how far from those of the float model.

    Attributes:
        examples: number of answers: of examples, or of all positions of the texts.
        top1, topk: share of answers, 0 to 1, whose label has the largest logit, and one of the `k` largest; `None`
            without labels.
        k: the `k` of `topk`, at most the number of classes.
        cross_entropy: mean negative log-likelihood of the labels, in nats; `None` without labels.
        agreement: share of answers that are the float model's, 0 to 1; `None` without reference.
        kl: mean Kullback-Leibler divergence from the float model's distribution to this one, in nats; `None` without.
    """

    examples: int
    top1: float | None
    topk: float | None
    k: int
    cross_entropy: float | None
    agreement: float | None = None
    kl: float | None = None


def btc_logits(
    apply: Apply, params: PyTree, inputs: PyTree, *, batch_size: int = 256, progress: bool = False
) -> np.ndarray:
    """Logits of a model on all inputs, computed in jitted batches on jax's default device.

    Packed leaves are decoded one at a time; see `fused`.

    Args:
        apply: `apply(params, inputs) -> logits [batch, ..., classes]`; each example's logits must not depend on the
            rest of its batch.
        params: dense or packed tree.
        inputs: array, or pytree of arrays, with examples along the first axis. The last batch may be short.
        batch_size: examples per call.
        progress: show a bar on a terminal.

    Returns:
        float32 logits `[examples, ..., classes]`.

    Raises:
        ValueError: if there are no examples, or `apply` does not return `[batch, ..., classes]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> btc_logits(apply, {"kernel": jnp.ones((3, 2))}, jnp.ones((4, 3))).shape
        (4, 2)
    """
    examples = count_examples(inputs)
    batch = min(batch_size, examples)
    if batch < 1:
        raise ValueError(f"{examples} examples in batches of {batch_size}: both must be 1 or more")
    run = jax.jit(fused(apply))
    starts = range(0, examples, batch)
    outputs = [_logits(run(params, batch_of(inputs, i, batch)), batch) for i in tracked(starts, "evaluating", progress)]
    return np.concatenate(outputs)[:examples]


def btc_evaluate(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    labels: Any = None,
    *,
    reference: Any = None,
    batch_size: int = 256,
    top_k: int = 5,
    progress: bool = False,
) -> Evaluation:
    """Evaluates a classifier or a language model with dense or packed parameters.

    Args:
        apply, params, inputs, batch_size, progress: as for `btc_logits`.
        labels: the correct class of each answer, integers `[examples, ...]`; `None` compares with `reference` only.
        reference: the float model's logits on the same inputs, from `btc_logits`; for agreement and divergence.
        top_k: the `k` of the top-k accuracy.

    Returns:
        The figures; all are NaN if a logit is NaN or infinite. A class masked with -inf counts for nothing.

    Raises:
        ValueError: if labels or reference do not fit the inputs or the classes, there is neither, or `top_k` is below
            1.

    Examples:
        >>> import jax.numpy as jnp
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> inputs, labels = jnp.eye(3), [0, 1, 1]
        >>> evaluation = btc_evaluate(apply, {"kernel": 9.0 * jnp.eye(3)}, inputs, labels)
        >>> round(evaluation.top1, 3), evaluation.topk
        (0.667, 1.0)
    """
    if labels is None and reference is None:
        raise ValueError("there are neither labels nor a reference to compare with; give reference=btc_logits(...)")
    logits = btc_logits(apply, params, inputs, batch_size=batch_size, progress=progress)
    known = None if labels is None else np.asarray(labels)
    return evaluate_logits(logits, known, None if reference is None else np.asarray(reference), top_k)


def evaluate_logits(
    logits: np.ndarray, labels: np.ndarray | None, reference: np.ndarray | None, top_k: int
) -> Evaluation:
    """The figures of logits `[examples, ..., classes]`; see `btc_evaluate`."""
    _check_fit(logits, labels, reference)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    logits = logits.reshape(-1, logits.shape[-1])
    reference = None if reference is None else reference.reshape(logits.shape)
    k, nan = min(top_k, logits.shape[1]), float("nan")
    if not _is_distribution(logits):
        compared = () if reference is None else (nan, nan)
        return Evaluation(len(logits), *((None, None, k, None) if labels is None else (nan, nan, k, nan)), *compared)
    compared = () if reference is None else _compared(reference, logits)
    if labels is None:
        return Evaluation(len(logits), None, None, k, None, *compared)
    return Evaluation(len(logits), *_rated(logits, labels.reshape(-1), k), *compared)


def _rated(logits: np.ndarray, labels: np.ndarray, k: int) -> tuple[float, float, int, float]:
    """The first figures of an `Evaluation`."""
    rows = np.arange(len(labels))
    own = logits[rows, labels][:, None]
    # Among equal logits the first class leads, as in argmax.
    ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    rank = ahead.sum(axis=1)
    likelihood = _log_softmax(logits)[rows, labels]
    return float(np.mean(rank < 1)), float(np.mean(rank < k)), k, float(-np.mean(likelihood))


def _compared(reference: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Agreement, and mean divergence from the reference's distribution. A class without probability adds nothing."""
    if not _is_distribution(reference):
        return float("nan"), float("nan")
    logp, logq = _log_softmax(logits), _log_softmax(reference)
    ratio = np.subtract(logq, logp, out=np.zeros_like(logq), where=np.isfinite(logq))
    agreement = np.mean(reference.argmax(1) == logits.argmax(1))
    return float(agreement), float(np.mean(np.sum(np.exp(logq) * ratio, axis=1)))


def _is_distribution(logits: np.ndarray) -> bool:
    """Whether every row has a softmax: no NaN, no infinity but -inf, and not only that."""
    return bool(np.isfinite(logits.max(axis=1)).all())


def _logits(output: Any, batch: int) -> np.ndarray:
    shape = getattr(output, "shape", None)
    if shape is None or len(shape) < 2 or shape[0] != batch:
        what = type(output).__name__ if shape is None else f"shape {shape}"
        raise ValueError(f"apply returned {what} for {batch} examples; it must return logits [batch, ..., classes]")
    return on_host(output).astype(np.float32, copy=False)


def count_examples(inputs: PyTree) -> int:
    shapes = {np.shape(x) for x in jax.tree.leaves(inputs)}
    if not shapes or () in shapes:
        raise ValueError(
            "inputs hold no array, or a plain number; pass an array, or a pytree of them, with examples along the "
            "first axis"
        )
    counts = {shape[0] for shape in shapes}
    if len(counts) != 1:
        raise ValueError(f"inputs hold arrays of {sorted(counts)} examples; all need the same first axis")
    return counts.pop()


def batch_of(inputs: PyTree, start: int, size: int) -> PyTree:
    """Examples from `start`; a short batch is padded with its last example, so that shapes, and compiled code, stay the
    same."""

    def take(x: Any) -> Any:
        rows = np.minimum(np.arange(start, start + size), len(x) - 1)
        return x[rows]

    return jax.tree.map(take, inputs)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _check_fit(logits: np.ndarray, labels: np.ndarray | None, reference: np.ndarray | None) -> None:
    *answers, classes = logits.shape
    if labels is not None:
        if labels.shape != tuple(answers):
            raise ValueError(f"labels have shape {labels.shape}; {len(logits)} examples need {tuple(answers)}")
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"labels are {labels.dtype} in {labels.min()}..{labels.max()}; integers in 0..{classes - 1} are needed"
            )
    if reference is not None and reference.shape != logits.shape:
        raise ValueError(f"reference has shape {reference.shape}; the model's logits have {logits.shape}")
