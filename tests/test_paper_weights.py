"""Pretrained weights: conversion from PyTorch's names, where files are found, downloads, and what is refused."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.paper import weights
from examples.paper.models import MLP
from examples.paper.networks import NETWORKS
from examples.paper.torch_names import torch_names
from examples.paper.weights import convert, load_weights
from tests.paper_weights_support import NETWORK as NETWORK
from tests.paper_weights_support import random_state as random_state
from tests.paper_weights_support import source as source
from tests.paper_weights_support import state as state

PREFIX = "does not fit cifar10_resnet20: "


@pytest.mark.parametrize("network", NETWORKS.values(), ids=lambda network: network.name)
def test_every_array_has_a_name_of_its_own(network):
    names = torch_names(network.model, network.shapes())
    assert len(set(names)) == len(names)


def test_a_model_without_rules_is_refused():
    with pytest.raises(ValueError, match=r"no rule gives PyTorch's name of classifier/bias; add one to RULES"):
        torch_names(MLP((), 2), {"params": {"classifier": {"bias": np.zeros(2)}}})


def test_arrays_go_where_they_belong(state):
    variables = convert(state, NETWORK, "here")
    params, stats = variables["params"], variables["batch_stats"]
    conv = params["layer2_0"]["conv1"]["conv"]["kernel"]
    assert conv[1, 2, 3, 4] == state["layer2.0.conv1.weight"][4, 3, 1, 2]
    np.testing.assert_array_equal(params["classifier"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(stats["layer1_2"]["conv2"]["bn"]["var"], state["layer1.2.bn2.running_var"])
    projection = params["layer3_0"]["shortcut"]["projection"]
    np.testing.assert_array_equal(projection["bn"]["scale"], state["layer3.0.downsample.1.weight"])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), NETWORK.shapes()
    )


@pytest.mark.parametrize("name", ["cifar100_mobilenetv2_x0_5", "cifar10_shufflenetv2_x0_5", "akamaster_resnet20"])
def test_conversion_keeps_every_number(name):
    state = random_state(name)
    kept = [array for key, array in state.items() if "num_batches" not in key]
    leaves = jax.tree.leaves(convert(state, NETWORKS[name], "here"))
    np.testing.assert_array_equal(
        np.sort(np.concatenate([np.ravel(leaf) for leaf in leaves])),
        np.sort(np.concatenate([array.ravel() for array in kept])),
    )


def test_names_of_parallel_training_are_understood(state):
    parallel = {f"module.{name}": array for name, array in state.items()}
    for ours, theirs in zip(*(jax.tree.leaves(convert(s, NETWORK, "")) for s in (state, parallel)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def refused(state, network=NETWORK):
    with pytest.raises(ValueError, match="does not fit") as caught:
        convert(state, network, "net.pt")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_another_architecture_is_refused():
    message = refused(random_state("cifar10_shufflenetv2_x0_5"))
    # 21 and 56 convolutions, each with four arrays of a batch norm; fc.weight and fc.bias are in both.
    assert message == (
        f"net.pt {PREFIX}105 of its 107 arrays are missing, such as bn1.bias; 280 arrays of the file have no place, "
        "such as conv1.0.weight; 1 shapes differ, such as fc.weight (10, 1024) instead of (10, 64). "
        "Give cifar10_resnet20-4118986f.pt"
    )


def test_option_a_and_projections_are_not_mistaken_for_each_other(state):
    assert "have no place, such as layer2.0.downsample.0.weight" in refused(
        {name.replace("fc.", "linear."): array for name, array in state.items()}, NETWORKS["akamaster_resnet20"]
    )


def test_a_missing_array_is_named(state):
    del state["layer1.0.bn1.running_mean"]
    assert f"{PREFIX}1 of its 107 arrays are missing, such as layer1.0.bn1.running_mean. Give" in refused(state)


def test_an_array_left_over_is_named(state):
    assert f"{PREFIX}1 arrays of the file have no place, such as fc.scale. Give" in refused(
        state | {"fc.scale": np.ones(1)}
    )


def test_another_class_count_is_said(state):
    state |= {"fc.weight": np.zeros((100, 64), np.float32), "fc.bias": np.zeros(100, np.float32)}
    assert refused(state) == f"net.pt {PREFIX}it has 100 classes instead of 10. Give cifar10_resnet20-4118986f.pt"


def test_a_wrong_shape_is_said(state):
    state["conv1.weight"] = np.zeros((16, 1, 3, 3), np.float32)
    assert "1 shapes differ, such as conv1.weight (16, 1, 3, 3) instead of (16, 3, 3, 3)" in refused(state)


def test_a_transposed_classifier_is_no_class_count(state):
    state["fc.weight"] = state["fc.weight"].T
    assert "1 shapes differ, such as fc.weight (64, 10) instead of (10, 64)" in refused(state)


def test_other_dtypes_are_refused(state):
    state["conv1.weight"] = state["conv1.weight"].astype(np.float16)
    assert "1 arrays are not float32, such as conv1.weight of float16" in refused(state)


def test_a_copy_is_loaded_without_torch(tmp_path, source, state, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    save_file(state, tmp_path / "copy.safetensors")
    (tmp_path / source.file).write_bytes(b"not looked at")
    variables = load_weights(NETWORK, [tmp_path / "absent", tmp_path], cache=tmp_path / "cache")
    np.testing.assert_array_equal(variables["params"]["classifier"]["bias"], state["fc.bias"])


def test_a_truncated_copy_is_refused(tmp_path, source, state):
    path = tmp_path / "copy.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"copy\.safetensors.*(truncated|ends)"):
        load_weights(NETWORK, [tmp_path], cache=tmp_path / "cache")
