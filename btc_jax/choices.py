"""How each leaf of a tree is packed: its recipe, alone or from a shared budget, whole or piece by piece."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from btc_jax._errors import ArgumentError
from btc_jax.allocate import Item, Sharing, allocate
from btc_jax.blocks import check_order
from btc_jax.codecs import Codec
from btc_jax.coding import Recipe
from btc_jax.pieces import Cut, Parts, is_here
from btc_jax.policy import Decision
from btc_jax.sizes import leaf_nbytes


def choose(leaves: Sequence[Any], decisions: Sequence[Decision], sharing: Sharing) -> list[Recipe | None]:
    """How each leaf is packed; `None` for those that are not. Without a target, rate-controlled codecs have their
    default bits.

    Args:
        leaves: arrays, packed leaves, or objects that `jnp.asarray` reads again each time.
    """
    for leaf, how in zip(leaves, decisions, strict=True):
        if how.codec is not None:
            check_order(how.order, how.cut.piece(leaf.shape) if how.cut else leaf.shape, how.path)
    separate = [(leaf, how) for leaf, how in zip(leaves, decisions, strict=True) if not how.tied_to]
    packed = [(leaf, how) for leaf, how in separate if how.codec is not None]
    shared = (
        packed if sharing.target else [(leaf, how) for leaf, how in packed if how.codec and how.codec.rate_controlled]
    )
    dense = sum(leaf_nbytes(leaf) for leaf, how in separate if how.codec is None)
    found = {}
    if sharing.target and not packed:
        raise ArgumentError(
            sharing.target.kind,
            "is asked for, but all leaves are packed already; decode the tree first: btc_dequantize(params)",
        )
    if shared:
        items = [item for leaf, how in shared for item in _items(leaf, how)]
        choices: dict[str, list[Recipe]] = {how.path: [] for _, how in shared}
        for item, choice in zip(items, allocate(items, sharing, other_nbytes=dense), strict=True):
            choices[item.path].append(choice)
        found = {how.path: _of_leaf(choices[how.path], how.cut) for _, how in shared}
    recipes = [how.codec and found.get(how.tied_to or how.path) for how in decisions]
    return [
        recipe or (how.codec and _plain(how.codec, how.order, how.cut))
        for recipe, how in zip(recipes, decisions, strict=True)
    ]


def _items(leaf: Any, how: Decision) -> list[Item]:
    """The leaf, or each of its pieces."""
    assert how.codec is not None
    whole = Item(how.path, lambda: leaf, leaf.shape, how.codec, how.order, how.allow_transform, how.weight)
    whole = whole._replace(matrix=whole.size // max(how.stack, 1))
    if how.cut is None:
        return [whole]
    cut = how.cut
    parts, here = Parts(leaf, cut), is_here(leaf, cut)
    piece = whole._replace(shape=cut.piece(leaf.shape))
    return [
        piece._replace(read=functools.partial(parts.read, index), here=None if here is None else index in here)
        for index in cut.indices()
    ]


def _of_leaf(parts: Sequence[Recipe], cut: Cut | None) -> Recipe:
    """The recipe of a leaf from those of its pieces, which have format, order and slope in common."""
    rms = math.sqrt(sum(part.rms**2 for part in parts) / len(parts))
    return parts[0]._replace(cut=cut, rms=rms) if cut else parts[0]


def _plain(codec: Codec, order: Any, cut: Cut | None) -> Recipe:
    return Recipe(codec, codec.formats[0], order, codec.slope or 0.0, cut=cut)
