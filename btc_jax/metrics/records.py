"""The figures of a packed tree: bits, bytes and error, for each leaf and in total.

*Payload* bits are those of the codes of real weights, *header* bits all that is stored for blocks besides them, and
*effective* bits everything that is stored, per weight, including the padding of the last block and the seal of each
leaf.
"""

import dataclasses
import math
from typing import Any, ClassVar

from rich.table import Table

from btc_jax.coding import Error
from btc_jax.tables import Drawn, add_row, new_table, shape_cell

_SHORT = ("leaf", "shape", "reason", "bytes", "packed", "effective", "SQNR dB")
_FULL = (*_SHORT[:5], "wide", "payload", "header", "effective", "rmse", "rel. rmse", "SQNR dB", "largest")


@dataclasses.dataclass(frozen=True)
class Storage:
    """What is stored for one leaf, or for several.

    Attributes:
        weights: number of weights.
        blocks, wide_blocks: number of blocks, and of wide blocks.
        payload_bits: total bits of the codes of real weights.
        header_bits: bits of all headers.
        nbytes: bytes of everything stored.
    """

    weights: int = 0
    blocks: int = 0
    wide_blocks: int = 0
    payload_bits: int = 0
    header_bits: int = 0
    nbytes: int = 0

    def __add__(self, other: "Storage") -> "Storage":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Storage(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Measures:
    """The figures of one leaf, or of all quantized leaves together.

    Attributes:
        weights: number of weights.
        wide_share: share of blocks with the wide width, 0 to 1.
        payload_bits, header_bits, effective_bits: per weight.
        rmse: root of the mean squared error, in units of the weights.
        relative_rmse: `rmse` over the root mean square of the weights.
        sqnr_db: signal-to-quantization-noise ratio, `10 log10(sum w^2 / sum e^2)`, in dB; infinite without error.
        largest_error: largest absolute error of a weight.
    """

    weights: int
    wide_share: float
    payload_bits: float
    header_bits: float
    effective_bits: float
    rmse: float
    relative_rmse: float
    sqnr_db: float
    largest_error: float

    @classmethod
    def of(cls, storage: Storage, error: Error) -> "Measures":
        n = max(storage.weights, 1)
        relative = math.sqrt(error.errors / error.weights) if error.weights else math.inf if error.errors else 0.0
        return cls(
            weights=storage.weights,
            wide_share=storage.wide_blocks / max(storage.blocks, 1),
            payload_bits=storage.payload_bits / n,
            header_bits=storage.header_bits / n,
            effective_bits=8 * storage.nbytes / n,
            rmse=math.sqrt(error.errors / n),
            relative_rmse=relative,
            sqnr_db=-20 * math.log10(relative) if relative else math.inf,
            largest_error=error.largest,
        )


@dataclasses.dataclass(frozen=True)
class LeafMetrics:
    """One leaf.

    Attributes:
        path, shape, dtype: the leaf.
        reason: why it is packed, or is not.
        bytes_before, bytes_after: its bytes; 0 where it is the same array as one before it.
        measures: its figures, if it is packed and not tied to another.
        tied_to: path of the leaf that is the same array, or empty.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    reason: str
    bytes_before: int
    bytes_after: int
    measures: Measures | None
    tied_to: str = ""


@dataclasses.dataclass(frozen=True)
class TreeMetrics(Drawn):
    """The figures of a packed tree. `print` shows them as a table.

    Attributes:
        leaves: every leaf, in the order of the tree.
        total: the figures over all weights of quantized leaves.
        bytes_before, bytes_after: bytes of the whole tree, dense leaves included.
    """

    kinds: ClassVar[tuple[str, ...]] = ("bits", "error")

    leaves: tuple[LeafMetrics, ...]
    total: Measures
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; what is infinite becomes `None`."""
        return jsonable(self)

    def table(self, title: str = "Quantized leaves (bits per weight)", *, full: bool = False) -> Table:
        """A row for each leaf, dense ones with their reason, and the totals.

        Args:
            title: stands above the table.
            full: all figures, instead of those that fit in 80 columns.
        """
        columns = _FULL if full else _SHORT
        table = new_table(title, columns)
        for leaf in self.leaves:
            cells = {"leaf": leaf.path, "shape": shape_cell(leaf.shape), "reason": leaf.reason}
            cells |= {"bytes": f"{leaf.bytes_before:,}", "packed": "" if leaf.tied_to else "dense"}
            if leaf.measures:
                cells |= {"packed": f"{leaf.bytes_after:,}"} | _figures(leaf.measures)
            add_row(table, [cells.get(name, "") for name in columns], None if leaf.measures else "dim")
        table.add_section()
        cells = {"leaf": "all", "shape": f"{self.total.weights:,} weights"}
        cells |= {"bytes": f"{self.bytes_before:,}", "packed": f"{self.bytes_after:,}"} | _figures(self.total)
        add_row(table, [cells.get(name, "") for name in columns], "bold")
        return table

    def draw(self, ax: Any, kind: str) -> None:
        """Draws the effective bits of each packed leaf in the order of the tree, or its SQNR against its bits."""
        leaves = [(leaf.path, leaf.measures) for leaf in self.leaves if leaf.measures]
        bits = [m.effective_bits for _, m in leaves]
        if kind == "bits":
            ax.barh([path for path, _ in leaves], bits)
            ax.axvline(self.total.effective_bits, linestyle="--", color="0.3", label="all packed leaves")
            ax.invert_yaxis()
        else:
            largest = max((m.weights for _, m in leaves), default=1)
            ax.scatter(bits, [m.sqnr_db for _, m in leaves], s=[20 + 180 * m.weights / largest for _, m in leaves])
            ax.plot(self.total.effective_bits, self.total.sqnr_db, "*", color="0.3", label="all packed leaves")
            ax.set_ylabel("SQNR of the weights, dB (larger leaf, larger mark)")
        ax.set_xlabel("effective bits per weight")
        ax.legend()


def _figures(m: Measures) -> dict[str, str]:
    return {
        "wide": f"{m.wide_share:.1%}",
        "payload": f"{m.payload_bits:.3f}",
        "header": f"{m.header_bits:.3f}",
        "effective": f"{m.effective_bits:.3f}",
        "rmse": f"{m.rmse:.3g}",
        "rel. rmse": f"{m.relative_rmse:.2%}",
        "SQNR dB": f"{m.sqnr_db:.2f}",
        "largest": f"{m.largest_error:.3g}",
    }


def jsonable(value: Any) -> Any:
    """Records as plain JSON values; JSON has no infinity, so what is infinite or NaN becomes `None`."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
