"""The paper's MLP, which it does not describe further: trained here, on tabular data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.paper.exams import Exam
from examples.paper.models.mlp import MLP
from examples.paper.store import Store
from examples.paper.tabular import Table

PyTree = Any
HIDDEN = (256, 128)
BATCH, RATE, DECAY = 128, 1e-3, 1e-4
STEPS = 4_000
"""At most this many training steps, and at most 60 passes over the rows."""
EPOCHS = 60


def mlp_exam(table: Table, store: Store, seed: int = 0) -> Exam:
    """A trained MLP and its held-out rows. The weights are stored, so a resumed run does not train again."""
    model = MLP(hidden=HIDDEN, classes=table.classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, table.train.inputs.shape[1])))["params"]
    depends = {"rows": table.train.digest(), "seed": seed}
    flat = store.array(f"MLP {table.name} weights", depends, lambda: _flat(train(model, table, seed)))
    known = table.test
    return Exam(
        functools.partial(_apply, model), _unflat(flat, shapes), known.inputs[:1], known, known, repr(model), store
    )


def _apply(model: MLP, params: PyTree, inputs: Any) -> jax.Array:
    return model.apply({"params": params}, inputs)  # pyright: ignore[reportReturnType]


@jax.numpy_dtype_promotion("standard")  # optax's Adam raises numbers to its integer step count
def train(model: MLP, table: Table, seed: int) -> PyTree:
    """AdamW with a cosine learning rate schedule on shuffled batches."""
    inputs, labels = jnp.asarray(table.train.inputs), jnp.asarray(table.train.labels)
    batch = min(BATCH, len(labels))
    per_epoch = len(labels) // batch
    epochs = max(1, min(EPOCHS, STEPS // per_epoch))
    params = as_in_pytorch(model.init(jax.random.key(seed), inputs[:1])["params"], seed)
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, epochs * per_epoch), weight_decay=DECAY)
    epoch = _epoch(model, optimizer, inputs, labels)
    state, generator = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(epochs):
        rows = generator.permutation(len(labels))[: per_epoch * batch].reshape(per_epoch, batch)
        params, state = epoch(params, state, jnp.asarray(rows))
    return params


def as_in_pytorch(params: PyTree, seed: int) -> PyTree:
    """PyTorch's initialization, as in the paper: uniform within 1 / sqrt(inputs), with 0.58 times Flax's deviation.

    This matters: the paper's threshold is in units of the weights, and with Flax's initialization all blocks are wide.
    """
    generator = np.random.default_rng(seed)

    def layer(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        bound = 1 / np.sqrt(leaves["kernel"].shape[0])
        drawn = {name: generator.uniform(-bound, bound, leaf.shape) for name, leaf in leaves.items()}
        return {name: jnp.asarray(values, jnp.float32) for name, values in drawn.items()}

    return {name: layer(leaves) for name, leaves in params.items()}


def _epoch(model: MLP, optimizer: Any, inputs: jax.Array, labels: jax.Array) -> Any:
    """One pass over the rows as a single compiled call."""

    def loss(params: PyTree, rows: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: tuple[PyTree, PyTree], rows: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params, state, rows: jax.lax.scan(step, (params, state), rows)[0])


def _flat(params: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def _unflat(flat: np.ndarray, shapes: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(shapes)
    pieces = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten([jnp.asarray(p.reshape(s.shape)) for p, s in zip(pieces, leaves, strict=True)])
