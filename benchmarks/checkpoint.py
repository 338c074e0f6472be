"""Checkpoints: time, memory and size of btc_jax against safetensors and Orbax with the same weights in float32.

    python -m benchmarks.checkpoint

All sides run interleaved in one process, with an allocator that keeps memory, and medians of wall time are printed with
their ratios to dense safetensors (safetensors.flax): above 1 is faster. GB/s count the float32 weights on every side.
With btc_jax, `load` rows leave the weights packed and `dense` rows end with float32, as safetensors and Orbax always
do. Every save is flushed to disk. Cold means that the operating system dropped the file from its cache beforehand; the
host of a virtual machine may still have it cached. Peak memory is measured in a separate process for each row, with the
default allocator and a warm file: the maximum beyond the imports and the tree to save, including the result. Finally, a
large safetensors file is compressed leaf by leaf, and one of a single large leaf, as a whole and in panels.
"""

import gc
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import jax
import numpy as np
import rich
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.checkpoint_sides import MB, REFERENCE, Operation, drop, layer, make_files, operations, packed, size_of
from benchmarks.machine import measured_on
from btc_jax.checkpoint.files import crc32c

# Fresh memory costs more than any codec here, on every side; see benchmarks/speed.py.
_KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


STREAMED_SHAPE, LARGE_SHAPE = (4096, 4096), (16384, 16384)
_ROWS = 512


def medians(folder: Path, rounds: int) -> tuple[dict[tuple[str, str], float], float]:
    """Median seconds of each operation, and of the checksums of our file alone. Runs in a separate process."""
    seconds: dict[tuple[str, str], list[float]] = {}
    checksums = []
    arrays = [np.asarray(array) for array in jax.tree.leaves(packed(folder))]
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


def stream(folder: Path, panels: bool = True, bits: float | None = None) -> tuple[int, float, int]:
    """Peak bytes above the imports, seconds, and bytes written when compressing a file. Runs in a separate process."""
    import btc_jax.stream.plan

    if not panels:
        btc_jax.stream.plan.LARGE = math.inf
    before, start = status("VmHWM"), time.perf_counter()
    btc_jax.stream.quantize_file(folder / "large.safetensors", folder / "small.safetensors", bits=bits)
    seconds = time.perf_counter() - start
    return status("VmHWM") - before, seconds, size_of(folder / "small.safetensors")


def make_large_file(folder: Path, count: int, shape: tuple[int, int]) -> None:
    """Write a safetensors file of equally large leaves, 512 rows at a time."""
    leaf = 4 * math.prod(shape)
    entries = {
        f"layer_{i:03d}/kernel": {"dtype": "F32", "shape": shape, "data_offsets": [i * leaf, (i + 1) * leaf]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i in range(count * shape[0] // _ROWS):
            file.write(layer(i, (_ROWS, shape[1])).data)


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
    apart(make_large_file, folder, max(1, round(nbytes / (4 * math.prod(STREAMED_SHAPE)))), STREAMED_SHAPE)
    peak, seconds, written = apart(stream, folder)
    size, limit = size_of(folder / "large.safetensors"), 3 * 4 * math.prod(STREAMED_SHAPE) + 300 * MB
    text = (
        f"compressing {size / MB:.0f} MB leaf by leaf: {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s, "
        f"{written / MB:.0f} MB written, peak {peak / MB:.0f} MB above the imports"
    )
    return verdict(text, peak <= limit, f"at most {limit / MB:.0f} MB, 3 times the largest leaf + 300 MB")


def in_panels(folder: Path) -> Iterator[str]:
    """Compress one large leaf as a whole and in panels, and report the memory needed."""
    apart(make_large_file, folder, 1, LARGE_SHAPE)
    whole, panels = (apart(stream, folder, panels, 4.5) for panels in (False, True))
    for name, (peak, seconds, _) in {"as a whole": whole, "in panels": panels}.items():
        nbytes = size_of(folder / "large.safetensors")
        yield f"bits=4.5, one leaf of {nbytes / MB:.0f} MB {name}: peak {peak / MB:.0f} MB, {seconds:.1f} s"
    yield f"in panels over as a whole: {panels[0] / whole[0]:.2f} of the memory, {panels[1] / whole[1]:.2f} of the time"


def main(
    gigabytes: Annotated[float, typer.Option(help="Float32 weights to save and load, in GB.", min=0.001)] = 0.25,
    stream_gigabytes: Annotated[float, typer.Option(help="File to compress leaf by leaf, in GB; 0 for none.")] = 2.0,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.", min=1)] = 7,
    folder: Annotated[Path | None, typer.Option(help="Where to create the temporary folder.")] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        needed, free = (
            int(2.5e9 * gigabytes + max(1.5e9 * stream_gigabytes, 1.3e9 * bool(stream_gigabytes))),
            shutil.disk_usage(here).free,
        )
        if free < needed:
            raise typer.BadParameter(f"{here.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} are needed")
        apart(make_files, here, int(gigabytes * 1e9))
        seconds, checksums = apart(medians, here, rounds, **_KEEPS_MEMORY)
        rich.print(table(here, seconds, peaks(here)))
        for line in aims(seconds, checksums):
            rich.print(line)
        if stream_gigabytes:
            rich.print(streamed(here, int(stream_gigabytes * 1e9)))
            for line in in_panels(here):
                rich.print(line)
        print(measured_on("safetensors", "orbax-checkpoint"))


if __name__ == "__main__":
    typer.run(main)
