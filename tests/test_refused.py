"""`save` refuses what `load` would refuse, before writing anything; and unknown formats are not reported as damage."""

import dataclasses
import os
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btc_jax
from btc_jax import BTCTensor, Uniform, load, save, verify
from btc_jax.checkpoint import BTCUnknownFormatError
from btc_jax.formats import FORMATS, UniformFormat, register_format
from btc_jax.packing import quantize_leaf
from btc_jax.seal import SEAL


def leaf(codec: Any = None) -> BTCTensor:
    weights = jnp.linspace(-1, 1, 40 * 16).reshape(40, 16) ** 3
    return quantize_leaf(weights, codec or Uniform(16, threshold=0.1))


def numpy_leaf() -> BTCTensor:
    """A leaf whose arrays can be changed in place, unnoticed by any constructor."""
    return jax.tree.map(lambda array: np.array(array), leaf())


@dataclasses.dataclass(frozen=True)
class UnregisteredFormat(UniformFormat):
    id: ClassVar[str] = "tests-unregistered"


@dataclasses.dataclass(frozen=True)
class Unregistered(Uniform):
    @property
    def formats(self):
        return (UnregisteredFormat(self.block_size),)


@register_format
@dataclasses.dataclass(frozen=True)
class CoarseFormat(UniformFormat):
    """A custom format."""

    id: ClassVar[str] = "tests-coarse"

    widths: tuple[int, ...] = (2, 8)


@dataclasses.dataclass(frozen=True)
class Coarse(Uniform):
    """A custom codec."""

    @property
    def formats(self):
        return (CoarseFormat(self.block_size),)


def with_broken_seal():
    broken = numpy_leaf()
    broken.seal[0] += 1
    return broken


def with_other_widths():
    broken = numpy_leaf()
    broken.header["wide"][0] ^= 1
    return broken


def with_another_order():
    one = leaf()
    object.__setattr__(one, "order", "sideways")
    return one


def shapes_only():
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf())


def donated():
    one = leaf()
    one.planes[0].delete()
    return one


def stacked():
    return jax.tree.map(lambda array: jnp.stack([array] * 3), leaf())


def deleted():
    array = jnp.ones(3) + 1
    array.delete()
    return array


REFUSED = {
    "stack": (
        ValueError,
        lambda: jax.tree.map(lambda array: jnp.stack([array] * 3), leaf()),
        r"stack of 3.*\(40, 16\)",
    ),
    "seal": (TypeError, with_broken_seal, "seal"),
    "widths": (TypeError, with_other_widths, "rows"),
    "codec": (ValueError, lambda: leaf(Unregistered()), "'tests-unregistered'.*register_format"),
    "order": (ValueError, with_another_order, "sideways"),
    "shapes": (TypeError, shapes_only, "ShapeDtypeStruct"),
    "masks": (TypeError, lambda: jax.tree.map(lambda _: True, leaf()), "True"),
    "deleted": (ValueError, deleted, "deleted"),
    "donated": (ValueError, donated, "deleted or donated"),
    "text": (TypeError, lambda: np.array(["a"]), "only arrays"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("shards", [None, 100])
def test_refused_with_its_path_before_anything_is_written(name, shards, tmp_path):
    error, make, message = REFUSED[name]
    tree = {"a": np.ones(4), "layer": {"kernel": make()}}
    with pytest.raises(error, match=rf"(?s)^layer/kernel.*{message}"):
        save(tmp_path / "m.safetensors", tree, max_shard_bytes=shards)
    assert not os.listdir(tmp_path)


def test_the_seal_is_what_a_leaf_begins_with(tmp_path):
    save(tmp_path / "m.safetensors", {"w": (one := leaf())})
    with btc_jax.open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        (tensor,) = checkpoint.records["w"].tensors
        stored = checkpoint.read_tensor(tensor).tobytes()
    parts = [one.seal, one.header["maximum"], one.header["minimum"], one.header["wide"], *one.planes]
    assert stored == b"".join(np.asarray(part).tobytes() for part in parts)
    assert stored[:4] == SEAL.tobytes()
    assert len(stored) == one.nbytes


def test_a_codec_of_ones_own(tmp_path):
    packed = {"w": leaf(Coarse(16, threshold=0.1))}
    save(tmp_path / "m.safetensors", packed)
    loaded = load(tmp_path / "m.safetensors")["w"]
    assert type(loaded.format) is CoarseFormat
    assert np.array_equal(loaded.dequantize(), packed["w"].dequantize())


def test_an_unknown_codec_is_not_damage(tmp_path, monkeypatch):
    save(tmp_path / "m.safetensors", {"other": leaf(), "w": leaf(Coarse(16, threshold=0.1)), "bias": np.ones(3)})
    monkeypatch.delitem(FORMATS, "tests-coarse")
    with pytest.raises(BTCUnknownFormatError, match=r"m\.safetensors.*'w'.*'tests-coarse'.*register_format") as caught:
        load(tmp_path / "m.safetensors")
    assert caught.value.format == "tests-coarse"
    assert set(load(tmp_path / "m.safetensors", select=["bias", "other"])) == {"bias", "other"}
    found = verify(tmp_path / "m.safetensors")
    assert (found.damaged, len(found.unknown_formats), found.ok) == ((), 1, False)
    assert "'w'" in found.unknown_formats[0]
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m.safetensors").write_bytes(data)
    found = verify(tmp_path / "m.safetensors")
    assert (len(found.damaged), found.unknown_formats) == (1, ())


def test_a_codec_of_ones_own_with_orbax(tmp_path, monkeypatch):
    ocp = pytest.importorskip("orbax.checkpoint")
    from btc_jax.orbax import BTCRestore, BTCSave

    packed = {"w": leaf(Coarse(16, threshold=0.1))}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=BTCSave(packed))
        manager.wait_until_finished()
        loaded = manager.restore(0, args=BTCRestore())["w"]
        assert np.array_equal(loaded.dequantize(), packed["w"].dequantize())
        monkeypatch.delitem(FORMATS, "tests-coarse")
        with pytest.raises(BTCUnknownFormatError):
            manager.restore(0, args=BTCRestore())
