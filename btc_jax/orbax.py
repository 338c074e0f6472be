"""Packed trees as an item of Orbax checkpoints. Needs Orbax: pip install "btc_jax[orbax]".

    manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=3))
    manager.save(step, args=BTCSave(packed))
    packed = manager.restore(step, args=BTCRestore(device=sharding))

Next to other items: `args=ocp.args.Composite(params=BTCSave(packed), data=ocp.args.JsonSave({"epoch": 3}))`.

Orbax writes and reads the arrays inside the leaves, by name. The manifest of format version 1 (docs/format.md) is
stored next to them with its checksums: Orbax itself does not notice flipped bits in stored values.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from btc_jax._typing import PyTree
from btc_jax.checkpoint.errors import BTCFormatError, BTCIntegrityError
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.leaves import from_arrays
from btc_jax.checkpoint.manifest import Manifest, parse_manifest
from btc_jax.checkpoint.place import Device, Placing
from btc_jax.checkpoint.rebuild import rebuild
from btc_jax.checkpoint.record import LeafRecord, Tensor
from btc_jax.checkpoint.structure import describe
from btc_jax.checkpoint.text import FORMAT, open_metadata
from btc_jax.checkpoint.ties import check_ties, home, shared, stored_one_by_one
from btc_jax.tree import flatten

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError('btc_jax.orbax needs Orbax: pip install "btc_jax[orbax]"') from error

MANIFEST = "btc_jax.json"
"""The file of the manifest, in the folder of the item."""


class BTCCheckpointHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores one packed tree. Orbax creates one by itself for `BTCSave` and `BTCRestore`.

    Examples:
        >>> import btc_jax, jax.numpy as jnp, tempfile
        >>> packed = btc_jax.btc_quantize({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
        >>> with tempfile.TemporaryDirectory() as folder, ocp.Checkpointer(BTCCheckpointHandler()) as checkpointer:
        ...     checkpointer.save(f"{folder}/model", args=BTCSave(packed))
        ...     checkpointer.restore(f"{folder}/model", args=BTCRestore())["kernel"]
        BTCTensor(shape=(64, 64), ...)
    """

    def __init__(self) -> None:
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False)  # packed weights get no smaller
        self._manifest = ocp.JsonCheckpointHandler(MANIFEST)

    def save(self, directory: Any, args: "BTCSave") -> None:
        """Writes the tree of `args`; for Orbax to call."""
        arrays, manifest = _stored(args.item)
        self._manifest.save(directory, args=ocp.args.JsonSave(manifest))
        if arrays:
            self._arrays.save(directory, args=ocp.args.PyTreeSave(arrays))

    async def async_save(self, directory: Any, args: "BTCSave") -> list[Any]:
        """Copies the tree of `args`, and returns what writes it later; for Orbax to call."""
        arrays, manifest = _stored(args.item)
        futures = await self._manifest.async_save(directory, args=ocp.args.JsonSave(manifest)) or []
        if arrays:
            futures += await self._arrays.async_save(directory, args=ocp.args.PyTreeSave(arrays)) or []
        return futures

    def restore(self, directory: Any, args: "BTCRestore | None" = None) -> PyTree:
        """Reads the tree; for Orbax to call."""
        args = args or BTCRestore()
        manifest = _read_manifest(directory)
        arrays = self._read_arrays(directory, manifest.tensors())
        records = {record.path: record for record in manifest.leaves}
        placing = Placing(args.device, args.dense, shared(records))

        def read(record: LeafRecord) -> Any:
            return from_arrays(record, [_checked(arrays.pop(t.name), t, args.checksums) for t in record.tensors])

        leaves = [placing.leaf(path, home(r), partial(read, records[home(r)])) for path, r in records.items()]
        return rebuild(manifest.tree, list(records), leaves)

    def metadata(self, directory: Any) -> dict[str, LeafRecord]:
        """What is stored for each leaf, by path; `CheckpointManager.item_metadata` returns it."""
        return {record.path: record for record in _read_manifest(directory).leaves}

    def finalize(self, directory: Any) -> None:
        self._arrays.finalize(directory)

    def close(self) -> None:
        self._arrays.close()
        self._manifest.close()

    def _read_arrays(self, directory: Any, tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """The arrays by name; the empty ones, which Orbax does not store, are made."""
        empty = {t.name: np.empty(t.shape, t.numpy_dtype) for t in tensors if not t.nbytes}
        wanted = {t.name: ocp.RestoreArgs(restore_type=np.ndarray) for t in tensors if t.nbytes}
        if not wanted:
            return empty
        try:
            return empty | self._arrays.restore(directory, args=ocp.args.PyTreeRestore(wanted, wanted))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BTCIntegrityError(f"{directory}: Orbax cannot read its arrays ({str(error)[:200]})") from error


@ocp.args.register_with_handler(BTCCheckpointHandler, for_save=True)
@dataclasses.dataclass
class BTCSave(ocp.args.CheckpointArgs):
    """Save a tree of packed and dense leaves.

    Attributes:
        item: any pytree that `btc_jax.save` accepts. Leaves that are sharded over several processes are gathered, one
            at a time.

    Raises:
        TypeError, ValueError: (when saved) if a leaf or a key of the tree cannot be stored, as for `btc_jax.save`; the
            message names it.

    Warns:
        BTCTreeWarning: (when saved) if something will be restored as something else, as for `btc_jax.save`.
    """

    item: PyTree


@ocp.args.register_with_handler(BTCCheckpointHandler, for_restore=True)
@dataclasses.dataclass
class BTCRestore(ocp.args.CheckpointArgs):
    """Restore what `BTCSave` saved. No template is needed, and containers are restored as by `btc_jax.load`.

    Attributes:
        device: a device or a sharding for all leaves, or a function of the path that returns one or `None`. A packed
            leaf lies whole on all devices of a sharding.
        dense: decode packed leaves.
        checksums: compare all bytes with their checksums.

    Raises:
        BTCIntegrityError: (when restored) bytes of the checkpoint are damaged; the message names the tensor.
        BTCFormatError: (when restored) the item was not saved by `BTCSave`, or its parts do not fit.
    """

    device: Device | Callable[[str], Device | None] | None = None
    dense: bool = False
    checksums: bool = True


def _stored(tree: PyTree) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays for Orbax by name, without empty ones, which it does not accept; and the manifest with its
    checksum."""
    paths, leaves, _ = flatten(tree)
    node = describe(tree, paths)
    rebuild(node, paths, paths)
    stored = list(stored_one_by_one(paths, leaves))
    text = Manifest(node, tuple(record for record, _ in stored)).text()
    arrays = {record.path: _one_array(record, parts) for record, parts in stored if record.nbytes}
    return arrays, {FORMAT: text, f"{FORMAT}_crc32c": crc32c(text.encode())}


def _one_array(record: LeafRecord, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The one array that Orbax stores for a leaf: as a file would, if it has several parts."""
    (tensor,) = record.tensors
    if len(parts) > 1:
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
    return parts[0].reshape(-1).view(tensor.numpy_dtype).reshape(tensor.shape)


def _read_manifest(directory: Any) -> Manifest:
    what = str(directory)
    try:
        data = (directory / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise BTCFormatError(f"{what} has no {MANIFEST}; it was not saved with BTCSave, or is damaged") from error
    manifest = parse_manifest(open_metadata(data, f"{what}/{MANIFEST}"), what)
    paths = [leaf.path for leaf in manifest.leaves]
    if len(set(paths)) < len(paths):
        raise BTCFormatError(f"{what}: two leaves have the same path")
    rebuild(manifest.tree, paths, paths)
    check_ties({record.path: record for record in manifest.leaves}, what)
    return manifest


def _checked(array: np.ndarray, tensor: Tensor, checksums: bool) -> np.ndarray:
    if array.shape != tensor.shape or array.dtype != tensor.numpy_dtype:
        raise BTCIntegrityError(
            f"tensor {tensor.name!r} is {array.dtype}{list(array.shape)} in the checkpoint, "
            f"{tensor.numpy_dtype}{list(tensor.shape)} in its manifest; it is damaged"
        )
    if checksums and crc32c(array) != tensor.crc32c:
        raise BTCIntegrityError(f"tensor {tensor.name!r} does not match its checksum; the checkpoint is damaged")
    return array
