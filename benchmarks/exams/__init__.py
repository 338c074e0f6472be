"""Networks whose answers quantizers are compared by: weights, a forward pass, and questions.

What is not on this machine is left out, with a line that says how to get it. Nothing is downloaded.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax import btc_dequantize

PyTree = Any
DATA = Path(__file__).parents[3] / "shared" / "data"


class Missing(Exception):
    """A network is not on this machine; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """How far answers moved from those of the float network, and how good they are.

    Attributes:
        kl: mean Kullback-Leibler divergence from the float network's answers, in nats an answer.
        worst: its 99th percentile.
        agreement: share of answers with the same first choice.
        score: the metric of the task: accuracy, or for language models minus the negative log-likelihood.
    """

    kl: float
    worst: float
    agreement: float
    score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Exam:
    """A network and its questions.

    Attributes:
        name: what tables call it.
        params: the float tree, everything that `apply` reads.
        apply: `apply(params, inputs) -> logits [batch, ..., classes]`.
        inputs: the questions, the first axis counts them.
        labels: the right answers, as far as they are known, `[batch, ...]`.
        sensitive: the function whose sensitivities are measured, if it is not `apply`.
        head: what that gives, as `btc_sensitivity` calls it.
        vocabulary: number of tokens, of inputs that are tokens.
        draws: permutations of channels that divergences are averaged over; small networks need some.
        batch: questions at a time.
    """

    name: str
    params: PyTree
    apply: Callable[[PyTree, Any], Any]
    inputs: np.ndarray
    labels: np.ndarray
    sensitive: Callable[[PyTree, Any], Any] | None = None
    head: str = "classification"
    vocabulary: int | None = None
    draws: int = 3
    batch: int = 128

    @property
    def what(self) -> str:
        """Weights and questions, in words."""
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"{weights:,} weights, {len(self.inputs):,} inputs, {self.draws} draws"

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """Log-probabilities of the float network's answers, `[answers, classes]`."""
        return self._log_probabilities(self.params)

    def answers(self, tree: PyTree) -> Answers:
        """The answers with a dense or packed tree."""
        # Decoded before the call, so that all trees share one compiled forward pass.
        found, reference = self._log_probabilities(btc_dequantize(tree)), self.reference
        divergence = np.sum(np.exp(reference) * (reference - found), axis=1)
        labels = self.labels.reshape(-1)
        known = labels >= 0
        if self.head == "next-token":
            score = float(np.mean(found[np.flatnonzero(known), labels[known]]))
        else:
            score = float(np.mean(found[known].argmax(1) == labels[known])) if known.any() else float("nan")
        return Answers(
            float(divergence.mean()),
            float(np.percentile(divergence, 99)),
            float(np.mean(found.argmax(1) == reference.argmax(1))),
            score,
        )

    def _log_probabilities(self, params: PyTree) -> np.ndarray:
        starts = range(0, len(self.inputs), self.batch)
        found = [np.asarray(self._run(params, self.inputs[start : start + self.batch])) for start in starts]
        logits = np.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in found]).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    @functools.cached_property
    def _run(self) -> Callable[[PyTree, Any], jax.Array]:
        return jax.jit(self.apply)


def available(names: list[str] | None = None, tell: Callable[[str], None] = print, data: Path = DATA) -> Iterator[Exam]:
    """The networks that are here; `tell` hears one line of each that is not."""
    from benchmarks.exams import babyllama, minilm, tabular, vision

    makers = {**vision.EXAMS, **tabular.EXAMS, **minilm.EXAMS, **babyllama.EXAMS}
    for name in names or makers:
        if name not in makers:
            raise ValueError(f"there is no network {name}; there are {', '.join(makers)}")
        try:
            yield makers[name](data)
        except Missing as error:
            tell(f"left out: {error}")


def as_jax(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


def file_of(name: str, file: str, data: Path) -> Path:
    """A file of the folder `data`.

    Raises:
        Missing: it is not there.
    """
    path = data / file
    if not path.is_file():
        raise Missing(f"{name}: no file {path}; name the folder that holds it with --data")
    return path
