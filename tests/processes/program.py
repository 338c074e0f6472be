"""What each of several processes runs: python -m tests.processes.program WHAT COUNT INDEX PORT FOLDER."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import btc_jax
from btc_jax.processes import is_spread, on_host
from tests.processes.trees import GOALS, POLICY, spread


def pack():
    """Packs, measures, decodes, saves and loads the tree for each goal."""
    figures, packed = {}, {}
    for name, goal in GOALS.items() if COUNT == 2 else [("bits", GOALS["bits"])]:
        params = spread(AxisType.Explicit if name == "rmse" else AxisType.Auto)
        packed = btc_jax.btc_quantize(params, policy=POLICY, **goal)
        assert is_spread(packed["up"].planes[0])
        decoded = btc_jax.btc_dequantize(packed)
        assert all(decoded[path].sharding == leaf.sharding for path, leaf in params.items())
        metrics = btc_jax.btc_metrics(params, packed, policy=POLICY)
        measured = btc_jax.btc_plan(params, policy=POLICY, measure=True, **goal)
        assert measured.bytes_max == metrics.bytes_after
        btc_jax.save(FOLDER / f"{name}.safetensors", packed)
        btc_jax.save(FOLDER / f"{name}-parts.safetensors", packed, max_shard_bytes=4000)
        shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in params.items()}
        again = btc_jax.load(FOLDER / f"{name}-parts.safetensors", like=shapes)
        for path, leaf in btc_jax.btc_dequantize(again).items():
            assert leaf.sharding == params[path].sharding, path
            np.testing.assert_array_equal(on_host(leaf), on_host(decoded[path]))
        assert "shape=(64, 128)" in repr(packed["up"])
        assert packed["up"]._repr_html_().startswith("<pre>")
        figures[name] = metrics.to_json()
    orbax(packed)
    logits = btc_jax.btc_logits(jax.jit(lambda p, x: x @ p["up"]), packed, jnp.ones((2, 64)))
    assert logits.shape == (2, 128)
    return figures


def orbax(packed):
    """Through Orbax: its own processes write and wait for each other."""
    import orbax.checkpoint as ocp

    from btc_jax.orbax import BTCCheckpointHandler, BTCRestore, BTCSave

    with ocp.Checkpointer(BTCCheckpointHandler()) as keeper:
        keeper.save(FOLDER / "orbax", args=BTCSave(packed))
        again = keeper.restore(FOLDER / "orbax", args=BTCRestore())
    for path, leaf in btc_jax.btc_dequantize(again).items():
        np.testing.assert_array_equal(on_host(leaf), on_host(btc_jax.btc_dequantize(packed)[path]))


def fail():
    """What is wrong in one process is an error in all."""
    messages = []
    params = spread()
    broken = params["up"].addressable_shards
    odd = [jnp.asarray(shard.data) * (np.nan if INDEX == 0 and i == 0 else 1) for i, shard in enumerate(broken)]
    params["up"] = jax.make_array_from_single_device_arrays((64, 128), params["up"].sharding, odd)
    for goal in (GOALS["paper"], GOALS["bits"]):
        try:
            btc_jax.btc_quantize(params, policy=POLICY, **goal)
        except ValueError as error:
            messages.append(str(error))
    packed = btc_jax.btc_quantize(spread(), policy=POLICY)
    for wrong in (
        lambda: btc_jax.btc_quantize(spread(), like=packed),
        lambda: btc_jax.btc_quantize(spread(), policy=POLICY, room=0.01),
        lambda: btc_jax.save(FOLDER / "no" / "such" / "folder", packed),
    ):
        try:
            wrong()
        except (ValueError, OSError) as error:
            messages.append(str(error))
    return messages


def many():
    """A checkpoint of as many leaves and files as there may be, from all processes."""
    count, files = (100_000, 4000) if os.environ.get("BTC_JAX_SLOW") else (1000, 40)
    one = btc_jax.packing.quantize_leaf(np.linspace(-1, 1, 16, dtype=np.float32), btc_jax.Uniform(8))
    tree = {f"expert_{i}/kernel": jax.tree.map(np.array, one) for i in range(count)}
    for i, leaf in enumerate(tree.values()):
        leaf.planes[0].flat[0] = i % 256
    btc_jax.save(FOLDER / "many.safetensors", tree | spread(), max_shard_bytes=one.nbytes * count // files)
    loaded = btc_jax.load(FOLDER / "many.safetensors", select="expert_*99/kernel")
    assert len(loaded) == count // 100
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf.planes[0], tree[path].planes[0])
    with btc_jax.open_checkpoint(FOLDER / "many.safetensors") as checkpoint:
        return len(checkpoint.records), len(checkpoint.files)


def save():
    """Saves one tree after another, until it is killed."""
    packed = btc_jax.btc_quantize(spread(), policy=POLICY, bits=4.5)
    for version in range(10_000):
        tree = packed | {"version": version, "again": version}
        btc_jax.save(FOLDER / "model.safetensors", tree, max_shard_bytes=4000)
        if INDEX == 0:
            (FOLDER / "saved").write_text(str(version))
    return None


if __name__ == "__main__":
    WHAT, COUNT, INDEX, PORT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    FOLDER = Path(sys.argv[5])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PORT}", COUNT, INDEX)
    result = {"pack": pack, "fail": fail, "many": many, "save": save}[WHAT]()
    (FOLDER / f"{WHAT}-{COUNT}-{INDEX}.json").write_text(json.dumps(result))
