"""A character-level Llama of 936,448 weights, on its own samples."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from benchmarks.exams import Exam, as_jax, file_of

LAYERS, HEADS, KEYS, VOCABULARY = 5, 8, 4, 105


def exam(data: Path) -> Exam:
    """The tree is `{"layer_0": {"wq": {"kernel": ...}}, ...}`; the embedding is also the output layer."""
    params: Any = {}
    for name, array in load_file(file_of("babyllama", "babyllama105.safetensors", data)).items():
        *layers, last = name.split(".")
        node = params
        for layer in layers:
            node = node.setdefault(layer, {})
        node[last] = array
    params.pop("head", None)
    with np.load(file_of("babyllama", "babyllama105_samples.npz", data)) as stored:
        ids = stored["ids"].astype(np.int32)
    return Exam(
        "babyllama",
        as_jax(params),
        logits,
        ids[:, :-1],
        ids[:, 1:],
        head="next-token",
        vocabulary=VOCABULARY,
        batch=16,
    )


def logits(params: Any, ids: jax.Array) -> jax.Array:
    """Logits of the next token, `[batch, length, vocabulary]`."""
    table = jnp.asarray(params["tok"]["embedding"])
    x = table[ids]
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        x = x + _attention(layer, _norm(x, layer["n1"]))
        h = _norm(x, layer["n2"])
        gate, up = h @ layer["w1"]["kernel"], h @ layer["w3"]["kernel"]
        x = x + (jax.nn.silu(gate) * up) @ layer["w2"]["kernel"]
    return _norm(x, params["norm"]) @ table.T


def _attention(layer: Any, x: jax.Array) -> jax.Array:
    length = x.shape[1]
    q, k, v = (x @ layer[name]["kernel"] for name in ("wq", "wk", "wv"))
    q, k, v = (y.reshape(*x.shape[:2], heads, -1) for y, heads in ((q, HEADS), (k, KEYS), (v, KEYS)))
    q, k = _rotated(q), _rotated(k)
    k, v = (jnp.repeat(y, HEADS // KEYS, axis=2) for y in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(q.shape[-1]))
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*x.shape[:2], -1) @ layer["wo"]["kernel"]


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions over pairs `(2 i, 2 i + 1)`."""
    length, size = x.shape[1], x.shape[3]
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _norm(x: jax.Array, params: Any) -> jax.Array:
    scale = params["scale"][(None,) * (x.ndim - 1)]
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


EXAMS = {"babyllama": exam}
