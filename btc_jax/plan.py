"""What quantization would do to each leaf, and how large the result would be, before doing it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from btc_jax._typing import PyTree
from btc_jax.allocate import Choice, target_of
from btc_jax.codecs import Codec
from btc_jax.coding import count_widths, packed_nbytes
from btc_jax.policy import Decision, Policy
from btc_jax.tensor import is_packed
from btc_jax.tree import choose, decide, leaf_nbytes, one_policy


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One leaf of a plan.

    Attributes:
        path, shape, dtype: the leaf.
        codec: its codec, or `None` if it stays dense.
        order: how its weights would run through the blocks.
        reason: why it is taken, or is not.
        bytes_before: bytes of the leaf as it is.
        bytes_min, bytes_max: bytes after, if all its blocks took the narrowest width, and the widest. Equal for dense
            leaves, for codecs with one width, and where the blocks were measured.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    codec: Codec | None
    order: str
    reason: str
    bytes_before: int
    bytes_min: int
    bytes_max: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A row for every leaf, in the order of the tree."""

    rows: tuple[PlanRow, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_min(self) -> int:
        return sum(row.bytes_min for row in self.rows)

    @property
    def bytes_max(self) -> int:
        return sum(row.bytes_max for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        rows = [dataclasses.asdict(row) | {"codec": row.codec and row.codec.to_json()} for row in self.rows]
        totals = {name: getattr(self, name) for name in ("bytes_before", "bytes_min", "bytes_max")}
        return totals | {"leaves": rows}


def btc_plan(
    params: PyTree,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    bits: float | None = None,
    size: float | str | None = None,
    rmse: float | None = None,
    sqnr_db: float | None = None,
    measure: bool = False,
) -> Plan:
    """Which leaves `btc_quantize` would take, why not the others, and the bytes of the result.

    Works on the tree that `jax.eval_shape(model.init, ...)` returns: values are not touched, unless `measure` asks for
    it. Where a codec has several widths, the size depends on the values, so the plan gives both ends of its range.

    Args:
        params: a pytree of arrays or `jax.ShapeDtypeStruct`.
        codec, policy, bits, size, rmse, sqnr_db: as for `btc_quantize`.
        measure: read the values, share out the bits, and count the blocks of each width. The sizes are then exact, to
            the byte.

    Raises:
        BTCPolicyError: a rule fits no leaf.
        TypeError: `measure` is asked of leaves without values.

    Example:
        >>> import btc_jax, jax, jax.numpy as jnp
        >>> plan = btc_jax.btc_plan({"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32), "bias": jnp.zeros(64)})
        >>> [(row.path, row.reason, row.bytes_min, row.bytes_max) for row in plan.rows]
        [('bias', 'bias', 256, 256), ('kernel', 'default', 2312, 4360)]
    """
    target = target_of(bits, size, rmse, sqnr_db)
    policy = one_policy(codec, policy, target)
    leaves, decisions, _ = decide(params, policy)
    choices: list[Choice | None] = [None] * len(leaves)
    if measure:
        for leaf, how in zip(leaves, decisions, strict=True):
            if how.codec is not None and isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(f"{how.path} is a ShapeDtypeStruct, without values to measure; leave out measure=True")
        choices = choose(leaves, decisions, target, policy.balance)
    return plan_of(leaves, decisions, choices)


def plan_of(leaves: Sequence[Any], decisions: Sequence[Decision], choices: Sequence[Choice | None]) -> Plan:
    """The plan of leaves of which it is known what the policy says, and how they are packed: exactly, or `None`."""
    return Plan(tuple(_row(*row) for row in zip(leaves, decisions, choices, strict=True)))


def _row(leaf: Any, decision: Decision, choice: Choice | None) -> PlanRow:
    before = leaf_nbytes(leaf)
    low, high = (before, before) if decision.codec is None else _packed_range(leaf, decision.codec, choice)
    return PlanRow(
        decision.path,
        tuple(getattr(leaf, "shape", ())),
        str(getattr(leaf, "dtype", type(leaf).__name__)),
        leaf.codec if is_packed(leaf) else choice.codec if choice else decision.codec,
        leaf.order if is_packed(leaf) else choice.order if choice else decision.order,
        decision.reason,
        before,
        low,
        high,
    )


def _packed_range(leaf: Any, codec: Codec, choice: Choice | None) -> tuple[int, int]:
    size = math.prod(leaf.shape)
    if choice:
        counts = tuple(count_widths(jnp.asarray(leaf), choice.slope, choice.codec, choice.order).tolist())
        exact = packed_nbytes(choice.codec, size, counts)
        return exact, exact
    blocks, others = -(-size // codec.block_size), (0,) * (len(codec.widths) - 1)
    return packed_nbytes(codec, size, (blocks, *others)), packed_nbytes(codec, size, (*others, blocks))
