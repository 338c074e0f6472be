"""Packed trees in files: one safetensors file, its manifest as JSON in the metadata. No pickle.

Every array is a tensor of the file, so that any safetensors reader opens it. The manifest says how the tree is built of
them. A packed leaf `p` is stored as `p#plane0`, `p#plane1`, ... and one `p#NAME` for each array of its header.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, TensorSpec, safe_open, serialize

from btc_jax._typing import PyTree
from btc_jax.codecs import codec_from_json
from btc_jax.tensor import BTCTensor, is_packed
from btc_jax.tree import flatten

FORMAT = "btc_jax"
VERSION = 0


class BTCFormatError(ValueError):
    """A file is not a compressed checkpoint that this version can read."""


def save(path: str | os.PathLike[str], tree: PyTree) -> int:
    """Writes a tree of packed and dense arrays to one file, and returns its size in bytes.

    The file appears under its name whole or not at all: it is written beside, flushed to disk, and renamed.

    Args:
        path: the file; one that exists is replaced.
        tree: nested dicts with text or integer keys, lists, tuples, `None` and NNX states of arrays and `BTCTensor`.

    Raises:
        TypeError: the tree holds another kind of node or leaf; the message names it.

    Example:
        >>> import btc_jax, jax.numpy as jnp, os, tempfile
        >>> packed = btc_jax.btc_quantize({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save(os.path.join(folder, "model.safetensors"), packed)
        ...     restored = load(os.path.join(folder, "model.safetensors"))
        >>> restored["kernel"]
        BTCTensor(shape=(64, 64), ...)
    """
    paths, leaves, _ = flatten(tree)
    tensors: dict[str, np.ndarray] = {}
    records = [_store(path_, leaf, tensors) for path_, leaf in zip(paths, leaves, strict=True)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tree": _structure(tree, iter(range(len(leaves)))),
        "leaves": records,
    }
    views = {
        name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in tensors.items()
    }
    data = serialize(views, {FORMAT: json.dumps(manifest)})
    _write_whole(Path(path), data)
    return len(data)


def load(path: str | os.PathLike[str]) -> PyTree:
    """Reads the tree that `save` wrote; an NNX state comes back as nested dicts, which `nnx.merge` takes as well.

    Raises:
        BTCFormatError: the file is no compressed checkpoint, or a newer version wrote it.
        FileNotFoundError: there is no such file.
    """
    try:
        with safe_open(os.fspath(path), framework="flax") as file:
            manifest = _manifest(path, file.metadata())
            leaves = [_restore(record, file.get_tensor) for record in manifest["leaves"]]
    except SafetensorError as error:
        raise BTCFormatError(f"{path} is no safetensors file: {error}") from error
    return _build(manifest["tree"], leaves)


def _manifest(path: Any, metadata: Mapping[str, str] | None) -> Any:
    if FORMAT not in (metadata or {}):
        raise BTCFormatError(f"{path} is a safetensors file without a btc_jax manifest; read it with safetensors")
    assert metadata is not None
    manifest = json.loads(metadata[FORMAT])
    if manifest["version"] != VERSION:
        raise BTCFormatError(f"{path} has format version {manifest['version']}; this btc_jax reads version {VERSION}")
    return manifest


def _store(path: str, leaf: Any, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Adds a leaf's arrays to `tensors`, and returns its record in the manifest."""
    if not is_packed(leaf):
        if not isinstance(leaf, jax.Array | np.ndarray) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{path} is {leaf!r}, no plain array; take it out of the tree, or make it one")
        tensors[path] = np.ascontiguousarray(leaf)
        return {"path": path}
    arrays = {f"plane{i}": plane for i, plane in enumerate(leaf.planes)} | leaf.header
    tensors.update({f"{path}#{name}": np.ascontiguousarray(array) for name, array in arrays.items()})
    return {
        "path": path,
        "codec": leaf.codec.to_json(),
        "order": leaf.order,
        "shape": leaf.shape,
        "dtype": np.dtype(leaf.dtype).name,
        "planes": len(leaf.planes),
        "header": sorted(leaf.header),
    }


def _restore(record: Mapping[str, Any], read: Any) -> Any:
    path = record["path"]
    if "codec" not in record:
        return read(path)
    planes = tuple(read(f"{path}#plane{i}") for i in range(record["planes"]))
    header = {name: read(f"{path}#{name}") for name in record["header"]}
    codec, shape, dtype = codec_from_json(record["codec"]), tuple(record["shape"]), jnp.dtype(record["dtype"])
    return BTCTensor(planes, header, shape, dtype, codec, record["order"])


def _structure(tree: PyTree, number: Any) -> Any:
    """The containers of a tree as JSON; a leaf is its number in the order of `flatten`."""
    if isinstance(tree, nnx.State):
        return {"state": _structure(nnx.to_pure_dict(tree), number)}
    if isinstance(tree, Mapping):
        keys = sorted(tree)
        if not all(isinstance(key, str | int) for key in keys):
            raise TypeError(f"a dict has the keys {keys}; only text and integers can be stored")
        return {"dict": [[key, _structure(tree[key], number)] for key in keys]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_structure(item, number) for item in tree]}
    if tree is None:
        return None
    if is_packed(tree) or isinstance(tree, jax.Array | np.ndarray):
        return next(number)
    raise TypeError(f"a tree of {type(tree).__name__} cannot be stored yet; convert it to nested dicts")


def _build(node: Any, leaves: list[Any]) -> PyTree:
    if not isinstance(node, dict):
        return None if node is None else leaves[node]
    ((kind, items),) = node.items()
    if kind == "state":
        return _build(items, leaves)
    if kind == "dict":
        return {key: _build(item, leaves) for key, item in items}
    built = [_build(item, leaves) for item in items]
    return tuple(built) if kind == "tuple" else built


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
