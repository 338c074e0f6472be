"""Makes the figures of a report, from two trees or from two files: one leaf of each in memory at a time."""

import dataclasses
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import PyTree
from btc_jax.baselines import Baseline, absmax4, measure_baseline, percentile8, uniform8
from btc_jax.checkpoint import open_checkpoint
from btc_jax.checkpoint.ties import home
from btc_jax.codecs import Codec
from btc_jax.compare import AnyCheckpoint, dense_nbytes, open_any
from btc_jax.leafspec import LeafSpec
from btc_jax.metrics import (
    LeafMetrics,
    LeafRow,
    TreeMetrics,
    btc_metrics,
    dict_of,
    measure_leaf,
    reason_of,
    storage_of,
    tied_row,
    tree_metrics,
)
from btc_jax.policy import Decision, Policy
from btc_jax.report.histogram import histogram
from btc_jax.report.records import BaselineFigures, LeafDetails
from btc_jax.report.report import Report
from btc_jax.tables import codec_cell
from btc_jax.tensor import BTCTensor, is_packed
from btc_jax.tree import one_policy

OnLeaf = Callable[[str, int], None]


def btc_report(
    params: PyTree,
    quantized: PyTree,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    baselines: bool = True,
    names: tuple[str, str] = ("original", "packed"),
) -> Report:
    """What quantization saved and cost, as a page: `btc_report(params, packed).save("report.html")`.

    Args:
        params: the tree that was quantized.
        quantized: what `btc_quantize` made of it.
        codec, policy: those given to `btc_quantize`; they tell the reasons of dense leaves.
        baselines: measure other quantizers on the same leaves. They are compiled for each shape, and take most of the
            time.
        names: what the report calls the two trees.

    Returns:
        The report. It prints as a table, and shows itself in a notebook; `html()` and `save(path)` make the page.

    Raises:
        ValueError: if the trees differ in paths or shapes, or nothing was quantized.

    Examples:
        >>> import btc_jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.linspace(-0.1, 0.1, 4096).reshape(64, 64), "bias": jnp.zeros(64)}
        >>> report = btc_jax.btc_report(params, btc_jax.btc_quantize(params))
        >>> [leaf.path for leaf in report.packed], report.widths
        (['kernel'], {8: 64})
        >>> [(baseline.name, baseline.nbytes) for baseline in report.baselines][0]
        ('uniform8', 4360)
    """
    metrics = btc_metrics(params, quantized, policy=one_policy(codec, policy))
    before, after = dict_of(params), dict_of(quantized)
    builder = _Builder(baselines)
    for leaf in metrics.leaves:
        if leaf.measures:
            tensor = after[leaf.path]
            builder.add(leaf, before[leaf.path], tensor, tensor.dequantize())
    return builder.report(metrics, names)


def report_files(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    *,
    baselines: bool = True,
    on_leaf: OnLeaf | None = None,
) -> Report:
    """The same for a compressed checkpoint and the one that it was made of.

    Args:
        before: a checkpoint of any kind that `quantize_file` reads, or a compressed one.
        after: a compressed checkpoint.
        baselines: as for `btc_report`.
        on_leaf: called after each leaf with its path and its bytes when dense.

    Returns:
        The report, as from `btc_report`.

    Raises:
        FileNotFoundError: if one of them does not exist.
        ValueError: if `after` is not compressed, one is damaged, or they differ in paths or shapes.

    Examples:
        >>> import btc_jax, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/net.npz", kernel=np.ones((64, 64), np.float32))
        ...     _ = btc_jax.quantize_file(f"{folder}/net.npz", f"{folder}/small.safetensors")
        ...     report = report_files(f"{folder}/net.npz", f"{folder}/small.safetensors", baselines=False)
        >>> report.metrics.bytes_before, report.widths
        (16384, {4: 64})
    """
    builder, rows = _Builder(baselines), []
    with open_any(before) as original, open_checkpoint(after) as compressed:
        if odd := sorted(original.leaves.keys() ^ compressed.records.keys()):
            raise ValueError(f"{before} and {after} differ: {odd[0]!r} is in only one of them ({len(odd)} such leaves)")
        decisions = _decisions(original)
        for path, record in compressed.records.items():
            if record.kind == "tied":
                rows.append(tied_row(path, record, home(record)))
                continue
            dense, leaf = original.read(path), compressed.read_numpy(path)
            leaf = jax.device_put(leaf) if is_packed(leaf) else leaf
            storage = storage_of(leaf) if is_packed(leaf) else None
            decoded = leaf.dequantize() if storage else leaf
            rows.append(measure_leaf(path, dense, decoded, storage, reason_of(decisions[path], storage)))
            if storage:
                builder.add(rows[-1][0], dense, leaf, decoded)
            if on_leaf:
                on_leaf(path, dense_nbytes(record.shape, record.dtype))
    if not builder.details:
        raise ValueError(f"{after} holds no packed leaf, so there is nothing to report")
    return builder.report(tree_metrics(rows), (Path(before).name, Path(after).name))


