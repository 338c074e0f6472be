"""Checkpoints: time, memory and size of btc_jax against safetensors and Orbax with the same weights in float32.

    python -m benchmarks.checkpoint

All sides run interleaved in one process, with an allocator that keeps memory, and medians of wall time are printed with
their ratios to dense safetensors (safetensors.flax): above 1 is faster. GB/s count the float32 weights on every side.
With btc_jax, `load` rows leave the weights packed and `dense` rows end with float32, as safetensors and Orbax always
do. Every save is flushed to disk. Cold means that the operating system dropped the file from its cache beforehand; the
host of a virtual machine may still have it cached. Peak memory is measured in a separate process for each row, with the
default allocator and a warm file: the maximum beyond the imports and the tree to save, including the result. Finally, a
large safetensors file is compressed leaf by leaf.
"""

import ctypes
import functools
import gc
import json
import math
import mmap
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import jax
import numpy as np
import rich
import safetensors.flax
import safetensors.numpy
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import btc_jax
from benchmarks.machine import measured_on
from btc_jax.checkpoint.files import crc32c

# Fresh memory costs more than any codec here, on every side; see benchmarks/speed.py.
_KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
SHAPE = (2048, 2048)
STREAMED_SHAPE = (4096, 4096)
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
        ("btc_jax", ours, _packed, btc_jax.save),
        (REFERENCE, dense, _dense, _flushing(safetensors.flax.save_file)),
        ("safetensors numpy", dense, _dense_numpy, _flushing(safetensors.numpy.save_file)),
        ("orbax", items / "dense", _dense, _flushing(_orbax_save)),
        ("btc_jax in orbax", items / "ours", _packed, _flushing(_btc_save)),
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
    _btc_save(_packed(folder), folder / "orbax" / "ours")


def medians(folder: Path, rounds: int) -> tuple[dict[tuple[str, str], float], float]:
    """Median seconds of each operation, and of the checksums of our file alone. Runs in a separate process."""
    seconds: dict[tuple[str, str], list[float]] = {}
    checksums = []
    arrays = [np.asarray(array) for array in jax.tree.leaves(_packed(folder))]
    for _ in track(range(rounds + 1), "timing", console=Console(stderr=True), transient=True):
        for operation in operations(folder):
            seconds.setdefault((operation.kind, operation.side), []).append(_timed(operation, folder))
        start = time.perf_counter()
        for array in arrays:
            crc32c(array)
        checksums.append(time.perf_counter() - start)
    return {key: statistics.median(times[1:]) for key, times in seconds.items()}, statistics.median(checksums[1:])


def _timed(operation: Operation, folder: Path) -> float:
    given = operation.given(folder)
    if operation.cold:
        drop(operation.files)
    start = time.perf_counter()
    jax.block_until_ready(operation.run(given))
    return time.perf_counter() - start


