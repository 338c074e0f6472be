"""A Llama in Flax NNX: scanned layers, whose kernels say how they are sharded over an axis `model` of a mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COLUMNS, ROWS = (None, "model"), ("model", None)
"""How kernels (inputs, outputs) are sharded: those into heads and gates by columns, those back by rows."""


@dataclass(frozen=True)
class Config:
    """Sizes of the model, named as in the `config.json` of a Hugging Face checkpoint."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def check_shards(self, devices: int) -> None:
        """Raises:
        ValueError: if an axis that is sharded cannot be divided evenly over so many devices.
        """
        sharded = {
            "num_attention_heads * head_dim": self.query_size,
            "num_key_value_heads * head_dim": self.key_value_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
        }
        for field, size in sharded.items():
            if size % devices:
                raise ValueError(f"{field} is {size}, which is sharded over {devices} devices and must be a multiple")


def kernel(rngs: nnx.Rngs, inputs: int, outputs: int, sharding: tuple[str | None, ...]) -> nnx.Param:
    values = jax.random.normal(rngs.params(), (inputs, outputs)) / np.sqrt(inputs)
    return nnx.Param(values, out_sharding=sharding, eager_sharding=False)


class Norm(nnx.Module):
    """RMSNorm."""

    def __init__(self, config: Config):
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size), out_sharding=(None,), eager_sharding=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps) * self.scale[...]


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding of (batch, length, heads, size): element i of a head turns with i + size / 2."""
    length, half = x.shape[1], x.shape[3] // 2
    angles = jnp.arange(length)[:, None, None] * theta ** -(jnp.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class Layer(nnx.Module):
    """Attention, in which several heads can share keys and values, and a gated MLP."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config, width = config, config.hidden_size
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        self.q = kernel(rngs, width, config.query_size, COLUMNS)
        self.k = kernel(rngs, width, config.key_value_size, COLUMNS)
        self.v = kernel(rngs, width, config.key_value_size, COLUMNS)
        self.o = kernel(rngs, config.query_size, width, ROWS)
        self.gate = kernel(rngs, width, config.intermediate_size, COLUMNS)
        self.up = kernel(rngs, width, config.intermediate_size, COLUMNS)
        self.down = kernel(rngs, config.intermediate_size, width, ROWS)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attention_norm(x)
        q, k, v = (self.heads(y @ part[...]) for part in (self.q, self.k, self.v))
        q, k = rotated(q, self.config.rope_theta), rotated(k, self.config.rope_theta)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(*x.shape[:2], -1) @ self.o[...]
        y = self.mlp_norm(x)
        return x + (jax.nn.silu(y @ self.gate[...]) * (y @ self.up[...])) @ self.down[...]

    def heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)


class Transformer(nnx.Module):
    """Token ids to logits. Activations are float32, whatever the dtype of the weights."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        width, vocabulary = config.hidden_size, config.vocab_size
        rows = jax.random.normal(rngs.params(), (vocabulary, width))
        self.embedding = nnx.Param(rows, out_sharding=ROWS, eager_sharding=False)
        self.layers = stacked(rngs)
        self.norm = Norm(config)
        self.head = None if config.tie_word_embeddings else kernel(rngs, width, vocabulary, COLUMNS)

    def __call__(self, ids: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x)

        embedding = jnp.asarray(self.embedding[...])
        x = self.norm(forward(embedding[ids].astype(jnp.float32), self.layers))
        return x @ (embedding.T if self.head is None else self.head[...])


def shardings(state: Any, mesh: Mesh) -> Any:
    """Where each leaf of the state belongs on a mesh."""

    def place(spec: PartitionSpec) -> NamedSharding:
        # The axis of stacked layers has a name too, but is not one of the mesh.
        return NamedSharding(mesh, PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in spec)))

    return jax.tree.map(place, nnx.get_partition_spec(state), is_leaf=lambda x: isinstance(x, PartitionSpec))
