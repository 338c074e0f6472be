"""btc_jax's own baselines."""

import numpy as np

from benchmarks.peers import Reconstruct
from btc_jax import Policy, Uniform
from btc_jax.baselines import Baseline, absmax4, apply_baseline, percentile8, uniform8

BASELINES = (uniform8(), percentile8(99.9), absmax4(32), absmax4(64), absmax4(128))
EVERYTHING = Policy(Uniform(), names=("*",), min_size=0, order="stored")


def formats() -> dict[str, tuple[str, Reconstruct]]:
    return {baseline.name: ("baselines", _reconstruct(baseline)) for baseline in BASELINES}


def _reconstruct(baseline: Baseline) -> Reconstruct:
    def reconstruct(leaf: np.ndarray) -> tuple[np.ndarray, int]:
        decoded, metrics = apply_baseline({"leaf": leaf}, baseline, policy=EVERYTHING)
        return np.asarray(decoded["leaf"]), 8 * metrics.leaves[0].bytes_after

    return reconstruct
