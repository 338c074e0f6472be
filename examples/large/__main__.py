"""A model sharded over eight devices and packed in place: a Llama with scanned layers.

    python -m examples.large [--width 768] [--layers 12] [--bits 4.5]
    python -m examples.large --checkpoint FOLDER [--bits 4.5]

FOLDER is a Llama checkpoint of Hugging Face: `config.json` and safetensors. Without one, the model has about 100
million random weights, and shows memory and placement. (Top choices of random weights are close to ties, which small
errors decide; those of trained weights are far more stable.) The inputs are random tokens. The devices are simulated on
the CPU, so it runs anywhere; on a host with accelerators, remove the two lines that set them up.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

import btc_jax
from examples.large.checkpoint import read_config, read_model
from examples.large.model import Config, Transformer, shardings

DEVICES, VOCABULARY, LENGTH, HEAD = 8, 8192, 64, 64


def mesh_of(count: int) -> Mesh:
    return jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def random_model(width: int, layers: int, mesh: Mesh) -> tuple[Any, Any, Config]:
    if width % HEAD:
        raise typer.BadParameter(f"{width} is not a multiple of {HEAD}", param_hint="--width")
    config = Config(width, 4 * width, layers, width // HEAD, width // HEAD, HEAD, VOCABULARY)
    graphdef, state = nnx.split(Transformer(config, nnx.Rngs(0)))
    return graphdef, jax.device_put(state, shardings(state, mesh)), config


def checkpoint_model(folder: Path, mesh: Mesh) -> tuple[Any, Any, Config]:
    try:
        config = read_config(folder)
        config.check_shards(mesh.size)
        return *read_model(folder, config, mesh), config
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from error


def most_nbytes(tree: Any) -> int:
    """Bytes on the device that holds the most."""
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def main(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a Llama checkpoint, instead of a random one.")
    ] = None,
    width: Annotated[int, typer.Option(min=HEAD, help="Width of the random model, a multiple of 64.")] = 768,
    layers: Annotated[int, typer.Option(min=1, help="Number of its layers.")] = 12,
    bits: Annotated[float, typer.Option(help="Effective bits per weight.")] = 4.5,
) -> None:
    mesh = mesh_of(DEVICES)
    graphdef, state, config = checkpoint_model(checkpoint, mesh) if checkpoint else random_model(width, layers, mesh)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state))
    print(f"1. A transformer of {weights:,} weights on {mesh.size} devices: {most_nbytes(state):,} bytes on each.")

    packed = btc_jax.btc_quantize(state, bits=bits, progress=True)  # "layers" in the metadata marks the stacked axis
    total = btc_jax.btc_metrics(state, packed).total
    print(f"2. Packed in place, {total.effective_bits:.2f} bits per weight: {most_nbytes(packed):,} bytes on each.")

    def apply(state: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(ids)

    ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, LENGTH)).astype(np.int32)
    reference = btc_jax.btc_logits(apply, state, ids, batch_size=4)
    answers = btc_jax.btc_evaluate(apply, packed, ids, reference=reference, batch_size=4)
    print(f"3. Next tokens at {answers.examples} places: {answers.agreement:.1%} the same, KL {answers.kl:.4f} nats.")

    four = mesh_of(DEVICES // 2)
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
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    typer.run(main)
