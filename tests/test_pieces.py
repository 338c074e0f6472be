"""Leaves in pieces: shards of a mesh and stacks of layers, each packed separately, used like the dense leaf."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_allocate,
    btc_dequantize,
    btc_metrics,
    btc_plan,
    btc_quantize,
    btc_reconstruct,
    dequantize_file,
    is_packed,
    load,
    quantize_file,
    save,
    verify,
)
from btc_jax.codecs import Codec
from btc_jax.packing import quantize_leaf
from btc_jax.pieces import Cut, cut_up, joined
from btc_jax.sizes import padded_nbytes
from tests.pieces_support import LAYERS as LAYERS
from tests.pieces_support import RNG as RNG
from tests.pieces_support import WIDTH as WIDTH
from tests.pieces_support import packed_stack as packed_stack
from tests.pieces_support import scanned as scanned
from tests.pieces_support import stack as stack
from tests.test_multilevel import unchecked

CODECS = [None, Uniform(threshold=0.0), Uniform(64, threshold=0.05), Multilevel(width="leaf"), Multilevel(width=4)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4), st.data())
def test_a_leaf_is_cut_up_and_joined(sizes, data):
    stacks = tuple(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    pieces = tuple(count for count, _ in sizes)
    shape = tuple(count * (1 if axis in stacks else size) for axis, (count, size) in enumerate(sizes))
    cut, leaf = Cut(pieces, stacks), np.arange(np.prod(shape)).reshape(shape)
    parts = cut_up(leaf, cut)
    assert np.array_equal(joined(parts, tuple(axis in stacks for axis in range(len(sizes)))), leaf)
    for index in cut.indices():
        assert np.array_equal(parts[index], leaf[cut.slices(index, shape)])
        assert parts[index].shape == cut.piece(shape)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_each_layer_is_packed_by_itself(codec, axis):
    leaf = np.moveaxis(stack(4, 40, 56), 0, axis)
    packed = packed_stack(leaf, axis, codec)
    assert (packed.shape, packed.dtype, packed.ndim, packed.size) == (leaf.shape, leaf.dtype, 3, leaf.size)
    decoded = np.asarray(packed.dequantize())
    # Products and sums may be fused differently: one unit in the last place of the largest weight.
    jitted = np.asarray(jax.jit(lambda q: q.dequantize())(packed))
    np.testing.assert_allclose(jitted, decoded, rtol=0, atol=np.spacing(np.abs(decoded).max()))
    policy = Policy(codec, (Rule("kernel", stack=axis),))
    if codec is None or codec.rate_controlled:
        policy = btc_allocate({"kernel": leaf}, policy=policy, bits=4.5)
    alone = policy.rules[0].codec if isinstance(policy.rules[0].codec, Codec) else codec
    assert isinstance(alone, Codec)
    for i in range(4):
        layer = quantize_leaf(np.take(leaf, i, axis), alone, packed.order)
        assert np.array_equal(np.take(decoded, i, axis), layer.dequantize())
    for i in range(4):
        layer, found = np.take(leaf, i, axis), np.take(decoded, i, axis)
        assert np.linalg.norm(found - layer) < 0.3 * np.linalg.norm(layer)


def test_padding_is_in_the_target_and_not_in_the_file(tmp_path):
    packed = packed_stack(stack(LAYERS, 64, 64))
    assert 4.4 < 8 * packed.nbytes / packed.size <= 4.5
    (metrics,) = btc_metrics({"k": stack(LAYERS, 64, 64)}, {"k": packed}).leaves
    assert metrics.measures is not None
    assert metrics.measures.effective_bits == 8 * packed.nbytes / packed.size
    save(tmp_path / "q.safetensors", {"k": packed})
    assert verify(tmp_path / "q.safetensors").ok
    with load_checkpoint(tmp_path / "q.safetensors") as checkpoint:
        assert checkpoint.records["k"].nbytes < packed.nbytes
    again = load(tmp_path / "q.safetensors")["k"]
    assert (again.pieces, again.stacks, again.shape) == (packed.pieces, packed.stacks, packed.shape)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(packed), strict=True):
        assert np.array_equal(a, b)


def load_checkpoint(file):
    from btc_jax import open_checkpoint

    return open_checkpoint(file)


def test_a_row_for_every_block_is_not_a_plane_that_is_filled_up():
    """One layer all wide, one all narrow: the planes of the second are as long, and empty."""
    rng = np.random.default_rng(1)
    leaf = np.stack([rng.standard_normal((32, 32)), 1e-3 * rng.standard_normal((32, 32))]).astype(np.float32)
    packed = packed_stack(leaf, codec=Uniform(64, threshold=0.05))
    assert packed.planes[1].shape[-2] == 16
    for i in range(2):
        assert np.array_equal(packed[i], quantize_leaf(leaf[i], Uniform(64, threshold=0.05)).dequantize())


@pytest.mark.parametrize("index", [0, 3, -1, np.int64(2), jnp.int32(1)])
def test_one_layer_is_decoded_alone(index):
    packed = packed_stack(stack(LAYERS, 32, 48))
    assert np.array_equal(packed[index], packed.dequantize()[index])
    text = jax.jit(lambda q, i: q[i]).lower(packed, 1).compile().memory_analysis()
    assert text is not None
    assert text.temp_size_in_bytes < 3 * 4 * 32 * 48
    assert np.array_equal(packed[1:3, 0], packed.dequantize()[1:3, 0])
    with pytest.raises(IndexError):
        packed[LAYERS]


def test_stacks_of_stacks():
    leaf = stack(3, 2, 24, 40)
    packed = packed_stack(leaf, (0, 1))
    assert (packed.piece, packed.pieces) == ((24, 40), (3, 2, 1, 1))

    def layer(carry, q):
        assert q.shape == (2, 24, 40)
        return carry, jax.vmap(lambda q: q.dequantize())(q)

    assert np.array_equal(jax.lax.scan(layer, 0, packed)[1], packed.dequantize())


def test_a_scan_decodes_a_layer_at_a_time():
    packed, x = packed_stack(stack(12, WIDTH, WIDTH)), jnp.ones((4, WIDTH))
    assert np.allclose(scanned(packed, x), scanned(packed.dequantize(), x), atol=1e-6)
    memory = jax.jit(scanned).lower(packed, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 1.5 * 4 * WIDTH * WIDTH
    gradient = jax.grad(lambda x: jnp.sum(scanned(packed, x)))(x)
    assert np.allclose(gradient, jax.grad(lambda x: jnp.sum(scanned(packed.dequantize(), x)))(x), atol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(WIDTH)(x)), None


class Stacked(nn.Module):
    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}, "length": LAYERS}
        return nn.scan(block, **options)(name="layers")(x)[0]


@pytest.mark.parametrize(("axis", "remat"), [(0, False), (1, False), (0, True)])
def test_linen_scans_it_unmodified(axis, remat):
    model, x = Stacked(axis, remat), jnp.ones((2, WIDTH))
    params = model.init(jax.random.key(0), x)["params"]
    packed = btc_quantize(params, policy=Policy(rules=(Rule("*/kernel", stack=axis),)), bits=4.5)
    expected: Any = model.apply({"params": btc_dequantize(packed)}, x)
    for apply in (model.apply, jax.jit(model.apply)):
        found: Any = apply({"params": packed}, x)
        assert np.allclose(found, expected, atol=1e-6)
    memory = jax.jit(model.apply).lower({"params": packed}, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 1.5 * 4 * WIDTH * WIDTH


def test_boxes_of_linen_name_the_stack(tmp_path):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return jnp.tanh(nn.Dense(WIDTH, kernel_init=init)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
            return nn.scan(Named, metadata_params={nn.PARTITION_NAME: "layers"}, **options)(name="l")(x, None)[0]

    model, x = Model(), jnp.ones((2, WIDTH))
    params = model.init(jax.random.key(0), x)["params"]
    packed = btc_quantize(params, bits=4.5)
    kernel = packed["l"]["Dense_0"]["kernel"]
    assert (kernel.names, kernel.value.stacks) == (("layers", None, "model"), (0,))
    expected: Any = model.apply({"params": btc_dequantize(packed)}, x)
    found: Any = model.apply({"params": packed}, x)
    assert np.allclose(found, expected, atol=1e-6)
    save(tmp_path / "q.safetensors", packed)
    again = load(tmp_path / "q.safetensors")["l"]["Dense_0"]["kernel"]
    assert (again.names, again.value.stacks) == (kernel.names, kernel.value.stacks)
    whole = btc_quantize(params, policy=Policy(rules=(Rule("*/kernel", stack=()),)), bits=4.5)
    assert whole["l"]["Dense_0"]["kernel"].value.stacks is None


def test_variables_of_nnx_name_the_stack():
    variable = nnx.Param(jnp.asarray(stack(4, 32, 48)), out_sharding=("layers", None, "model"), eager_sharding=False)
    packed = btc_quantize(nnx.State({"kernel": variable}), bits=4.5)
    leaf = next(leaf for leaf in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(leaf))
    assert (leaf.stacks, leaf.shape) == ((0,), (4, 32, 48))


class Net(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


def test_nnx_scans_it_unmodified():
    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    packed = btc_quantize(state, policy=Policy(rules=(Rule("*/kernel", stack=0),)), bits=4.5)
    x = jnp.ones((2, WIDTH))
    expected = nnx.merge(graphdef, btc_dequantize(packed))(x)
    assert np.allclose(nnx.merge(graphdef, packed)(x), expected, atol=1e-6)
    assert np.allclose(nnx.jit(lambda m, x: m(x))(nnx.merge(graphdef, packed), x), expected, atol=1e-6)


def test_taps_are_those_of_a_piece():
    ramp = np.linspace(-1, 1, 9).reshape(1, 3, 3, 1, 1) * RNG.standard_normal((4, 1, 1, 16, 32))
    packed = packed_stack(ramp.astype(np.float32))
    assert (packed.order, packed.piece) == ("output-major-taps", (3, 3, 16, 32))
    assert packed_stack(stack(4, 32, 32)).order == "output-major"
    assert np.linalg.norm(np.asarray(packed.dequantize()) - ramp) < 0.05 * np.linalg.norm(ramp)


def test_reconstruction_is_that_of_the_packed_leaf():
    leaf = jnp.asarray(stack(LAYERS, 32, 48))
    policy = btc_allocate({"kernel": leaf}, policy=Policy(rules=(Rule("kernel", stack=0),)), bits=4.5)
    packed = btc_quantize({"kernel": leaf}, policy=policy)["kernel"]
    assert packed.stacks == (0,)
    for reconstruct in (btc_reconstruct, jax.jit(btc_reconstruct, static_argnames="policy")):
        found = reconstruct({"kernel": leaf}, policy=policy)["kernel"]
        np.testing.assert_allclose(found, packed.dequantize(), rtol=1e-5, atol=1e-7)


def test_plans_are_exact():
    tree, policy = {"kernel": stack(LAYERS, 30, 50)}, Policy(rules=(Rule("kernel", stack=0),))
    goals: Any = ({"bits": 4.5}, {})
    for goal in goals:
        plan = btc_plan(tree, policy=policy, measure=True, **goal)
        assert plan.bytes_max == btc_quantize(tree, policy=policy, **goal)["kernel"].nbytes
        vague = btc_plan(tree, policy=policy, **goal)
        assert vague.bytes_min <= plan.bytes_max <= vague.bytes_max
    form = Uniform(64).formats[0]
    assert padded_nbytes(form, 128, [(2, 0), (0, 2)]) == padded_nbytes(form, 128, [(0, 2)])


def test_files_of_others_with_stacks(tmp_path):
    np.savez(tmp_path / "m.npz", kernel=stack(LAYERS, 64, 64))
    policy = Policy(rules=(Rule("kernel", stack=0),))
    goals: Any = ({"bits": 4.5}, {"size": 16_000}, {})
    for goal in goals:
        done = quantize_file(tmp_path / "m.npz", tmp_path / "q.safetensors", policy=policy, **goal)
        assert done.packed == 1
        assert load(tmp_path / "q.safetensors")["kernel"].stacks == (0,)
        assert done.bytes_after <= goal.get("size", 10**9)
        restored = dequantize_file(tmp_path / "q.safetensors", tmp_path / "r.safetensors")
        assert restored.leaves == 1


def test_other_savers():
    packed = packed_stack(stack(3, 32, 32))
    state = serialization.to_state_dict({"k": packed})
    state = unchecked(serialization.msgpack_restore)(serialization.msgpack_serialize(state))
    again = serialization.from_state_dict({"k": packed}, state)["k"]
    assert (again.stacks, again.shape) == (packed.stacks, packed.shape)
    assert np.array_equal(again.dequantize(), packed.dequantize())
    exported = jax.export.export(jax.jit(scanned))(packed, jnp.ones((4, 32)))
    restored = jax.export.deserialize(exported.serialize())
    assert np.allclose(restored.call(packed, jnp.ones((4, 32))), scanned(packed, jnp.ones((4, 32))), atol=1e-6)
