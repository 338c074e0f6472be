"""What the tests of the weights of the evaluation share."""

import hashlib

import jax
import numpy as np
import pytest

from examples.paper.networks import NETWORKS
from examples.paper.sources import SOURCES, Source
from examples.paper.torch_names import torch_names

NETWORK = NETWORKS["cifar10_resnet20"]


def random_state(name: str = "cifar10_resnet20", seed: int = 0) -> dict[str, np.ndarray]:
    """What PyTorch would save: its names, its shapes, and the counters that are not used here."""
    network, rng = NETWORKS[name], np.random.default_rng(seed)
    names = torch_names(network.model, network.shapes())
    leaves = jax.tree.leaves(network.shapes())
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    state = {
        name: rng.standard_normal([leaf.shape[axis] for axis in axes[leaf.ndim]], np.float32)
        for name, leaf in zip(names, leaves, strict=True)
    }
    counters = {n.replace("running_var", "num_batches_tracked"): np.asarray(7) for n in state if "running_var" in n}
    return state | counters


@pytest.fixture
def state():
    return random_state()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A published file of `NETWORK` in its own folder, with the right checksum in its name; no other is known."""
    folder, content = tmp_path / "published", b"weights" * 1000
    folder.mkdir()
    file = folder / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pt"
    file.write_bytes(content)
    published = Source(file.as_uri(), ("copy.safetensors",))
    monkeypatch.setitem(SOURCES, NETWORK.name, published)
    return published