class _Builder:
    """Gathers what a report says of packed leaves besides their metrics, one leaf at a time."""

    def __init__(self, baselines: bool):
        self.details: dict[str, LeafDetails] = {}
        self._baselines: dict[Baseline, list[LeafRow]] = (
            {baseline: [] for baseline in (uniform8(), percentile8(), absmax4())} if baselines else {}
        )

    def add(self, leaf: LeafMetrics, original: Any, tensor: BTCTensor, decoded: Any) -> None:
        """A packed leaf with its metrics, its weights before, and its weights after."""
        measures, weights = leaf.measures, np.asarray(original)
        assert measures is not None
        rms = measures.rmse / measures.relative_rmse if measures.relative_rmse else _rms(weights)
        widths, counts = np.unique(np.asarray(tensor.widths), return_counts=True)
        self.details[leaf.path] = LeafDetails(
            codec=codec_cell(tensor.format.to_json(), tensor.order),
            widths=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
            before=histogram(weights, rms),
            after=histogram(np.asarray(decoded), rms),
            error_share=measures.weights * measures.rmse**2,  # a sum of squares, until all of them are known
        )
        for baseline, rows in self._baselines.items():
            rows.append(measure_baseline(leaf.path, weights, baseline, tensor.order))

    def report(self, metrics: TreeMetrics, names: tuple[str, str]) -> Report:
        total = sum(details.error_share for details in self.details.values()) or 1.0
        shares = {
            path: dataclasses.replace(details, error_share=details.error_share / total)
            for path, details in self.details.items()
        }
        packed = sum(leaf.bytes_after for leaf in metrics.leaves if leaf.measures)
        found = [(baseline.name, tree_metrics(rows)) for baseline, rows in self._baselines.items()]
        leaves = tuple(sorted(metrics.leaves, key=lambda leaf: _natural(leaf.path)))
        return Report(
            *names,
            metrics=dataclasses.replace(metrics, leaves=leaves),
            details=shares,
            baselines=tuple(
                BaselineFigures(name, metrics.bytes_after - packed + other.bytes_after, other.total)
                for name, other in found
            ),
            versions={name: version(name) for name in ("btc_jax", "jax")},
        )


def _decisions(original: AnyCheckpoint) -> dict[str, Decision]:
    """What the default policy says of the leaves of a file, which does not record the one it was made with."""
    specs = [LeafSpec(path, shape, _dtype(dtype)) for path, (shape, dtype) in original.leaves.items()]
    return {how.path: how for how in Policy().decide(specs)}


def _dtype(name: str) -> Any:
    """A dtype by name; `None` for what is not an array."""
    try:
        return jnp.dtype(name)
    except TypeError:
        return None


def _rms(weights: np.ndarray) -> float:
    return float(np.sqrt(np.square(weights.astype(np.float64)).mean())) if weights.size else 0.0


def _natural(path: str) -> list[Any]:
    """A key that sorts `layer_2` before `layer_10`, as the layers of a network follow each other."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
