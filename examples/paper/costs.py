"""Table 1 in numbers, and Table 5: the time and memory of each quantizer, and what a block stores."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import btc_jax
from btc_jax import Uniform
from btc_jax.baselines import Baseline, _group, _reconstruct
from btc_jax.metrics import storage_of
from btc_jax.seal import SEAL
from examples.paper.published import table

Row = dict[str, Any]
SIDE, ROUNDS = 2048, 5


def leaf(seed: int = 0) -> np.ndarray:
    """16 MiB of weights, a quarter of their blocks above the paper's threshold."""
    generator = np.random.default_rng(seed)
    blocks = generator.standard_normal((SIDE * SIDE // 256, 256), np.float32)
    sigma = np.where(generator.random(len(blocks)) < 0.25, 0.08, 0.02).astype(np.float32)
    return (blocks * sigma[:, None]).reshape(SIDE, SIDE).T.copy()  # along a block in output-major order


def complexity() -> list[Row]:
    """Time of each quantizer on one leaf, as a multiple of copying the weights in memory, and its peak memory."""
    array = leaf()
    weights, copy = jnp.asarray(array), np.empty_like(array)
    calls = {"copy in memory": lambda: np.copyto(copy, array)}
    rows: dict[str, Row] = {"copy in memory": {"calibration": "", "header": 0.0, "peak": 1.0}}
    for kind, name in ((btc_jax.baselines.uniform8(), "uniform8"), (btc_jax.baselines.percentile8(), "percentile8")):
        calls[name], rows[name] = _baseline(weights, kind)
    for size in (64, 256):
        name = f"BTC {size}"
        calls[name], rows[name] = _btc(weights, Uniform(size))
        calls[f"{name}, packed"] = lambda size=size: btc_jax.packing.quantize_leaf(weights, Uniform(size)).planes
        rows[f"{name}, packed"] = rows[name] | {"peak": None}
    seconds = _medians(calls)
    base = seconds["copy in memory"]
    return [{"method": name, "ms": 1e3 * s, "copies": s / base} | rows[name] for name, s in seconds.items()]


def _baseline(weights: jax.Array, kind: Baseline) -> tuple[Callable[[], Any], Row]:
    group = _group(weights.shape, kind.group_size, "output-major")
    groups = weights.size // group
    row = {"calibration": "none", "header": kind.header_bits * groups / weights.size}
    peak = _peak(lambda w: _reconstruct(w, kind, group, "output-major"), weights)
    return lambda: _reconstruct(weights, kind, group, "output-major"), row | {"peak": peak}


def _btc(weights: jax.Array, codec: Uniform) -> tuple[Callable[[], Any], Row]:
    def both(w: jax.Array) -> Any:
        return btc_jax.btc_reconstruct({"kernel": w}, codec)

    run, header = jax.jit(both), storage_of(btc_jax.packing.quantize_leaf(weights, codec)).header_bits
    return lambda: run(weights), {
        "calibration": "none",
        "header": header / weights.size,
        "peak": _peak(both, weights),
    }


def _peak(function: Callable[..., Any], weights: jax.Array) -> float:
    """Memory beyond the weights, result included, relative to their size, as reported by the compiled program."""
    sizes: Any = jax.jit(function).lower(weights).compile().memory_analysis()
    return (sizes.output_size_in_bytes + sizes.temp_size_in_bytes) / weights.nbytes


def _medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call; the calls take turns in each round, and the first round compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def storage_breakdown() -> list[Row]:
    """Table 5 from packed leaves: what is stored for a block of each size, all narrow or all wide."""
    return [_stored(row["block_size"], row["bits"]) | {"published": row} for row in table(5)]


def _stored(size: int, bits: int) -> Row:
    # Not 0 or infinite: the codec would then have a single width, and store no bit for it.
    codec = Uniform(size, threshold=1e9 if bits == Uniform.low_bits else 1e-9)
    blocks = 64  # a multiple of 8, so that the bits of their widths fill bytes
    weights = np.random.default_rng(0).standard_normal((size, blocks), np.float32)
    storage = storage_of(btc_jax.packing.quantize_leaf(weights, codec))
    payload, header = storage.payload_bits // blocks, storage.header_bits // blocks
    assert (payload + header) * blocks == 8 * (storage.nbytes - SEAL.nbytes)
    return {"block_size": size, "bits": bits, "payload": payload, "header": header, "overhead": header / size}
