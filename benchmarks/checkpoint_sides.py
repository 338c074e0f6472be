"""What the checkpoint benchmark compares: saving and loading by each library, with the same weights."""

import ctypes
import functools
import math
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.flax
import safetensors.numpy

import btc_jax

SHAPE = (2048, 2048)
MB = 10**6
REFERENCE = "safetensors flax"


@dataclass(frozen=True)
class Operation:
    """One row of the table: `run(given())` is what is measured.

    Attributes:
        kind: the operation; rows of the same kind are compared.
        side: the library that performs it.
        files: the file or folder it writes or reads.
        given: returns what is saved, outside the measurement.
        run: saves or loads.
        cold: whether the file is first dropped from the page cache.
    """

    kind: str
    side: str
    files: Path
    given: Callable[[Path], Any]
    run: Callable[[Any], Any]
    cold: bool = False


def operations(folder: Path) -> list[Operation]:
    return [*_saves(folder), *_loads(folder, False), *(_loads(folder, True) if can_be_cold(folder) else [])]


def _saves(folder: Path) -> list[Operation]:
    ours, dense, items = folder / "ours.safetensors", folder / "dense.safetensors", folder / "orbax"
    rows = [
        ("btc_jax", ours, packed, btc_jax.save),
        (REFERENCE, dense, _dense, _flushing(safetensors.flax.save_file)),
        ("safetensors numpy", dense, _dense_numpy, _flushing(safetensors.numpy.save_file)),
        ("orbax", items / "dense", _dense, _flushing(_orbax_save)),
        ("btc_jax in orbax", items / "ours", packed, _flushing(_btc_save)),
    ]
    return [Operation("save, fsync", side, files, given, _saver(save, files)) for side, files, given, save in rows]


def _loads(folder: Path, cold: bool) -> list[Operation]:
    ours, dense, items = folder / "ours.safetensors", folder / "dense.safetensors", folder / "orbax"
    name = "cold" if cold else "warm"
    load, decode = f"load, {name}", f"dense, {name}"
    rows = [
        (load, "btc_jax", ours, btc_jax.load),
        (load, "btc_jax unchecked", ours, functools.partial(btc_jax.load, checksums=False)),
        (load, "btc_jax in orbax", items / "ours", _btc_restore),
        (decode, "btc_jax", ours, functools.partial(btc_jax.load, dense=True)),
        (decode, REFERENCE, dense, safetensors.flax.load_file),
        (decode, "safetensors numpy", dense, safetensors.numpy.load_file),
        (decode, "orbax", items / "dense", _orbax_restore),
        (f"verify, {name}", "btc_jax", ours, btc_jax.verify),
    ]
    return [Operation(kind, side, files, _nothing, _loader(run, files), cold) for kind, side, files, run in rows]


def _saver(save: Callable[[Path, Any], Any], files: Path) -> Callable[[Any], Any]:
    return lambda tree: save(files, tree)


def _loader(load: Callable[[Path], Any], files: Path) -> Callable[[Any], Any]:
    return lambda _: load(files)


def layer(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian blocks of 64, a quarter of them, at random places, above the codec's threshold."""
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal((math.prod(shape) // 64, 64), np.float32)
    blocks *= np.where(rng.random(len(blocks)) < 0.25, np.float32(0.08), np.float32(0.02))[:, None]
    return blocks.reshape(shape)


def make_files(folder: Path, nbytes: int) -> None:
    """Write the weights as each side stores them. Runs in a separate process."""
    count = max(1, round(nbytes / (4 * math.prod(SHAPE))))
    tree = {f"layer_{i:03d}/kernel": layer(i, SHAPE) for i in range(count)}
    safetensors.numpy.save_file(tree, folder / "dense.safetensors")
    btc_jax.save(folder / "ours.safetensors", btc_jax.btc_quantize(tree))
    _orbax_save(_dense(folder), folder / "orbax" / "dense")
    _btc_save(packed(folder), folder / "orbax" / "ours")


def files_in(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_in(path))


def drop(path: Path) -> None:
    """Drop files from the page cache; they must have been flushed."""
    for name in files_in(path):
        with open(name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@functools.cache
def can_be_cold(folder: Path) -> bool:
    """Whether a file can be dropped from the page cache, found out by trying."""
    if not hasattr(os, "posix_fadvise"):
        return False
    path = folder / "dense.safetensors"
    _flush(path)
    drop(path)
    return cached_share(path) < 0.01


def cached_share(path: Path) -> float:
    """The share of a file that is in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        flags, start = (ctypes.c_ubyte * pages)(), ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), flags
        )
        del start
        return 1.0 if failed else sum(flag & 1 for flag in flags) / pages


@functools.cache
def _dense(folder: Path) -> dict[str, jax.Array]:
    return safetensors.flax.load_file(folder / "dense.safetensors")


@functools.cache
def _dense_numpy(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "dense.safetensors")


@functools.cache
def packed(folder: Path) -> Any:
    return btc_jax.load(folder / "ours.safetensors")


def _nothing(_: Path) -> None:
    return None


def _flushing(save: Callable[[Any, Path], Any]) -> Callable[[Path, Any], None]:
    def flushed(path: Path, tree: Any) -> None:
        save(tree, path)
        _flush(path)

    return flushed


def _flush(path: Path) -> None:
    for file in files_in(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _orbax_save(tree: Any, path: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(tree), force=True)


def _orbax_restore(path: Path) -> Any:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path)


def _btc_save(tree: Any, path: Path) -> None:
    from btc_jax.orbax import BTCCheckpointHandler, BTCSave, ocp

    with ocp.Checkpointer(BTCCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=BTCSave(tree), force=True)


def _btc_restore(path: Path) -> Any:
    from btc_jax.orbax import BTCCheckpointHandler, BTCRestore, ocp

    with ocp.Checkpointer(BTCCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=BTCRestore())
