"""What the paper's column of bits averages: it says payload over layers, which can be interpreted in several ways.

An interpretation (a "reading") fixes which layers are included, what is averaged over, and how large the blocks are.
All are computed and ranked by their largest difference from Table 2 over the networks available.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from btc_jax import Uniform
from examples.paper.exams import Exam
from examples.paper.methods import BLOCK_SIZES, MAX_RMSE, swept

Row = dict[str, Any]
Layers = list[Row]
"""A row for each layer: path, shape, weights, payload, rmse."""


def layers_by_block(exam: Exam, block_sizes: Sequence[int] = BLOCK_SIZES) -> dict[str, Layers]:
    """Payload and error of each layer, at each block size (as text, for JSON)."""
    return {str(size): _layers(exam, size) for size in block_sizes}


def _layers(exam: Exam, size: int) -> Layers:
    _, metrics, _ = swept(exam, Uniform(size))
    assert metrics is not None
    pairs = [(leaf, leaf.measures) for leaf in metrics.leaves if leaf.measures]
    return [
        {"path": leaf.path, "shape": leaf.shape, "weights": m.weights, "payload": m.payload_bits, "rmse": m.rmse}
        for leaf, m in pairs
    ]


def over_weights(layers: Layers) -> tuple[float, float]:
    """Bits and error of all weights together."""
    weights = sum(layer["weights"] for layer in layers)
    bits = sum(layer["weights"] * layer["payload"] for layer in layers) / weights
    return bits, math.sqrt(sum(layer["weights"] * layer["rmse"] ** 2 for layer in layers) / weights)


def over_layers(layers: Layers) -> tuple[float, float]:
    """Means of the layers' bits and errors, in which a layer of 216 weights counts as much as one of 200,000."""
    return tuple(sum(layer[name] for layer in layers) / len(layers) for name in ("payload", "rmse"))  # pyright: ignore


def _is_classifier(layer: Row) -> bool:
    return len(layer["shape"]) == 2


def _is_spatial(layer: Row) -> bool:
    return len(layer["shape"]) == 4 and layer["shape"][0] > 1


TAKEN: dict[str, Callable[[Row], bool]] = {
    "all layers": lambda layer: True,
    "without the classifier": lambda layer: not _is_classifier(layer),
    "only 3x3 convolutions": _is_spatial,
}
MEANS = {"over weights": over_weights, "over layers": over_layers}
SEARCHED, PER_LAYER = "the search's block", "a block for each layer"


def readings() -> Iterator[tuple[str, str, str]]:
    """Every reading: layers, average, blocks."""
    yield from product(TAKEN, MEANS, (*(f"block {size}" for size in BLOCK_SIZES), SEARCHED, PER_LAYER))


def read(layers: dict[str, Layers], taken: str, mean: str, blocks: str) -> tuple[float, float]:
    """Bits and error of one network in one reading."""
    if blocks == PER_LAYER:
        chosen = [_largest_that_holds(same) for same in zip(*layers.values(), strict=True)]
    else:
        chosen = layers[searched_block(layers) if blocks == SEARCHED else blocks.removeprefix("block ")]
    return MEANS[mean]([layer for layer in chosen if TAKEN[taken](layer)])


def searched_block(layers: dict[str, Layers]) -> str:
    """The block size at which the paper's search stops, judged by the error alone."""
    held = list(layers)[:1]
    for size, rows in layers.items():
        if over_weights(rows)[1] > MAX_RMSE:
            break
        held.append(size)
    return held[-1]


def _largest_that_holds(same: tuple[Row, ...]) -> Row:
    """One layer at its largest block size before its own error exceeds the paper's limit."""
    held = same[0]
    for layer in same:
        if layer["rmse"] > MAX_RMSE:
            break
        held = layer
    return held


def ranked(networks: dict[str, dict[str, Layers]], paper: dict[str, Row]) -> list[Row]:
    """Readings from the best fit to the worst: the figures of each network, and the largest difference in bits.

    Args:
        networks: layers by block of each network, by name.
        paper: the paper's row for each.
    """
    rows = []
    for reading in readings():
        figures = {name: read(layers, *reading) for name, layers in networks.items()}
        off = max(abs(bits - paper[name]["btc_bits"]) for name, (bits, _) in figures.items())
        rows.append(dict(zip(("taken", "mean", "blocks"), reading, strict=True)) | {"off": off, "figures": figures})
    return sorted(rows, key=lambda row: row["off"])
