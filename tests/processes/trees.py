"""The tree that several processes pack, and that one process packs to compare."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from btc_jax import Policy, Rule

SPECS = {
    "up": PartitionSpec("x", "y"),
    "down": PartitionSpec("y", None),
    "layers": PartitionSpec(None, None, "y"),
    "copied": PartitionSpec(),
    "half": PartitionSpec("y"),
    "bias": PartitionSpec(),
}
POLICY = Policy(rules=(Rule("layers", stack=0), Rule("bias", None)))
GOALS: dict[str, Any] = {"paper": {}, "bits": {"bits": 4.5}, "rmse": {"rmse": 0.01}}


def leaves():
    rng = np.random.default_rng(0)
    return {
        "up": rng.standard_normal((64, 128)).astype(np.float32),
        "down": (0.1 * rng.standard_normal((128, 64))).astype(np.float32),
        "layers": rng.standard_normal((3, 32, 64)).astype(np.float32),
        "copied": rng.standard_normal((32, 64)).astype(np.float32),
        "half": rng.standard_normal((64, 32)).astype(np.float16),
        "bias": np.zeros(64, np.float32),
    }


def spread(kind=AxisType.Auto):
    """The tree on a mesh of all eight devices, in however many processes they are."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return {
        name: jax.make_array_from_callback(leaf.shape, places[name], lambda index, leaf=leaf: leaf[index])
        for name, leaf in leaves().items()
    }
