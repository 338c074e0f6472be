"""The cost of the first call in a process: compilations, processor time, memory.

    python -m benchmarks.first_use [--large]

Each row is a separate process with an empty compilation cache. Seconds are processor time of all threads beyond the
imports; compilations are those reported by JAX. "again" is the same call repeated in the same process. `--large` adds
2.2 GB of bfloat16 through the command `btc quantize`, and 5,000 leaves, with peak memory.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich
import typer
from rich.table import Table

from benchmarks.machine import measured_on

Tree = dict[str, Any]
MIB = 2**20
LARGEST = 32000 * 2048
"""Weights of the largest leaf of a Llama with 1.1 billion weights."""


def resnet20() -> Tree:
    """19 convolutions of 7 shapes and a dense layer, 0.27 million weights."""
    widths = [(3, 16), *[(16, 16)] * 6, (16, 32), *[(32, 32)] * 5, (32, 64), *[(64, 64)] * 5]
    return _tree([(3, 3, *pair) for pair in widths] + [(64, 10)])


def efficientnet_lite0() -> Tree:
    """All convolutions of the network of that name, 4.6 million weights."""
    shapes, inside = [(3, 3, 3, 32)], 32
    stages = (
        (1, 3, 1, 16),
        (2, 3, 6, 24),
        (2, 5, 6, 40),
        (3, 3, 6, 80),
        (3, 5, 6, 112),
        (4, 5, 6, 192),
        (1, 3, 6, 320),
    )
    for repeats, size, expansion, outside in stages:
        for _ in range(repeats):
            wide = inside * expansion
            expand = [(1, 1, inside, wide)] if expansion > 1 else []
            shapes += [*expand, (size, size, 1, wide), (1, 1, wide, outside)]
            inside = outside
    return _tree([*shapes, (1, 1, 320, 1280), (1280, 1000)])


def many_shapes() -> Tree:
    """300 matrices of 60 shapes, 4 million weights."""
    return _tree([(64 + i % 60, 128 + i % 60) for i in range(300)])


def many_leaves() -> Tree:
    """5,000 matrices, 20 million weights."""
    return _tree([(64, 64)] * 5000)


def _tree(shapes: Sequence[tuple[int, ...]]) -> Tree:
    rng = np.random.default_rng(0)
    return {str(i): {"kernel": 0.05 * rng.standard_normal(shape, np.float32)} for i, shape in enumerate(shapes)}


def _calls(tree: Tree) -> dict[str, Callable[[], Any]]:
    """The calls that are measured, each separately; what they need is created in advance."""
    import btc_jax

    policy = btc_jax.Policy(min_size=0)
    return {
        "btc_quantize, bits=4.5": lambda: btc_jax.btc_quantize(tree, policy=policy, bits=4.5),
        "btc_quantize, paper's codec": lambda: btc_jax.btc_quantize(tree, policy=policy),
        "btc_dequantize": lambda: btc_jax.btc_dequantize(_packed(tree)),
        "btc_metrics": lambda: btc_jax.btc_metrics(tree, _packed(tree), policy=policy),
        "btc_plan, bits=4.5, measure": lambda: btc_jax.btc_plan(tree, policy=policy, bits=4.5, measure=True),
        "btc_search": lambda: btc_jax.btc_search(tree, policy=policy, max_rmse=1.0, progress=False),
        "load(dense=True)": lambda: btc_jax.load(_saved(tree), dense=True),
    }


_MADE: dict[str, Any] = {}


def _packed(tree: Tree) -> Any:
    import btc_jax

    if "packed" not in _MADE:
        _MADE["packed"] = btc_jax.btc_quantize(tree, policy=btc_jax.Policy(min_size=0), bits=4.5)
    return _MADE["packed"]


def _saved(tree: Tree) -> Path:
    import btc_jax

    if "saved" not in _MADE:
        folder = tempfile.TemporaryDirectory()
        btc_jax.save(Path(folder.name) / "m", _packed(tree))
        _MADE["saved"], _MADE["folder"] = Path(folder.name) / "m", folder
    return _MADE["saved"]


TREES: dict[str, Callable[[], Tree]] = {
    "ResNet-20": resnet20,
    "EfficientNet-Lite0": efficientnet_lite0,
    "300 leaves, 60 shapes": many_shapes,
}
CALLS = (
    "btc_quantize, bits=4.5",
    "btc_quantize, paper's codec",
    "btc_dequantize",
    "btc_metrics",
    "btc_plan, bits=4.5, measure",
    "btc_search",
    "load(dense=True)",
)


def measure(tree: str, call: str) -> dict[str, Any]:
    """The cost of a call in this process, the first time and again."""
    import flax  # noqa: F401
    import jax

    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    made = (TREES | {"5,000 leaves": many_leaves})[tree]()
    function = _calls(made)[call]
    if call in ("btc_dequantize", "btc_metrics"):
        _packed(made)
    if call == "load(dense=True)":
        _saved(made)
    compiled.clear()
    result: dict[str, Any] = {}
    for name in ("first", "again"):
        start = time.process_time()
        jax.block_until_ready(function())
        result[name] = time.process_time() - start
    return result | {"compilations": len(compiled), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_a_process(tree: str, call: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_use", "--only", tree, "--call", call],
        env=_environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """The environment without a compilation cache."""
    return {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}


def calls_table() -> Table:
    table = Table(title="first call of a process, processor seconds beyond the imports", title_justify="left")
    for column in ("tree", "call", "compilations", "first", "again"):
        table.add_column(column, justify="left" if column in ("tree", "call") else "right")
    for tree in TREES:
        for call in CALLS:
            found = in_a_process(tree, call)
            table.add_row(tree, call, str(found["compilations"]), f"{found['first']:.2f}", f"{found['again']:.2f}")
    return table


def starting_table() -> Table:
    """Start-up time: the minimum of five processes, since other load can only add to it."""
    table = Table(title="start-up, processor seconds", title_justify="left")
    for column in ("what", "seconds"):
        table.add_column(column, justify="left" if column == "what" else "right")
    lines = {
        "import jax, flax": ["-c", "import jax, flax"],
        "import jax, flax, btc_jax": ["-c", "import jax, flax, btc_jax; btc_jax.btc_quantize"],
        "btc --help": ["-m", "btc_jax_cli", "--help"],
    }
    for what, line in lines.items():
        table.add_row(what, f"{min(_spent([sys.executable, *line])[0] for _ in range(5)):.2f}")
    return table


def _spent(command: list[str]) -> tuple[float, int]:
    """Processor seconds and peak bytes of a process."""
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def large_table() -> Table:
    table = Table(title="large", title_justify="left")
    for column in ("what", "processor seconds", "peak MiB", "peak beyond imports / largest leaf in float32"):
        table.add_column(column, justify="left" if column == "what" else "right")
    found = in_a_process("5,000 leaves", CALLS[0])
    table.add_row(f"5,000 leaves, {CALLS[0]}", f"{found['first']:.1f}", f"{found['peak'] / MIB:.0f}", "")
    _, imports = _spent([sys.executable, "-c", "import jax, flax, btc_jax"])
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "m.safetensors", Path(folder) / "q.safetensors"
        # In a separate process, so that its memory does not count for those that follow.
        subprocess.run([sys.executable, "-m", "benchmarks.first_use", "--write", str(source)], check=True)
        for options in (["--bits", "4.5"], []):
            command = [sys.executable, "-m", "btc_jax_cli", "quantize", str(source), str(target), "--force", *options]
            seconds, peak = _spent(command)
            ratio = (peak - imports) / (4 * LARGEST)
            table.add_row(
                f"btc quantize {' '.join(options)}, {source.stat().st_size / 1e9:.1f} GB of bfloat16",
                f"{seconds:.1f}",
                f"{peak / MIB:.0f}",
                f"{ratio:.2f}",
            )
    return table


def write_llama(file: Path) -> None:
    """Write a file of 1.1 billion bfloat16 weights in the shapes of a Llama."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    row = (0.02 * rng.standard_normal(2**20, np.float32)).astype(ml_dtypes.bfloat16)
    shapes = {"model.embed_tokens.weight": (32000, 2048), "lm_head.weight": (32000, 2048)}
    for i in range(22):
        own = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048)}
        own |= {"gate_proj": (5632, 2048), "up_proj": (5632, 2048), "down_proj": (2048, 5632)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    # Each leaf starts elsewhere in the same numbers, so that no two are equal.
    leaves = {name: np.resize(np.roll(row, 1009 * i), shape) for i, (name, shape) in enumerate(shapes.items())}
    save_file(leaves, file)


def main(
    large: Annotated[bool, typer.Option("--large", help="Also measure 1.1 billion weights, and 5,000 leaves.")] = False,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    call: Annotated[str, typer.Option(hidden=True)] = CALLS[0],
    write: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if write:
        write_llama(write)
        return
    if only:
        print(json.dumps(measure(only, call)))
        return
    rich.print(starting_table())
    rich.print(calls_table())
    if large:
        rich.print(large_table())
    print(measured_on())


if __name__ == "__main__":
    typer.run(main)