def peak_of(folder: Path, kind: str, side: str) -> int:
    """Peak bytes of one operation beyond those in use before it. Runs in a separate process."""
    operation = next(o for o in operations(folder) if (o.kind, o.side) == (kind, side))
    given = operation.given(folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    jax.block_until_ready(operation.run(given))
    return status("VmHWM") - before


def stream(folder: Path) -> tuple[int, float, int]:
    """Peak bytes above the imports, seconds, and bytes written when compressing a file. Runs in a separate process."""
    import btc_jax.stream

    before, start = status("VmHWM"), time.perf_counter()
    btc_jax.stream.quantize_file(folder / "large.safetensors", folder / "small.safetensors")
    seconds = time.perf_counter() - start
    return status("VmHWM") - before, seconds, size_of(folder / "small.safetensors")


def make_large_file(folder: Path, nbytes: int) -> None:
    """Write a safetensors file of equally large leaves, one by one."""
    leaf = 4 * math.prod(STREAMED_SHAPE)
    count = max(1, round(nbytes / leaf))
    entries = {
        f"layer_{i:03d}/kernel": {"dtype": "F32", "shape": STREAMED_SHAPE, "data_offsets": [i * leaf, (i + 1) * leaf]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i in range(count):
            file.write(layer(i, STREAMED_SHAPE).data)


def apart(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """The result of a function in a fresh process."""
    context = multiprocessing.get_context("spawn")
    variables = {"JAX_PLATFORMS": "cpu"} | environment
    with patch.dict(os.environ, variables), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def status(name: str) -> int:
    """Bytes of memory that Linux reports for this process under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


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
def _packed(folder: Path) -> Any:
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


# Orbax is imported where it is used, so that other rows do not include its memory.


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


def peaks(folder: Path) -> dict[tuple[str, str], int]:
    """Peak memory of each operation with the file in the cache."""
    rows = [operation for operation in operations(folder) if not operation.cold]
    shown = track(rows, "measuring memory", console=Console(stderr=True), transient=True)
    return {(o.kind, o.side): apart(peak_of, folder, o.kind, o.side) for o in shown}


def table(folder: Path, seconds: dict[tuple[str, str], float], memory: dict[tuple[str, str], int]) -> Table:
    dense = size_of(folder / "dense.safetensors")
    result = Table(title=f"{dense / MB:.0f} MB of float32", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("what", "side", "ms", "GB/s", "ratio", "peak MB", "file MB"):
        result.add_column(column, justify="left" if column in ("what", "side") else "right", no_wrap=True)
    rows = operations(folder)
    for o, after in zip(rows, [*rows[1:], None], strict=True):
        took, peak = seconds[o.kind, o.side], memory.get((o.kind, o.side))
        numbers = (f"{took * 1e3:.1f}", f"{dense / took / 1e9:.2f}", f"{reference(seconds, o.kind) / took:.2f}")
        memory_text = "" if peak is None else f"{peak / MB:.0f}"
        last = after is None or after.kind != o.kind
        result.add_row(o.kind, o.side, *numbers, memory_text, f"{size_of(o.files) / MB:.1f}", end_section=last)
    return result


def reference(seconds: dict[tuple[str, str], float], kind: str) -> float:
    """The time of dense safetensors for the same operation; it always loads to float32, and cannot verify."""
    return seconds[kind if kind.startswith("save") else f"dense, {kind.split(', ')[1]}", REFERENCE]


def aims(seconds: dict[tuple[str, str], float], checksums: float) -> Iterator[str]:
    """The target ratios of the library, and whether they are met."""
    save = reference(seconds, "save, fsync") / seconds["save, fsync", "btc_jax"]
    yield verdict(f"save with fsync, ratio to safetensors: {save:.2f}", save >= 3, "at least 3")
    for name in ("warm", "cold"):
        kind = f"dense, {name}"
        if (kind, "btc_jax") in seconds:
            ratio = reference(seconds, kind) / seconds[kind, "btc_jax"]
            text = f"load to dense float32, {name}, ratio to safetensors: {ratio:.2f}"
            yield verdict(text, ratio >= 1, "at least 1") if name == "cold" else text
        else:
            yield "cold loads: not measured; files in this folder cannot be dropped from memory"
    load, unchecked = seconds["load, warm", "btc_jax"], seconds["load, warm", "btc_jax unchecked"]
    share = checksums / load
    text = f"checksums, alone in memory: {checksums * 1e3:.1f} ms, {share:.1%} of a warm load"
    yield verdict(text, share <= 0.1, "at most 10 %")
    yield f"a warm load without checksums takes {1 - unchecked / load:.1%} less time"


def verdict(text: str, met: bool, aim: str) -> str:
    return f"{text} (aim: {aim}; {'met' if met else 'NOT MET'})"


def streamed(folder: Path, nbytes: int) -> str:
    """Compress a large file, and report the memory needed."""
    apart(make_large_file, folder, nbytes)
    peak, seconds, written = apart(stream, folder)
    size, limit = size_of(folder / "large.safetensors"), 3 * 4 * math.prod(STREAMED_SHAPE) + 300 * MB
    text = (
        f"compressing {size / MB:.0f} MB leaf by leaf: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s, "
        f"{written / MB:.0f} MB written, peak {peak / MB:.0f} MB above the imports"
    )
    return verdict(text, peak <= limit, f"at most {limit / MB:.0f} MB, 3 times the largest leaf + 300 MB")


def main(
    gigabytes: Annotated[float, typer.Option(help="Float32 weights to save and load, in GB.", min=0.001)] = 0.25,
    stream_gigabytes: Annotated[float, typer.Option(help="File to compress leaf by leaf, in GB; 0 for none.")] = 2.0,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.", min=1)] = 7,
    folder: Annotated[Path | None, typer.Option(help="Where to create the temporary folder.")] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        needed, free = int(2.5e9 * gigabytes + 1.5e9 * stream_gigabytes), shutil.disk_usage(here).free
        if free < needed:
            raise typer.BadParameter(f"{here.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} are needed")
        apart(make_files, here, int(gigabytes * 1e9))
        seconds, checksums = apart(medians, here, rounds, **_KEEPS_MEMORY)
        rich.print(table(here, seconds, peaks(here)))
        for line in aims(seconds, checksums):
            rich.print(line)
        if stream_gigabytes:
            rich.print(streamed(here, int(stream_gigabytes * 1e9)))
        print(measured_on("safetensors", "orbax-checkpoint"))


if __name__ == "__main__":
    typer.run(main)
