"""Train a small network on handwritten digits, make it about 6 times smaller, and show what that costs.

Run `python -m examples.quickstart`; `--help` lists the options. It needs `pip install btc_jax[examples]`, no download,
and less than a minute on two cores.
"""

import enum
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import linen, nnx
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import btc_jax
from btc_jax import Uniform
from btc_jax.baselines import absmax4, apply_baseline, percentile8, uniform8
from btc_jax.codecs import Codec
from btc_jax.metrics import TreeMetrics
from btc_jax.tables import comparison_table

PyTree = Any
Apply = Callable[[PyTree, Any], Any]
Row = dict[str, Any]

BLOCK_SIZES = (32, 64, 128, 256)
BUDGETS = (4.5, 3.5)
"""Budgets of effective bits per weight for the multilevel codec."""
BATCH_SIZE = 64
BASELINES = {"uniform8": uniform8(), "percentile8": percentile8(), "absmax4": absmax4()}
TITLE = "BTC by block size, multilevel by bits, others (bits per weight; bytes of all)"

console = Console(markup=False, highlight=False)


def pooled(x: jax.Array) -> jax.Array:
    return linen.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)


def linen_network(seed: int) -> tuple[Apply, PyTree]:
    """In Linen, a model is its `apply` and a dict of parameters."""
    convolutions = [linen.Conv(32, (3, 3)), linen.relu, linen.Conv(64, (3, 3)), linen.relu, pooled]
    model = linen.Sequential([*convolutions, linen.Dense(128), linen.relu, linen.Dense(10)])
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
    return lambda params, images: model.apply({"params": params}, images), params


def nnx_network(seed: int) -> tuple[Apply, PyTree]:
    """The same network in NNX, split into a static graph and a state of parameters."""
    rngs = nnx.Rngs(seed)
    convolutions = [nnx.Conv(1, 32, (3, 3), rngs=rngs), nnx.relu, nnx.Conv(32, 64, (3, 3), rngs=rngs), nnx.relu, pooled]
    dense = [nnx.Linear(4 * 4 * 64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs)]
    graphdef, state = nnx.split(nnx.Sequential(*convolutions, *dense))
    return lambda state, images: nnx.merge(graphdef, state)(images), state


class ModelName(enum.StrEnum):
    LINEN = "linen"
    NNX = "nnx"


class CodecName(enum.StrEnum):
    UNIFORM = "uniform"


MODELS = {ModelName.LINEN: linen_network, ModelName.NNX: nnx_network}
CODECS: dict[CodecName, Callable[..., Codec]] = {CodecName.UNIFORM: Uniform}


class Digits(NamedTuple):
    """Images `[n, 8, 8, 1]` with values from 0 to 1, and the digit that each shows."""

    images: np.ndarray
    labels: np.ndarray


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Two thirds for training and one third held out, stratified by digit."""
    pixels, digits = map(np.asarray, load_digits(return_X_y=True))
    images, labels = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1), digits.astype(np.int32)
    parts = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=seed)
    learned, held_out = (Digits(images[np.asarray(rows)], labels[np.asarray(rows)]) for rows in parts)
    return learned, held_out


def train(apply: Apply, params: PyTree, digits: Digits, epochs: int, seed: int) -> PyTree:
    """Gradient descent with momentum on shuffled batches; nothing here depends on compression."""
    optimizer = optax.sgd(0.05, momentum=0.9)
    state = optimizer.init(params)

    def loss(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()

    @jax.jit
    def step(params: PyTree, state: PyTree, images: jax.Array, labels: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    for rows in shuffled_batches(len(digits.labels), epochs, seed):
        params, state = step(params, state, digits.images[rows], digits.labels[rows])
    return params


def shuffled_batches(examples: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of full batches, so that one compiled step fits all; shows a progress bar on a terminal."""
    terminal = Console(stderr=True)
    generator = np.random.default_rng(seed)
    full = examples - examples % BATCH_SIZE
    for _ in track(range(epochs), "training", console=terminal, transient=True, disable=not terminal.is_terminal):
        yield from generator.permutation(examples)[:full].reshape(-1, BATCH_SIZE)


class Exam(NamedTuple):
    """The unmodified model on the held-out digits, with any tree of parameters."""

    apply: Apply
    digits: Digits

    def logits(self, params: PyTree) -> np.ndarray:
        return btc_jax.btc_logits(self.apply, params, self.digits.images)

    def accuracy(self, params: PyTree) -> float:
        accuracy = btc_jax.btc_evaluate(self.apply, params, *self.digits).top1
        assert accuracy is not None
        return accuracy

    def figures(self, params: PyTree, reference: np.ndarray) -> Row:
        result = btc_jax.btc_evaluate(self.apply, params, *self.digits, reference=reference)
        return {"accuracy": result.top1, "KL": result.kl, "agreement": result.agreement}


