"""Pretrained weights: conversion from PyTorch's names, where files are found, downloads, and what is refused."""

import contextlib
import hashlib
import http.server
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.paper import sources, weights
from examples.paper.models import MLP
from examples.paper.networks import NETWORKS
from examples.paper.sources import SOURCES, Source, WeightsMissing, default_folders, download
from examples.paper.torch_names import torch_names
from examples.paper.weights import convert, load_weights, read_state

NETWORK = NETWORKS["cifar10_resnet20"]
PREFIX = "does not fit cifar10_resnet20: "


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


def test_without_weights_one_line_says_how_to_get_them(tmp_path, source):
    with pytest.raises(WeightsMissing) as caught:
        load_weights(NETWORK, [tmp_path], cache=tmp_path / "cache")
    stem = source.file.removesuffix(".pt")
    assert str(caught.value) == (
        f"cifar10_resnet20: no copy.safetensors or {stem}.safetensors or {source.file} was found: "
        f"download {source.address} and name its folder with --weights"
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fetch", [True, False])
def test_without_torch_one_line_says_what_to_do(tmp_path, source, monkeypatch, fetch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path if fetch else tmp_path / "published"
    with pytest.raises(
        WeightsMissing, match=r"needs PyTorch, which is not installed: `pip install torch`, or give copy"
    ):
        load_weights(NETWORK, [folder], download=fetch, cache=tmp_path / "cache")


def test_a_download_arrives_whole(tmp_path, source):
    path = download(source, tmp_path / "a" / "cache")
    assert path.read_bytes() == b"weights" * 1000
    assert [file.name for file in path.parent.iterdir()] == [source.file]


def test_a_damaged_download_leaves_what_is_there(tmp_path, source):
    cached = tmp_path / source.file
    cached.write_bytes(b"a good file")
    (tmp_path / "published" / source.file).write_bytes(b"weight5" * 1000)
    with pytest.raises(
        ValueError, match=rf"{source.file}: its SHA-256 begins with \w{{8}} and its name says \w{{8}}; it is"
    ):
        download(source, tmp_path, progress=False)
    assert cached.read_bytes() == b"a good file"
    assert not [file for file in tmp_path.iterdir() if "tmp" in file.name]


def test_offline_gives_one_line(tmp_path):
    away = Source((tmp_path / "nothing-12345678.pt").as_uri())
    with pytest.raises(
        WeightsMissing, match=r"^file.*nothing-12345678.pt could not be downloaded \(.*\): put the file into"
    ):
        download(away, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


@contextlib.contextmanager
def serving(content: bytes, promised: int):
    """A server that promises more bytes than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_download_that_is_cut_short_is_refused(tmp_path):
    with serving(b"half", 1000) as address:
        with pytest.raises((ValueError, WeightsMissing), match=r"net\.th.*(4 of 1,000 bytes arrived|IncompleteRead)"):
            download(Source(f"{address}net.th"), tmp_path, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_nobody_answers(tmp_path):
    with serving(b"", 0) as address:
        pass
    with pytest.raises(WeightsMissing, match="could not be downloaded"):
        download(Source(f"{address}net.th"), tmp_path, progress=False)


def test_default_folders_exist():
    assert all(folder.is_dir() for folder in default_folders())


def test_sources_are_complete():
    assert SOURCES.keys() == NETWORKS.keys()
    files = [source.file for source in SOURCES.values()]
    assert len(set(files)) == len(files)
    # Every file whose digits are a checksum is checked.
    for name, source in SOURCES.items():
        if not name.startswith("akamaster"):
            with pytest.raises(ValueError, match="SHA-256"):
                sources.check_sum(source.file, "no digest", "")


def test_files_of_torch_are_read(tmp_path, source, state):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in state.items()}
    for content in ({"state_dict": tensors, "best_prec1": 91.7, "epoch": 3}, tensors):
        torch.save(content, tmp_path / "net.th")
        read = read_state(tmp_path / "net.th")
        assert read.keys() == tensors.keys()
        np.testing.assert_array_equal(read["module.fc.weight"], state["fc.weight"])
    convert(read, NETWORK, "net.th")


def test_torch_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save({"weight": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"net\.pt is not a PyTorch checkpoint, or it is truncated \(\w+.*\); delete"):
        read_state(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"net\.pt holds a list instead of a state dict; save `model\.state_dict\(\)`"):
        read_state(path)
    torch.save({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match=r"net\.pt: weight is bfloat16; save"):
        read_state(path)
    Path(path).write_bytes(b"")
    with pytest.raises(ValueError, match=r"net\.pt is not a PyTorch checkpoint"):
        read_state(path)


def test_a_truncated_local_file_is_known_by_its_name(tmp_path, source):
    pytest.importorskip("torch")
    (tmp_path / source.file).write_bytes(b"weights" * 999)
    with pytest.raises(ValueError, match=r"its SHA-256 begins with .*: delete it and download it again"):
        load_weights(NETWORK, [tmp_path], cache=tmp_path / "cache")


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": Evil()}, tmp_path / "net.th")
    with pytest.raises(ValueError, match=r"net\.th is not a PyTorch checkpoint"):
        read_state(tmp_path / "net.th")
    assert not (tmp_path / "touched").exists()
