"""One object at several places in a tree: stored once, and one object after loading."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from btc_jax import Uniform, dequantize_file, load, open_checkpoint, save, verify
from btc_jax.checkpoint import BTCFormatError
from btc_jax.compare import compare, open_any
from btc_jax.packing import quantize_leaf


@pytest.fixture
def file(tmp_path):
    return tmp_path / "m.safetensors"


def embedding():
    return jax.random.normal(jax.random.key(0), (30, 64))


def tied(pack: bool) -> Any:
    leaf = quantize_leaf(embedding(), Uniform()) if pack else embedding()
    return {"embed": {"embedding": leaf}, "head": {"kernel": leaf}, "other": jnp.ones(3)}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shards", [None, 1])
def test_stored_once_and_one_object_again(file, pack, shards):
    tree = tied(pack)
    save(file, tree, max_shard_bytes=shards)
    with open_checkpoint(file) as checkpoint:
        first, second = checkpoint.records["embed/embedding"], checkpoint.records["head/kernel"]
        assert checkpoint.nbytes == first.nbytes + 12 == tree["head"]["kernel"].nbytes + 12
        assert (second.kind, second.nbytes, second.details) == ("tied", 0, {"of": "embed/embedding"})
        assert (second.shape, second.dtype) == (first.shape, first.dtype) == ((30, 64), "float32")
        assert jnp.array_equal(checkpoint.read("head/kernel", dense=True), jnp.asarray(tree["head"]["kernel"]))
    for loaded in (load(file), load(file, dense=True), load(file, like=tree), load(file, device=jax.devices()[1])):
        assert loaded["embed"]["embedding"] is loaded["head"]["kernel"]
        assert jnp.array_equal(jnp.asarray(loaded["head"]["kernel"]), jnp.asarray(tree["head"]["kernel"]))
    assert verify(file).ok
    assert verify(file).leaves == 3


def test_selected_without_the_leaf_that_holds_it(file):
    save(file, tied(True))
    (leaf,) = load(file, select="head/*").values()
    assert np.array_equal(leaf.dequantize(), tied(True)["head"]["kernel"].dequantize())


def test_on_two_devices_it_is_two_objects(file):
    save(file, tied(False))
    devices = {"embed/embedding": jax.devices()[1], "head/kernel": jax.devices()[2]}
    loaded = load(file, device=devices.get)
    assert loaded["embed"]["embedding"].devices() == {jax.devices()[1]}
    assert loaded["head"]["kernel"].devices() == {jax.devices()[2]}


def test_a_file_of_several_that_does_not_hold_it(file):
    save(file, tied(True), max_shard_bytes=1)
    shard = sorted(file.parent.glob("m-*.safetensors"))[-1]
    names = {path.name for path in file.parent.glob("m-*")}
    assert shard.name in names
    with open_checkpoint(shard) as checkpoint:
        homeless = [path for path, record in checkpoint.records.items() if record.kind == "tied"]
    if homeless:
        with open_checkpoint(shard) as checkpoint, pytest.raises(BTCFormatError, match="in another file"):
            checkpoint.read(homeless[0])


@pytest.mark.parametrize("leaf", [np.float32(1), 3, "text", True, None], ids=str)
def test_equal_values_are_not_tied(file, leaf):
    save(file, {"a": leaf, "b": leaf, "c": np.ones(2), "d": np.ones(2)})
    with open_checkpoint(file) as checkpoint:
        assert all(record.kind != "tied" for record in checkpoint.records.values())


def test_restored_and_compared(file, tmp_path):
    save(file, tied(True))
    dequantize_file(file, tmp_path / "plain.safetensors")
    with safetensors.safe_open(tmp_path / "plain.safetensors", "np") as plain:
        assert np.array_equal(plain.get_tensor("embed/embedding"), plain.get_tensor("head/kernel"))
    with open_any(file) as a, open_any(tmp_path / "plain.safetensors") as b:
        assert not compare(a, b).different


def test_in_other_containers(file):
    packed = quantize_leaf(embedding(), Uniform())
    save(file, [packed, {"again": packed}])
    loaded = load(file)
    assert loaded[0] is loaded[1]["again"]
