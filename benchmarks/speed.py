"""Speed of packing and decoding, relative to copying the same float32 weights in memory.

    python -m benchmarks.speed

One 64 MiB leaf, a quarter of its blocks wide, on one core: a kernel in the default layout, and one in the layout in
memory. All sides run interleaved in one process and are measured in processor time, which other load on the machine
disturbs least. Medians are printed as ratios to `memcpy`: above 1 is faster than copying. There are two tables: with
warm memory, from an allocator that keeps what is freed; and with default settings, where the time on all sides includes
fresh memory for each result. `gguf` (numpy) and `qwix` (jax) are included if they are installed (pip install
"btc_jax[benchmarks]"), and so is llama.cpp (pip install "btc_jax[peers-ggml]").
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# One thread on every side.
_ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
# An allocator that keeps memory.
_WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
if __name__ == "__main__" and os.environ.get("BTC_BENCHMARK") is None:
    for name, settings in (("warm memory", _WARM), ("default settings", {})):
        environment = os.environ | _ONE_THREAD | settings | {"BTC_BENCHMARK": name}
        subprocess.run([sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]], env=environment, check=True)
    sys.exit()

import jax
import jax.numpy as jnp
import numpy as np
import rich
import typer
from rich.table import Table

from benchmarks.machine import measured_on
from btc_jax import Multilevel, Uniform, btc_allocate, btc_quantize
from btc_jax._typing import Order
from btc_jax.codecs import Codec
from btc_jax.packing import quantize_leaf

SIDE = 4096
Call = Callable[[], Any]


def weights(block_size: int) -> np.ndarray:
    """Gaussian blocks, a quarter of them, at random places, above the codec's threshold."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((SIDE * SIDE // block_size, block_size), np.float32)
    sigma = np.where(rng.random(len(blocks)) < 0.25, 0.08, 0.02).astype(np.float32)
    return (blocks * sigma[:, None]).reshape(SIDE, SIDE)


ORDERS: dict[str, Order] = {"": "output-major", ", stored": "stored"}
"""The default layout, and the one in memory."""


def ours(leaf: jax.Array, block_size: int) -> dict[str, Call]:
    """Packing and decoding with one plane and with two."""
    calls: dict[str, Call] = {}
    for name, codec in (("4-bit", Uniform(block_size, threshold=float("inf"))), ("mixed", Uniform(block_size))):
        calls |= both_ways(f"btc_jax {block_size} {name}", leaf, codec)
    return calls


def both_ways(name: str, leaf: jax.Array, codec: Codec) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for suffix, order in ORDERS.items():
        tensor = quantize_leaf(leaf, codec, order)
        calls[f"{name} encode{suffix}"] = lambda order=order: quantize_leaf(leaf, codec, order)
        calls[f"{name} decode f32{suffix}"] = lambda tensor=tensor: tensor.dequantize()
        calls[f"{name} decode bf16{suffix}"] = lambda tensor=tensor: tensor.dequantize(jnp.bfloat16)
    return calls


def multilevel(leaf: jax.Array) -> dict[str, Call]:
    """The multilevel codec at 4.5 bits: packing with a known slope, and with the search for it."""
    found = btc_allocate({"kernel": leaf}, bits=4.5).rules[0].codec
    assert isinstance(found, Multilevel)
    calls: dict[str, Call] = {"btc_jax multilevel, bits=4.5, encode": lambda: btc_quantize({"kernel": leaf}, bits=4.5)}
    exhaustive = dataclasses.replace(found, effort="exhaustive")
    calls["btc_jax multilevel exhaustive encode"] = lambda: quantize_leaf(leaf, exhaustive)
    return calls | both_ways("btc_jax multilevel", leaf, found)


def gguf_peers(leaf: np.ndarray) -> dict[str, Call]:
    """llama.cpp's formats as written by the gguf package, in numpy."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        return {}
    calls: dict[str, Call] = {}
    for kind in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0):
        packed = quants.quantize(leaf, kind)
        calls[f"gguf {kind.name} encode"] = lambda kind=kind: quants.quantize(leaf, kind)
        calls[f"gguf {kind.name} decode f32"] = lambda kind=kind, packed=packed: quants.dequantize(packed, kind)
    return calls


def llama_cpp_peers(leaf: np.ndarray) -> dict[str, Call]:
    """llama.cpp's own encoder and decoder, compiled, without an importance matrix."""
    try:
        from benchmarks.peers.llama_cpp import Format

        kinds = [Format(name) for name in ("Q4_0", "Q4_K", "Q8_0")]
    except ImportError:
        return {}
    calls: dict[str, Call] = {}
    for kind in kinds:
        packed = kind.encode(leaf)
        calls[f"llama.cpp {kind.name} encode"] = lambda kind=kind: kind.encode(leaf)
        calls[f"llama.cpp {kind.name} decode f32"] = lambda kind=kind, packed=packed: kind.decode(packed, leaf.size)
    return calls


def qwix_peers(leaf: jax.Array) -> dict[str, Call]:
    """qwix's symmetric formats with a scale for every 64 weights, jitted."""
    try:
        import qwix
    except ImportError:
        return {}
    calls: dict[str, Call] = {}
    for dtype in (jnp.int4, jnp.int8):
        encode = jax.jit(lambda x, dtype=dtype: qwix.quantize(x, dtype, channelwise_axes=[0], tiled_axes={1: 64}))
        decode, packed = jax.jit(qwix.dequantize), encode(leaf)
        calls[f"qwix {jnp.dtype(dtype).name} encode"] = lambda encode=encode: encode(leaf)
        calls[f"qwix {jnp.dtype(dtype).name} decode f32"] = lambda decode=decode, packed=packed: decode(packed)
    return calls


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median processor seconds of each call; the calls take turns in each round, and the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            jax.block_until_ready(call())
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def table(seconds: dict[str, float]) -> Table:
    where = os.environ["BTC_BENCHMARK"]
    title = f"64 MiB of float32, one core, {where}; memcpy {seconds['memcpy'] * 1e3:.1f} ms"
    result = Table(title=title, title_justify="left")
    for column in ("what", "ms", "GB/s of float32", "ratio to memcpy"):
        result.add_column(column, justify="left" if column == "what" else "right")
    for name, value in seconds.items():
        speed = SIDE * SIDE * 4 / value / 1e9
        result.add_row(name, f"{value * 1e3:.1f}", f"{speed:.2f}", f"{seconds['memcpy'] / value:.3f}")
    return result


def main(
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.", min=1)] = 11,
    block_sizes: Annotated[str, typer.Option(help="Block sizes, separated by commas.")] = "32,64,128",
    output: Annotated[
        Path | None, typer.Option(help="Write the medians as JSON to NAME-warm and NAME-default.")
    ] = None,
) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sizes = [int(size) for size in block_sizes.split(",")]
    leaf = weights(64)
    copy = np.zeros_like(leaf)
    calls: dict[str, Call] = {"memcpy": lambda: np.copyto(copy, leaf)}
    for size in sizes:
        calls |= ours(jnp.asarray(weights(size)), size)
    calls |= multilevel(jnp.asarray(leaf))
    calls |= llama_cpp_peers(leaf) | gguf_peers(leaf) | qwix_peers(jnp.asarray(leaf))
    seconds = medians(calls, rounds)
    rich.print(table(seconds))
    print(measured_on("llama-cpp-python", "gguf", "qwix"))
    if output:
        named = output.with_stem(f"{output.stem}-{os.environ['BTC_BENCHMARK'].split()[0]}")
        named.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    typer.run(main)
