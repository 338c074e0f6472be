"""Networks on which the answers of quantizers are compared: weights, a forward pass, and inputs.

Networks without local files are skipped, with a line that says how to get them. Nothing is downloaded.
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
    """A network is not available; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """How far the answers moved from those of the float network, and how accurate they are.

    Attributes:
        kl: mean Kullback-Leibler divergence from the float network's answers, in nats per answer.
        worst: its 99th percentile.
        agreement: share of answers with the same top choice.
        score: the metric of the task: accuracy, or the log-likelihood for language models.
    """

    kl: float
    worst: float
    agreement: float
    score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Exam:
    """A network and its inputs.

    Attributes:
        name: its name in tables.
        params: the float tree, everything that `apply` reads.
        apply: `apply(params, inputs) -> logits [batch, ..., classes]`.
        inputs: the inputs, along the first axis.
        labels: the correct answers where known, else -1, `[batch, ...]`.
        sensitive: the function whose sensitivities are measured, if not `apply`.
        head: the kind of its output, as in `btc_sensitivity`.
        vocabulary: number of tokens, if the inputs are tokens.
        draws: number of channel permutations over which divergences are averaged; small networks need several.
        batch: inputs per forward pass.
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
        """A description: numbers of weights, inputs and draws."""
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
    """The networks that are available; `tell` gets one line for each that is not."""
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
        Missing: if it does not exist.
    """
    path = data / file
    if not path.is_file():
        raise Missing(f"{name}: no file {path}; name the folder that holds it with --data")
    return path
