"""Evaluation of a model on labelled examples, with any weights.

The two sets can differ: accuracy is measured on exact examples, answers are compared on more of them. If only a few
exact CIFAR-10 images are available, the many JPEG versions show how far answers moved, but not how accurate they are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import btc_jax
from btc_jax.evaluate import evaluate_logits
from examples.paper.data import Labelled
from examples.paper.merged import Merged, merge
from examples.paper.store import Store, tree_digest

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
BATCH = 128
KEPT = 12
"""Sets of answers kept in memory, for a sweep over one network; those for ImageNet take 200 MB each."""


@dataclasses.dataclass(eq=False)
class Exam:
    """The answers of a model on two sets of examples.

    Attributes:
        apply: `apply(params, inputs) -> logits`.
        params: the float weights; the answers of all others are compared with theirs.
        example: one input, `[1, ...]`.
        known: the examples for accuracy and loss; `None` if there are none: then only bits and errors can be measured.
        compared: the examples that answers are compared on; may be `known` itself.
        identity: everything else that the answers depend on, such as the architecture and its batch norm statistics.
        store: where the float answers are kept, so that a resumed run does not compute them again.
    """

    apply: Apply
    params: PyTree
    example: np.ndarray
    known: Labelled | None = None
    compared: Labelled | None = None
    identity: str = ""
    store: Store | None = None
    _logits: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def merged(self) -> Merged:
        """The float kernels as few arrays, for sweeps."""
        return merge(self.params)

    def digests(self) -> dict[str, str]:
        """Checksums of everything that the answers depend on."""
        sets = {"known": self.known, "compared": self.compared}
        examples = {name: f"{one.name} {one.digest()}" if one else "" for name, one in sets.items()}
        return {"weights": tree_digest(self.params), "identity": self.identity} | examples

    def accuracy(self, tree: PyTree) -> float:
        """Share of correct answers, 0 to 1."""
        assert self.known is not None
        return float(np.mean(self.logits(tree, self.known).argmax(1) == self.known.labels))

    def logits(self, tree: PyTree, examples: Labelled) -> np.ndarray:
        """Answers with a dense or packed tree; each pair of weights and examples is computed once."""
        dense = btc_jax.btc_dequantize(tree)  # the same shape for every codec, so that one compiled model serves all
        key = (tree_digest(dense), examples.digest())
        if key not in self._logits:
            if len(self._logits) == KEPT:
                self._logits.pop(next(iter(self._logits)))
            self._logits[key] = self._computed(dense, examples, key, tree is self.params)
        return self._logits[key]

    def _computed(self, dense: PyTree, examples: Labelled, key: tuple[str, str], keep: bool) -> np.ndarray:
        def compute() -> np.ndarray:
            return btc_jax.btc_logits(self.apply, dense, examples.inputs, batch_size=BATCH, progress=True)

        if self.store is None or not keep:
            return compute()
        return self.store.array("float answers", {"identity": self.identity, "key": key}, compute)

    def figures(self, tree: PyTree) -> dict[str, Any]:
        """Accuracy with its standard error, loss, and agreement with and divergence from the float answers."""
        if self.known is None or self.compared is None:
            return {}
        known = evaluate_logits(self.logits(tree, self.known), self.known.labels, None, 5)
        reference = self.logits(self.params, self.compared)
        compared = evaluate_logits(self.logits(tree, self.compared), self.compared.labels, reference, 5)
        assert known.top1 is not None
        return {
            "accuracy": known.top1,
            "standard_error": math.sqrt(known.top1 * (1 - known.top1) / known.examples),
            "right": round(known.top1 * known.examples),
            "known": self.known.name,
            "loss": known.cross_entropy,
            "agreement": compared.agreement,
            "kl": compared.kl,
            "compared": self.compared.name,
            "compared_accuracy": compared.top1,
        }
