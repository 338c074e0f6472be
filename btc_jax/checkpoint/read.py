"""Loading and verifying, leaf by leaf."""

import dataclasses
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from btc_jax._typing import PyTree
from btc_jax.checkpoint.errors import BTCFormatError, BTCUnknownFormatError
from btc_jax.checkpoint.opened import Checkpoint as Checkpoint
from btc_jax.checkpoint.opened import PathLike
from btc_jax.checkpoint.opened import open_checkpoint as open_checkpoint
from btc_jax.checkpoint.place import Device, Placing
from btc_jax.checkpoint.ties import shared
from btc_jax.tensor import is_packed
from btc_jax.tree import flatten


def load(
    path: PathLike,
    like: PyTree | None = None,
    *,
    select: str | Iterable[str] | None = None,
    dense: bool = False,
    device: Device | Callable[[str], Device | None] | None = None,
    checksums: bool = True,
) -> PyTree:
    """Load what `save` wrote. No template is needed.

    Dicts, lists, tuples, `FrozenDict`s, NNX states and Linen boxes are restored as they were, named tuples as named
    tuples with the same fields, and other containers (dataclasses, NNX modules) as dicts; variables of a custom class
    become the nearest class of NNX. With `like`, everything is restored as it is there. An object at several places of
    the tree is one object again.

    Args:
        path: the file, or the index of several.
        like: a tree of arrays, packed leaves or `jax.ShapeDtypeStruct` with the wanted structure. Unless `device` says
            otherwise, leaves take the shardings that it has on a mesh: a packed leaf in pieces lands in its shards.
        select: globs over paths; the result is then a flat dict of the leaves that match, by path.
        dense: decode packed leaves.
        device: a device or a sharding for all leaves, or a function of the path that returns one or `None`.
        checksums: compare all bytes with their checksums.

    Returns:
        The tree, or with `select` a flat dict of the selected leaves by path.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        BTCFormatError: if it is not a compressed checkpoint, or its parts do not fit.
        BTCIntegrityError: if it is damaged; the message names the tensor.
        ValueError: if it does not fit `like` (every leaf that is missing, extra, or different is listed), or `select`
            matches nothing.

    Examples:
        >>> import btc_jax, jax.numpy as jnp, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = btc_jax.save(f"{folder}/net", {"a": {"kernel": jnp.ones(4)}, "bias": jnp.zeros(2)})
        ...     tree, selected = load(f"{folder}/net"), load(f"{folder}/net", select="a/*")
        >>> sorted(tree), list(selected)
        (['a', 'bias'], ['a/kernel'])
    """
    if like is not None and select is not None:
        raise ValueError("both like and select are given; select returns a flat dict, so leave out one")
    with open_checkpoint(path) as checkpoint:
        paths = list(checkpoint.records) if select is None else _selected(checkpoint, select)
        treedef = None if like is None else _fitting(checkpoint, like)
        if device is None and like is not None:
            device = _places(like).get
        leaves = checkpoint.leaves(paths, Placing(device, dense, shared(checkpoint.records)), checksums)
        if select is not None:
            return dict(zip(paths, leaves, strict=True))
        if treedef is None:
            return checkpoint.build(leaves)
        by_path = dict(zip(paths, leaves, strict=True))
        return treedef.unflatten([by_path[p] for p in flatten(like)[0]])


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        leaves: number of leaves.
        nbytes: bytes of their tensors.
        damaged: a sentence for each damaged leaf.
        unknown_formats: a sentence for each leaf whose bytes match their checksums but whose format is not registered
            here, so that it could not be checked further.
    """

    leaves: int
    nbytes: int
    damaged: tuple[str, ...]
    unknown_formats: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything was checked, and is as it was saved."""
        return not self.damaged and not self.unknown_formats


def verify(path: PathLike) -> Verification:
    """Read all of a checkpoint, one leaf at a time, and check it against its checksums and for consistency.

    Returns:
        What was found, with `ok` for a checkpoint that is as it was saved; damaged leaves do not raise.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        BTCFormatError, BTCIntegrityError: if the header itself is damaged.

    Examples:
        >>> import btc_jax, jax.numpy as jnp, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = btc_jax.save(f"{folder}/net", {"kernel": jnp.ones(4)})
        ...     found = verify(f"{folder}/net")
        >>> found.ok, found.leaves, found.nbytes
        (True, 1, 16)
    """
    damaged, unknown = [], []
    with open_checkpoint(path) as checkpoint:
        for leaf, record in checkpoint.records.items():
            try:
                if record.kind != "tied":
                    checkpoint.read_numpy(leaf)
            except BTCUnknownFormatError as error:
                unknown.append(str(error))
            except BTCFormatError as error:
                damaged.append(str(error))
        return Verification(len(checkpoint.records), checkpoint.nbytes, tuple(damaged), tuple(unknown))


def _selected(checkpoint: Checkpoint, select: str | Iterable[str]) -> list[str]:
    globs = [select] if isinstance(select, str) else list(select)
    paths = [path for path in checkpoint.records if any(fnmatchcase(path, glob) for glob in globs)]
    if not paths:
        some = ", ".join(list(checkpoint.records)[:3])
        raise ValueError(f"select={globs} matches none of the {len(checkpoint.records)} leaves ({some}, ...)")
    return paths


def _places(like: PyTree) -> dict[str, NamedSharding]:
    """The shardings of leaves that are on a mesh, by path."""
    found = {}
    for path, leaf in zip(*flatten(like)[:2], strict=True):
        place = getattr(leaf.seal if is_packed(leaf) else leaf, "sharding", None)
        if isinstance(place, NamedSharding):
            rank = len(leaf.pieces) if is_packed(leaf) else len(place.spec)
            found[path] = NamedSharding(place.mesh, PartitionSpec(*tuple(place.spec)[:rank]))
    return found


def _fitting(checkpoint: Checkpoint, like: PyTree) -> Any:
    """The structure of `like`, if the checkpoint has just its leaves."""
    paths, leaves, treedef = flatten(like)
    wanted = dict(zip(paths, leaves, strict=True))
    troubles = [f"missing {path}" for path in wanted if path not in checkpoint.records]
    troubles += [f"extra {path}" for path in checkpoint.records if path not in wanted]
    for path, record in checkpoint.records.items():
        leaf = wanted.get(path)
        found = (tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__)))
        if path in wanted and found != (record.shape, record.dtype):
            troubles.append(f"{path} is {record.dtype}{list(record.shape)}, wanted {found[1]}{list(found[0])}")
    if troubles:
        raise ValueError(f"{checkpoint.path} does not fit `like`: {'; '.join(troubles)}")
    return treedef
