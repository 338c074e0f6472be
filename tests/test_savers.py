"""Packed trees in other serializers: Flax's msgpack, JAX's export, Orbax's own checkpointers, pickle, numpy."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training import train_state
from jax import export

from btc_jax import Multilevel, Uniform, btc_dequantize, btc_quantize, is_packed
from btc_jax.formats import UniformFormat, UnknownFormatError
from btc_jax.packing import quantize_leaf

TARGETS = [{}, {"bits": 4.5}, {"codec": Multilevel(width=3)}, {"codec": Multilevel(width=0)}]


def tree(target, seed=0, dtype=jnp.bfloat16):
    kernel = jax.random.normal(jax.random.key(seed), (64, 64)).astype(dtype)
    return btc_quantize({"layer": {"kernel": kernel, "bias": jnp.zeros(64)}, "scale": jnp.ones(3)}, **target)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_flax_serialization_brings_back_every_leaf(target):
    packed = tree(target)
    data = serialization.to_bytes(packed)
    assert_equal(serialization.from_bytes(packed, data), packed)
    # The template determines the containers; the file determines the leaf.
    assert_equal(serialization.from_bytes(tree({"bits": 3}, seed=1), data), packed)
    state = serialization.to_state_dict(packed)
    assert_equal(serialization.from_state_dict(packed, state), packed)


def test_flax_serialization_within_other_states():
    import optax

    packed = tree({"bits": 4.5})
    dense = {"bias": jnp.ones(3)}
    state = train_state.TrainState.create(apply_fn=print, params=dense, tx=optax.adam(1e-3)).replace(params=packed)
    restored: Any = serialization.from_bytes(state, serialization.to_bytes(state))
    assert_equal(restored.params, packed)


def test_flax_serialization_names_what_does_not_fit():
    packed = tree({"bits": 4.5})
    data = serialization.to_bytes(packed)
    other = btc_quantize({"layer": {"kernel": jnp.ones((64, 65)), "bias": jnp.zeros(64)}, "scale": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"bfloat16\[64, 64\].*float32\[64, 65\]"):
        serialization.from_bytes(other, data)
    dense = serialization.to_bytes(btc_dequantize(packed))
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        serialization.from_bytes(packed, dense)


def test_flax_serialization_refuses_a_format_that_no_file_can_name():
    class OwnFormat(UniformFormat):
        pass

    class Own(Uniform):
        @property
        def formats(self):
            return (OwnFormat(self.block_size),)

    with pytest.raises(UnknownFormatError, match="register_format"):
        serialization.to_bytes({"kernel": quantize_leaf(jnp.ones((8, 8)), Own(32))})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("closed_over", [False, True])
def test_exported_functions(target, closed_over):
    packed, x = tree(target), jnp.ones((2, 64), jnp.bfloat16)

    def function(packed, x):
        return x @ packed["layer"]["kernel"]

    expected = jax.jit(function)(packed, x)
    if closed_over:
        data = export.export(jax.jit(lambda x: function(packed, x)))(x).serialize()
        found = export.deserialize(data).call(x)
    else:
        exported = export.deserialize(export.export(jax.jit(function))(packed, x).serialize())
        found = exported.call(packed, x)
        assert jax.tree.structure(exported.in_tree.unflatten(exported.in_avals)[0][0]) == jax.tree.structure(packed)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_decoding_lowers_for_accelerators(platform):
    function = jax.jit(lambda packed: packed["layer"]["kernel"].dequantize())
    assert export.export(function, platforms=[platform])(tree({"bits": 4.5})).platforms == (platform,)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")  # Orbax's own, of any tree
def test_orbax_restores_into_a_template(target, abstract, tmp_path):
    packed = tree(target)
    template = jax.eval_shape(lambda: packed) if abstract else packed
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", packed)
        checkpointer.wait_until_finished()
        assert_equal(checkpointer.restore(tmp_path / "standard", template), packed)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", packed)
        assert_equal(checkpointer.restore(tmp_path / "tree", item=template), packed)


def test_no_child_has_no_elements():
    for target in TARGETS:
        assert all(array.size for array in jax.tree.leaves(tree(target)))
    loud = btc_quantize({"kernel": jnp.linspace(0, 9, 4096).reshape(64, 64)}, Uniform(64))
    smooth = btc_quantize({"kernel": jnp.linspace(0, 1e-2, 4096).reshape(64, 64)}, Uniform(64))
    assert (len(loud["kernel"].planes), len(smooth["kernel"].planes)) == (2, 1)


@pytest.mark.parametrize("target", TARGETS)
def test_copies(target):
    packed = tree(target)
    assert_equal(pickle.loads(pickle.dumps(packed)), packed)
    assert_equal(copy.deepcopy(packed), packed)
    assert is_packed(copy.copy(packed["layer"]["kernel"]))


def test_numpy_saves_the_decoded_weights(tmp_path):
    packed = tree({"bits": 4.5}, dtype=jnp.float32)["layer"]
    np.savez(tmp_path / "file.npz", **packed)
    np.testing.assert_array_equal(np.load(tmp_path / "file.npz")["kernel"], packed["kernel"].dequantize())
