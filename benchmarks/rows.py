"""One row of the comparison: the stored bits and errors of a set of weights, measured alike for all sides."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.networks import Params, WeightSet
from benchmarks.peers import Peer

Row = dict[str, Any]
"""`name`, `family`, `source`, `effective` (bits), `SQNR dB`, `relative dB`; `KL`, `agreement` and `accuracy` for a
network with an exam."""


def measured(weights: WeightSet, decoded: Params, bits: float, **names: str) -> Row:
    """The row for weights stored in `bits` in total and read back as `decoded`.

    `SQNR dB` is over all leaves together; `relative dB` averages each leaf's errors relative to its own power.
    """
    powers, noises, sizes = np.transpose([_sums(weights.params[path], decoded[path]) for path in weights.params])
    relative = np.sum(sizes * noises / np.maximum(powers, np.finfo(float).tiny)) / np.sum(sizes)
    row: Row = {**names, "effective": bits / weights.size}
    row |= {"SQNR dB": _decibel(np.sum(noises) / np.sum(powers)), "relative dB": _decibel(relative)}
    if weights.exam:
        result = weights.exam.evaluate(decoded)
        row |= {"KL": result.kl, "agreement": result.agreement, "accuracy": result.top1}
    return row


def peer_row(weights: WeightSet, peer: Peer, cache: Path, refresh: bool = False) -> Row:
    """The row of a peer, from the folder `cache` if the same version was measured on the same weights before."""
    file = cache / weights.name / (re.sub(r"[^a-z0-9]+", "-", peer.name.lower()).strip("-") + ".json")
    key = f"{peer.source} on {fingerprint(weights)}"
    return _cached(file, key, lambda: _peer_row(weights, peer), refresh)


def fingerprint(weights: WeightSet) -> str:
    """A short hash of all weights and of the exam."""
    digest = hashlib.sha256()
    arrays = dict(weights.params)
    if weights.exam:
        arrays |= weights.exam.rest | {"inputs": weights.exam.inputs, "labels": weights.exam.labels}
    for path, array in arrays.items():
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _peer_row(weights: WeightSet, peer: Peer) -> Row:
    results = {path: peer.reconstruct(array) for path, array in weights.params.items()}
    decoded = {path: result for path, (result, _) in results.items()}
    bits = sum(bits for _, bits in results.values())
    return measured(weights, decoded, bits, name=peer.name, family=peer.family, source=peer.source)


def _cached(file: Path, key: str, compute: Callable[[], Row], refresh: bool) -> Row:
    if not refresh and file.is_file():
        stored = json.loads(file.read_text())
        if stored["key"] == key:
            return stored["row"]
    row = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"key": key, "row": row}, indent=1))
    os.replace(unfinished, file)
    return row


def _sums(original: np.ndarray, decoded: np.ndarray) -> tuple[float, float, int]:
    """Sums of squares of weights and of errors, and the number of weights."""
    w = np.asarray(original, np.float64).reshape(-1)
    e = w - np.asarray(decoded, np.float64).reshape(-1)
    return float(w @ w), float(e @ e), w.size


def _decibel(noise: float) -> float:
    return float("inf") if noise == 0 else float(-10 * np.log10(noise))