def compare(exam: Exam, params: PyTree, codec: Callable[..., Codec]) -> Iterator[Row]:
    """A row for the float parameters, and one for each block size, budget and baseline quantizer."""
    reference = exam.logits(params)
    bits = {"rmse": 0.0, "payload": 32.0, "header": 0.0, "effective": 32.0, "bytes": nbytes(params)}
    yield {"name": "float32"} | exam.figures(params, reference) | bits
    for size in BLOCK_SIZES:
        tree = btc_jax.btc_quantize(params, codec(block_size=size))
        metrics = btc_jax.btc_metrics(params, tree, codec(block_size=size))
        yield {"name": f"BTC {size}"} | exam.figures(tree, reference) | costs(metrics)
    for bits in BUDGETS:
        tree = btc_jax.btc_quantize(params, bits=bits)
        metrics = btc_jax.btc_metrics(params, tree, btc_jax.Multilevel())
        yield {"name": f"multi {bits}"} | exam.figures(tree, reference) | costs(metrics)
    for name, baseline in BASELINES.items():
        tree, metrics = apply_baseline(params, baseline)
        yield {"name": name} | exam.figures(tree, reference) | costs(metrics)


def costs(metrics: TreeMetrics) -> Row:
    """Error and bits per weight of the quantized leaves, and bytes of the whole tree."""
    total = metrics.total
    bits = {"payload": total.payload_bits, "header": total.header_bits, "effective": total.effective_bits}
    return {"rmse": total.rmse} | bits | {"bytes": metrics.bytes_after}


def nbytes(params: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def search(exam: Exam, params: PyTree, codec: Callable[..., Codec]) -> PyTree:
    """The tree with the largest blocks within the limits, or else the one with blocks of 64."""
    result = btc_jax.btc_search(params, exam.accuracy, codec=codec(), block_sizes=BLOCK_SIZES)
    console.print(result)
    if result.tree is not None:
        return result.tree
    console.print("No block size is within the limits; blocks of 64 are saved anyway.")
    return btc_jax.btc_quantize(params, codec(block_size=64))


def save_and_check(exam: Exam, params: PyTree, tree: PyTree, path: Path) -> bool:
    """Save the tree; return whether the model gives the same logits when it is loaded again."""
    size, before = btc_jax.save(path, tree), nbytes(params)
    console.print(f"5. Saved in {size:,} bytes: {before / size:.2f} times less than {before:,} of float32 parameters.")
    same = np.array_equal(exam.logits(tree), exam.logits(btc_jax.load(path)))
    console.print(f"6. Read back from {path.name}: the logits are {'equal' if same else 'NOT EQUAL'} to those before.")
    return same


def run(model: ModelName, codec: Callable[..., Codec], seed: int, epochs: int, output: Path | None) -> bool:
    """Run all steps; return whether the saved network gives the same logits."""
    digits, held_out = split_digits(seed)
    tests = len(held_out.labels)
    console.print(
        f"1. Digits: {len(digits.labels):,} to train on, {tests:,} held out; one of them is {100 / tests:.2f} %."
    )
    apply, params = MODELS[model](seed)
    console.print(f"2. Training a CNN ({model}) of {nbytes(params) // 4:,} float32 parameters, {epochs} epochs.")
    params, exam = train(apply, params, digits, epochs, seed), Exam(apply, held_out)
    console.print("3. Quantizing it, and running the unmodified model on each compressed tree.")
    console.print(comparison_table(compare(exam, params, codec), TITLE))
    console.print("4. Searching for the largest blocks that keep to the paper's limits.")
    tree = search(exam, params, codec)
    with tempfile.TemporaryDirectory() as folder:
        return save_and_check(exam, params, tree, output or Path(folder) / "digits.safetensors")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


def checked_codec(name: CodecName, **fields: Any) -> Callable[..., Codec]:
    """The codec, still without a block size; its fields are checked before training."""
    make = functools.partial(CODECS[name], **fields)
    try:
        make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return make


def in_a_folder(path: Path | None) -> Path | None:
    """Report a missing folder before training, not after it."""
    if path and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return path


@app.command()
def main(
    model: Annotated[ModelName, typer.Option(help="Flax API of the network.")] = ModelName.LINEN,
    codec: Annotated[CodecName, typer.Option(help="Codec of the blocks.")] = CodecName.UNIFORM,
    low_bits: Annotated[int, typer.Option(help="Bits per weight of a smooth block.")] = Uniform.low_bits,
    high_bits: Annotated[int, typer.Option(help="Bits per weight of any other.")] = Uniform.high_bits,
    threshold: Annotated[float, typer.Option(help="A block with a standard deviation below this is smooth.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of split, weights and batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 20,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, callback=in_a_folder, help="Keep the file here.")
    ] = None,
) -> None:
    """Train a small network on handwritten digits, compress it, and show what that saves and costs."""
    make = checked_codec(codec, low_bits=low_bits, high_bits=high_bits, threshold=threshold)
    if not run(model, make, seed, epochs, output):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
