"""What quantization would do to each leaf, and how large the result would be, before doing it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
from rich.table import Table
from rich.text import Text

from btc_jax._ties import first_paths
from btc_jax._typing import PyTree
from btc_jax.allocate import Goal, Target, default_target, sharing_of
from btc_jax.choices import choose
from btc_jax.codecs import Codec
from btc_jax.coding import Recipe, nbytes_of
from btc_jax.formats import Format
from btc_jax.policy import Decision, Policy
from btc_jax.sizes import leaf_nbytes, nbytes_of_one_width
from btc_jax.tables import Shown, add_row, codec_cell, new_table, shape_cell
from btc_jax.tensor import is_packed
from btc_jax.tree import decide, one_policy


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One leaf of a plan.

    Attributes:
        path, shape, dtype: the leaf.
        codec: its codec; the format, if it is packed already; or `None` if it stays dense.
        order: its layout.
        reason: why it is packed, or is not.
        bytes_before: bytes of the leaf as it is; 0 if it is the same array as an earlier one.
        bytes_min, bytes_max: bytes after, if all its blocks took the narrowest width, and the widest. Equal for dense
            leaves, for codecs with one width, and where the blocks were measured.
        tied_to: path of the leaf that is the same array and has its bytes, or empty.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    codec: Codec | Format | None
    order: str
    reason: str
    bytes_before: int
    bytes_min: int
    bytes_max: int
    tied_to: str = ""


@dataclasses.dataclass(frozen=True)
class Plan(Shown):
    """A row for every leaf, in the order of the tree, and what a target implies for all of them. `print` shows it.

    Attributes:
        rows: the leaves.
        target: the target of the bit allocation, or `None`.
        limit: bytes that the target allows for the tree; `None` without one, or if that depends on the values.
        bytes_before: bytes of the tree as it is.
        bytes_min, bytes_max: the smallest and the largest result; the target counts.
    """

    rows: tuple[PlanRow, ...]
    target: Target | None = None
    limit: int | None = None

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_min(self) -> int:
        return sum(row.bytes_min for row in self.rows)

    @property
    def bytes_max(self) -> int:
        widest = sum(row.bytes_max for row in self.rows)
        return widest if self.limit is None else min(widest, self.limit)

    @property
    def note(self) -> str:
        """What the target implies, in words; empty where it implies nothing, or the sizes are exact."""
        if self.target is None or self.limit is None or self.bytes_min == self.bytes_max:
            return ""
        ratio = self.bytes_before / max(self.bytes_max, 1)
        value = format(self.target.value, ",.0f" if self.target.kind == "size" else "g")
        return f"{self.target.kind} of {value}: at most {self.bytes_max:,} bytes, {ratio:.2f} times smaller"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        rows = [dataclasses.asdict(row) | {"codec": row.codec and row.codec.to_json()} for row in self.rows]
        totals = {name: getattr(self, name) for name in ("bytes_before", "bytes_min", "bytes_max")}
        target = self.target and {"kind": self.target.kind, "value": self.target.value, "named": self.target.named}
        return totals | {"target": target, "leaves": rows}

    def table(self, title: str = "Plan", *, full: bool = False) -> Table:
        """A row for each leaf: whether it would be packed and why, and its bytes; as caption, what a target allows.

        Args:
            title: stands above the table.
            full: dtypes too.
        """
        columns = ("leaf", "shape", *(["dtype"] if full else []), "reason", "codec", "bytes", "after")
        table = new_table(title, columns)
        for row in self.rows:
            cells = {
                "leaf": row.path,
                "shape": shape_cell(row.shape),
                "dtype": row.dtype,
                "reason": row.reason,
                "codec": "dense" if row.codec is None else codec_cell(row.codec.to_json(), row.order),
                "bytes": f"{row.bytes_before:,}",
                "after": _range(row.bytes_min, row.bytes_max) if self._is_known(row) else "allocated",
            }
            add_row(table, [cells[name] for name in columns], None if row.codec else "dim")
        table.add_section()
        after = f"at most {self.bytes_max:,}" if self.note else _range(self.bytes_min, self.bytes_max)
        total = {"leaf": "all", "bytes": f"{self.bytes_before:,}", "after": after}
        add_row(table, [total.get(name, "") for name in columns], "bold")
        table.caption = Text(self.note) if self.note else None
        return table

    def _is_known(self, row: PlanRow) -> bool:
        """Whether the bytes of a leaf do not depend on the allocation of a target."""
        ranges = row.bytes_min < row.bytes_max and isinstance(row.codec, Codec) and row.codec.rate_controlled
        return not (self.note and ranges)


def btc_plan(
    params: PyTree,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    measure: bool = False,
    **goal: Unpack[Goal],
) -> Plan:
    """Which leaves `btc_quantize` would pack, why not the others, and the bytes of the result.

    Works on the tree that `jax.eval_shape(model.init, ...)` returns: values are not read, except to measure. Where a
    codec has several widths, the size of a leaf depends on the values, so the plan gives both ends of its
    range. A target of bits or size bounds the total: `bytes_max` is then what the target allows.

    Args:
        params: a pytree of arrays or `jax.ShapeDtypeStruct`.
        codec, policy, bits, size, rmse, sqnr_db, sensitivity, taps: as for `btc_quantize`.
        measure: read the values, allocate the bits, and count the blocks of each width. The sizes are then exact, to
            the byte.

    Returns:
        The plan: a row for each leaf, and the bytes of the tree before and after. It prints as a table.

    Raises:
        BTCPolicyError: if a rule fits no leaf.
        ValueError: if the target is unattainable, whatever the values.
        TypeError: if `measure` is asked of leaves without values.

    Examples:
        >>> import btc_jax, jax, jax.numpy as jnp
        >>> plan = btc_jax.btc_plan({"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32), "bias": jnp.zeros(64)})
        >>> [(row.path, row.reason, row.bytes_min, row.bytes_max) for row in plan.rows]
        [('bias', 'bias', 256, 256), ('kernel', 'default', 2316, 4364)]
        >>> btc_jax.btc_plan({"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, bits=4.5).note
        'bits of 4.5: at most 2,304 bytes, 7.11 times smaller'
    """
    sharing = sharing_of(**goal)
    policy = one_policy(codec, policy, sharing)
    leaves, decisions, _ = decide(params, policy)
    choices: list[Recipe | None] = [None] * len(leaves)
    if measure:
        for leaf, how in zip(leaves, decisions, strict=True):
            if how.codec is not None and isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(f"{how.path} is a ShapeDtypeStruct, without values to measure; leave out measure=True")
        choices = choose(leaves, decisions, sharing)
    return plan_of(leaves, decisions, choices, sharing.target)


def plan_of(
    leaves: Sequence[Any], decisions: Sequence[Decision], choices: Sequence[Recipe | None], target: Target | None = None
) -> Plan:
    """Build a Plan from leaves, decisions and, if measured, final choices.

    Raises:
        ValueError: if the target is unattainable, whatever the values.
    """
    paths = [how.path for how in decisions]
    first = first_paths(dict(zip(paths, leaves, strict=True)))
    before = [leaf_nbytes(leaf) if first[path] == path else 0 for path, leaf in zip(paths, leaves, strict=True)]
    rows = tuple(_row(*row) for row in zip(leaves, decisions, choices, before, strict=True))
    packed = [(row, how.codec) for row, how in zip(rows, decisions, strict=True) if how.codec and not how.tied_to]
    if target and packed and not any(choices):
        smallest, largest = (sum(getattr(row, end) for row in rows) for end in ("bytes_min", "bytes_max"))
        _refuse_unreachable(target, packed, smallest, largest)
    if target is None:
        packed = [(row, codec) for row, codec in packed if codec.rate_controlled]
        target = default_target([codec for _, codec in packed]) if packed else None
    return Plan(rows, target, target and _limit(target, rows, [row for row, _ in packed]))


def _limit(target: Target, rows: Sequence[PlanRow], packed: Sequence[PlanRow]) -> int | None:
    """Bytes of all rows that a target allows; `packed` are those that it constrains."""
    if target.kind == "size":
        return math.floor(target.value)
    if target.kind != "bits":
        return None
    others = sum(row.bytes_max for row in rows) - sum(row.bytes_max for row in packed)
    allowed = math.floor(target.value * _weights(packed) / 8)
    return others + max(allowed, sum(row.bytes_min for row in packed))


def _refuse_unreachable(target: Target, packed: Sequence[tuple[PlanRow, Codec]], smallest: int, largest: int) -> None:
    """As `btc_quantize` does, as far as the widths of the codecs tell."""
    target.refuse_fixed(codec for _, codec in packed)
    if target.kind == "size" and target.value < smallest:
        target.refuse(smallest, largest)
    rows = [row for row, _ in packed]
    low, high = (8 * sum(getattr(row, end) for row in rows) / _weights(rows) for end in ("bytes_min", "bytes_max"))
    if target.kind == "bits" and not low * (1 - 1e-9) <= target.value <= high * (1 + 1e-9):
        target.refuse(low, high)


def _weights(rows: Sequence[PlanRow]) -> int:
    return sum(math.prod(row.shape) for row in rows)


def _row(leaf: Any, how: Decision, choice: Recipe | None, before: int) -> PlanRow:
    low = high = 0 if how.tied_to else leaf_nbytes(leaf)
    if how.codec and not how.tied_to:
        low, high = _packed_range(leaf, how, choice)
    return PlanRow(
        path=how.path,
        shape=tuple(getattr(leaf, "shape", ())),
        dtype=str(getattr(leaf, "dtype", type(leaf).__name__)),
        codec=leaf.format if is_packed(leaf) else _codec_of(how, choice),
        order=leaf.order if is_packed(leaf) else choice.order if choice else how.order,
        reason=how.reason,
        bytes_before=before,
        bytes_min=low,
        bytes_max=high,
        tied_to=how.tied_to,
    )


def _codec_of(how: Decision, choice: Recipe | None) -> Codec | None:
    """Of several formats, the codec of the one that was chosen."""
    if choice is None or len(choice.codec.formats) == 1:
        return how.codec
    return choice.codec.decided(choice.form, choice.slope, choice.rms)


def _packed_range(leaf: Any, how: Decision, choice: Recipe | None) -> tuple[int, int]:
    if choice:
        exact = nbytes_of(leaf, choice)
        return exact, exact
    cut = how.cut
    count, size = (cut.total, math.prod(cut.piece(leaf.shape))) if cut else (1, math.prod(leaf.shape))
    forms = how.codec.formats if how.codec else ()
    ends = [count * nbytes_of_one_width(form, size, form.widths[end]) for form in forms for end in (0, -1)]
    return min(ends), max(ends)


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
