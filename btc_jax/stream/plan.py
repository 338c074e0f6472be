"""What will be done to the leaves of a source: its tree of shapes, and the choices for a target."""

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack

import numpy as np

from btc_jax._errors import Remedied
from btc_jax._typing import PyTree
from btc_jax.allocate import Goal, Sharing, sharing_of
from btc_jax.choices import choose
from btc_jax.codecs import Codec
from btc_jax.coding import Recipe
from btc_jax.large import LARGE, Box, LargeLeaf
from btc_jax.leafspec import LeafSpec
from btc_jax.plan import Plan, plan_of
from btc_jax.policy import Decision, Policy
from btc_jax.sources import Source, open_source
from btc_jax.stream.container import container_nbytes
from btc_jax.tree import decide, flatten, one_policy

PathLike = str | os.PathLike[str]


def plan_file(
    source: PathLike,
    codec: Codec | None = None,
    *,
    policy: Policy | None = None,
    measure: bool = False,
    **goal: Unpack[Goal],
) -> Plan:
    """What `quantize_file` would do to each leaf. Values are read only for `measure`, which makes the sizes exact.

    Args:
        source, codec, policy, bits, size, rmse, sqnr_db, sensitivity, taps: as for `quantize_file`.
        measure: as for `btc_plan`.

    Returns:
        The plan, as from `btc_plan`.

    Raises:
        ValueError, FileNotFoundError: if the source cannot be read, or the target is unattainable.
        BTCPolicyError: if a rule fits no leaf.

    Examples:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/net.npz", kernel=np.ones((64, 64), np.float32), bias=np.ones(64, np.float32))
        ...     plan = plan_file(f"{folder}/net.npz", bits=4.5)
        >>> plan.bytes_before, plan.bytes_max
        (16640, 2560)
    """
    sharing = sharing_of(**goal)
    with open_source(source) as opened:
        tree, policy = nested(opened), one_policy(codec, policy, sharing)
        leaves, decisions, _ = decide(tree, policy)
        if not measure:
            return plan_of(leaves, decisions, [None] * len(leaves), sharing.target)
        lazy = lazy_leaves(opened, leaves, decisions)
        return plan_of(lazy, decisions, choices_of(lazy, decisions, sharing, tree), sharing.target)


class CompressedSourceError(Remedied):
    """The source is not dense."""


def nested(source: Source) -> PyTree:
    """Nested dicts of the leaves without their values, by their paths.

    Raises:
        ValueError: if two paths conflict, or the source is a compressed checkpoint.
    """
    if source.compressed:
        raise CompressedSourceError(
            f"{source.file} is a compressed checkpoint already",
            "decode it first, with dequantize_file or btc_dequantize",
        )
    tree: dict[str, Any] = {}
    for leaf in source.leaves:
        *folders, name = leaf.path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or name in node:
            raise ValueError(f"{leaf.path} and another leaf of the source have conflicting paths; rename one")
        node[name] = leaf
    return tree


def read_tree(source: PathLike) -> PyTree:
    """All leaves of a dense checkpoint as nested dicts of numpy arrays; `quantize_file` reads one at a time.

    Raises:
        ValueError, FileNotFoundError: if it cannot be read, or is compressed.
    """
    with open_source(source) as opened:
        paths, _, treedef = flatten(nested(opened))
        return treedef.unflatten([opened.read(path) for path in paths])


class LazyLeaf:
    """A leaf of an open source, whose values are read on demand and not kept."""

    def __init__(self, source: Source, spec: LeafSpec):
        self._source, self.path, self.origin = source, spec.path, spec.origin
        self.shape, self.dtype, self.nbytes = spec.shape, spec.dtype, spec.nbytes

    def __getitem__(self, box: Box) -> np.ndarray:
        _trim_heap()
        return self._source.read(self.path, box)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[()]


class _LargeLazyLeaf(LazyLeaf, LargeLeaf):
    """One that is read in parts."""


def lazy_leaves(source: Source, leaves: Sequence[LeafSpec], decisions: Sequence[Decision]) -> list[LazyLeaf]:
    pairs = list(zip(leaves, decisions, strict=True))
    large = [source.reads_parts and how.codec is not None and leaf.nbytes >= LARGE for leaf, how in pairs]
    return [(_LargeLazyLeaf if one else LazyLeaf)(source, leaf) for one, (leaf, _) in zip(large, pairs, strict=True)]


def choices_of(
    leaves: Sequence[LazyLeaf],
    decisions: Sequence[Decision],
    sharing: Sharing,
    tree: PyTree,
    shards_of: Path | None = None,
) -> list[Recipe | None]:
    """Like `choose`; for a target of size, the headers of the files count as one more dense leaf."""
    if sharing.target is None or sharing.target.kind != "size":
        return choose(leaves, decisions, sharing)
    header = SimpleNamespace(nbytes=container_nbytes(tree, leaves, decisions, shards_of))
    own = Decision("the header of the file", None, "stored", "header")
    return choose([*leaves, header], [*decisions, own], sharing)[:-1]


def _trim_heap() -> None:
    """Return freed memory to the system: glibc keeps some of it, which adds up over large leaves."""
    with suppress(OSError, AttributeError):  # only glibc has this
        ctypes.CDLL(None).malloc_trim(0)
