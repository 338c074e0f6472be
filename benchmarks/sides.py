"""One network quantized by one side, and the effect on its answers: the same leaves and draws for all sides."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import btc_jax
from benchmarks.exams import Exam
from benchmarks.peers import Peer
from btc_jax import Multilevel, Policy, btc_dequantize, btc_quantize, btc_sensitivity
from btc_jax.policy.kinds import order_of
from btc_jax.tree import decide, flatten

Row = dict[str, Any]
"""`name`, `budget` (bits requested from btc_jax), `effective` (bits), `KL`, `worst KL` (99th percentile),
`agreement`, `score`, `SQNR dB`."""

OURS = {
    "least error of the weights": lambda exam: "equal",
    "by shape": lambda exam: "shape",
    "sensitivities, random inputs": lambda exam: sensitivities(exam, real=False),
    "sensitivities, real inputs": lambda exam: sensitivities(exam, real=True),
}
"""Ways to allocate bits, by their names in tables: `sensitivity` for a network."""
INPUTS = 64

Decoded = tuple[Any, int]
"""A tree whose quantized leaves are dequantized again, and their stored bits."""


@functools.lru_cache(4)
def sensitivities(exam: Exam, real: bool) -> Any:
    shape = (INPUTS, *exam.inputs.shape[1:])
    dtype = jnp.dtype(jnp.int32 if exam.vocabulary else jnp.float32)
    inputs = exam.inputs[:INPUTS] if real else jax.ShapeDtypeStruct(shape, dtype)
    options: Any = {"head": exam.head, "vocabulary": exam.vocabulary}
    return btc_sensitivity(exam.sensitive or exam.apply, exam.params, inputs, **options)


def ours(exam: Exam, name: str, bits: float) -> Row:
    """The row of btc_jax at a budget."""
    sensitivity = OURS[name](exam)

    def quantize(tree: Any) -> Decoded:
        packed = btc_quantize(tree, bits=bits, sensitivity=sensitivity)
        nbytes = sum(leaf.nbytes for leaf in flatten(packed)[1] if btc_jax.is_packed(leaf))
        return btc_dequantize(packed), 8 * nbytes

    return _row(exam, f"btc_jax, {name}", quantize) | {"budget": bits}


def of_peer(exam: Exam, peer: Peer) -> Row:
    """The row of another quantizer."""

    def quantize(tree: Any) -> Decoded:
        paths, leaves, treedef = flatten(tree)
        bits, decoded = 0, []
        for path, leaf in zip(paths, leaves, strict=True):
            if path in quantized_paths(exam):
                leaf, stored = _in_torch_layout(peer, path, np.asarray(leaf))
                bits += stored
            decoded.append(leaf)
        return treedef.unflatten(decoded), bits

    return _row(exam, peer.name, quantize)


@functools.lru_cache(4)
def quantized_paths(exam: Exam) -> frozenset[str]:
    """The leaves that are quantized, on all sides."""
    return frozenset(how.path for how in decide(exam.params, Policy(Multilevel()))[1] if how.codec)


def _in_torch_layout(peer: Peer, path: str, leaf: np.ndarray) -> tuple[np.ndarray, int]:
    if order_of(path) == "stored":
        return peer.reconstruct(leaf)
    # Flax's (kh, kw, in, out) and (in, out) to PyTorch's (out, in, kh, kw) and (out, in).
    axes = (leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
    decoded, bits = peer.reconstruct(np.ascontiguousarray(leaf.transpose(axes)))
    return decoded.transpose(np.argsort(axes)), bits


def _row(exam: Exam, name: str, quantize: Callable[[Any], Decoded]) -> Row:
    draws = [_draw(exam, quantize, number) for number in range(exam.draws)]
    answers = [answer for answer, _, _ in draws]
    return {
        "name": name,
        "effective": max(bits for _, bits, _ in draws),
        "KL": _geometric([answer.kl for answer in answers]),
        "worst KL": _geometric([answer.worst for answer in answers]),
        "agreement": float(np.mean([answer.agreement for answer in answers])),
        "score": float(np.mean([answer.score for answer in answers])),
        "SQNR dB": float(np.mean([decibel for _, _, decibel in draws])),
    }


def _draw(exam: Exam, quantize: Callable[[Any], Decoded], number: int) -> tuple[Any, float, float]:
    """Answers, effective bits and SQNR of one draw."""
    permuted = Permuted(exam.params, quantized_paths(exam), number)
    decoded, bits = quantize(permuted.tree)
    back = permuted.back(decoded)
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for path, a, b in zip(*flatten(exam.params)[:2], flatten(back)[1], strict=True)
        if path in quantized_paths(exam)
    ]
    signal, noise = sum(np.sum(a * a) for a, _ in pairs), sum(np.sum((a - b) ** 2) for a, b in pairs)
    weights = sum(a.size for a, _ in pairs)
    return exam.answers(back), bits / weights, 10 * math.log10(signal / noise)


class Permuted:
    """A tree with the channels within some leaves permuted, and the inverse. Draw 0 is the tree itself."""

    def __init__(self, tree: Any, paths: frozenset[str], draw: int):
        found, leaves, self._treedef = flatten(tree)
        rng = np.random.default_rng(draw)
        self._places = [
            [rng.permutation(size) if draw and size > 3 else np.arange(size) for size in leaf.shape]
            if path in paths
            else None
            for path, leaf in zip(found, leaves, strict=True)
        ]
        self.tree = self._treedef.unflatten(
            [leaf if at is None else jnp.asarray(np.asarray(leaf)[np.ix_(*at)]) for leaf, at in self._with(leaves)]
        )

    def back(self, tree: Any) -> Any:
        leaves = [
            leaf if at is None else jnp.asarray(np.asarray(leaf, np.float32)[np.ix_(*map(np.argsort, at))])
            for leaf, at in self._with(flatten(tree)[1])
        ]
        return self._treedef.unflatten(leaves)

    def _with(self, leaves: list[Any]) -> Any:
        return zip(leaves, self._places, strict=True)


@dataclasses.dataclass
class Kept:
    """Rows of earlier runs, one file for each network."""

    folder: Path
    refresh: bool = False

    @functools.cached_property
    def library(self) -> str:
        """A short hash of btc_jax itself."""
        digest = hashlib.sha256()
        for file in sorted(Path(btc_jax.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]

    def row(self, exam: Exam, key: str, compute: Callable[[], Row]) -> Row:
        """The row for this key, computed if it is missing."""
        file = self.folder / f"{re.sub(r'[^a-z0-9]+', '-', exam.name.lower())}.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        key = f"{key} on {fingerprint(exam)}"
        if self.refresh or key not in known:
            known[key] = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(known, indent=1))
            os.replace(unfinished, file)
        return known[key]


@functools.lru_cache(4)
def fingerprint(exam: Exam) -> str:
    """A short hash of weights and inputs."""
    digest = hashlib.sha256(f"{exam.draws}".encode())
    for array in (*flatten(exam.params)[1], exam.inputs, exam.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def _geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-12)))))
