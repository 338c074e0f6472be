"""A model sharded over eight devices and packed in place: a decoder-only transformer with scanned layers.

    python -m examples.large [--width 768] [--layers 12] [--bits 4.5]

It has about 100 million random weights, and shows memory and placement. (Top choices of random weights are close to
ties, which small errors decide; those of trained weights are far more stable.) The devices are simulated on the CPU, so
it runs anywhere; on a host with accelerators, remove the two lines that set them up.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import btc_jax

VOCABULARY, LENGTH, HEAD = 8192, 64, 64
SPECS = {"in": (None, "model"), "out": ("model", None)}
"""How the kernels of a layer are sharded: input projections by columns, output projections by rows."""


def kernel(rngs: nnx.Rngs, inputs: int, outputs: int, kind: str) -> nnx.Param:
    values = jax.random.normal(rngs.params(), (inputs, outputs)) / np.sqrt(inputs)
    return nnx.Param(values, out_sharding=SPECS[kind], eager_sharding=False)


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


class Layer(nnx.Module):
    """Attention and a gated MLP, without biases."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.heads = width // HEAD
        self.qkv, self.mixed = kernel(rngs, width, 3 * width, "in"), kernel(rngs, width, width, "out")
        self.up, self.down = kernel(rngs, width, 8 * width, "in"), kernel(rngs, 4 * width, width, "out")

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = jnp.split((norm(x) @ self.qkv[...]).reshape(batch, length, 3 * self.heads, HEAD), 3, axis=2)
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, width) @ self.mixed[...]
        gate, up = jnp.split(norm(x) @ self.up[...], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ self.down[...]


class Transformer(nnx.Module):
    def __init__(self, width: int, layers: int, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(width, rngs)

        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCABULARY, width)))
        self.head = kernel(rngs, width, VOCABULARY, "in")
        self.layers = stacked(rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x)

        x = forward(jnp.asarray(self.embedding[...])[ids], self.layers)
        return norm(x) @ self.head[...]


def placed(state: Any, mesh: Mesh) -> Any:
    """The state on a mesh: kernels sharded by name, including stacked ones, the embedding by its rows."""

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path if hasattr(key, "key")]
        kind = {"qkv": "in", "up": "in", "head": "in", "mixed": "out", "down": "out"}.get(names[-1])
        axes = (None,) * (names[0] == "layers") + (SPECS[kind] if kind else ("model",))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(place, state)


def most_nbytes(tree: Any) -> int:
    """Bytes on the device that holds the most."""
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def main(
    width: Annotated[int, typer.Option(help="Width of the model, a multiple of 256.")] = 768,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 12,
    bits: Annotated[float, typer.Option(help="Effective bits per weight.")] = 4.5,
) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    graphdef, state = nnx.split(Transformer(width, layers, nnx.Rngs(0)))
    state = placed(state, mesh)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state))
    print(f"1. A transformer of {weights:,} weights on {mesh.size} devices: {most_nbytes(state):,} bytes on each.")

    packed = btc_jax.btc_quantize(state, bits=bits, progress=True)  # "layers" in the metadata marks the stacked axis
    total = btc_jax.btc_metrics(state, packed).total
    print(f"2. Packed in place, {total.effective_bits:.2f} bits per weight: {most_nbytes(packed):,} bytes on each.")

    def apply(state: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(ids)

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (4, LENGTH)).astype(np.int32)
    reference = btc_jax.btc_logits(apply, state, ids, batch_size=4)
    answers = btc_jax.btc_evaluate(apply, packed, ids, reference=reference, batch_size=4)
    print(f"3. Next tokens at {answers.examples} places: {answers.agreement:.1%} the same, KL {answers.kl:.4f} nats.")

    four = Mesh(np.asarray(jax.devices()[:4]), ("model",), axis_types=(AxisType.Auto,))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        btc_jax.save(file, packed)
        again = btc_jax.load(file, like=jax.tree.map(lambda array: _on(four, array), packed))
        size = file.stat().st_size
    moved = btc_jax.btc_evaluate(apply, again, ids, reference=reference, batch_size=4)
    print(f"4. Saved in {size:,} bytes, restored on {four.size} devices: {most_nbytes(again):,} bytes on each.")
    print(f"5. Next tokens there: {moved.agreement:.1%} the same, KL {moved.kl:.4f} nats.")


def _on(mesh: Mesh, array: jax.Array) -> jax.ShapeDtypeStruct:
    """The array's shape and dtype, on another mesh with the same axis names."""
    assert isinstance(array.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, array.sharding.spec))


if __name__ == "__main__":
    typer.run(main)
