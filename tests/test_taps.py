"""Layouts that transform the taps of convolutions: an orthonormal DCT, chosen where it helps, inverted everywhere."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from btc_jax import Multilevel, Policy, Rule, Uniform, btc_dequantize, btc_plan, btc_quantize, is_packed, load, save
from btc_jax._typing import Order
from btc_jax.blocks import MAX_TAPS, axes, blocks_of, join, tap_sizes, with_taps
from btc_jax.checkpoint import BTCFormatError
from btc_jax.packing import quantize_leaf
from tests import oracle
from tests.multilevel_support import same_bytes
from tests.test_multilevel_leaves import forged

SHAPES = [(), (7,), (0,), (0, 4), (4, 6), (5, 3, 2), (1, 4, 6), (3, 3, 4, 8), (0, 3, 3, 4), (2, 3, 3, 4, 5)]
ORDERS: tuple[Order, ...] = ("output-major-taps", "stored-taps")
KERNEL = (3, 3, 8, 32)
ANY_SIZE = Policy(Multilevel(), min_size=0)


def smooth(seed=0, shape=KERNEL):
    """A kernel whose taps differ little, as in trained networks; taps first."""
    rng = np.random.default_rng(seed)
    taps = (1,) * (len(shape) - 2)
    return (rng.standard_normal(taps + shape[-2:]) + 0.1 * rng.standard_normal(shape)).astype(np.float32)


def rough(seed=0, shape=KERNEL):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_hold_the_cosine_transform_of_the_taps(shape, order):
    leaf = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    flat = np.ravel(blocks_of(jnp.asarray(leaf), 4, order))[: leaf.size]
    np.testing.assert_allclose(flat, oracle.flattened(leaf, order), atol=1e-5)
    np.testing.assert_allclose(np.square(flat).sum(), np.square(leaf).sum(), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_join_undoes_blocks_of(shape, order):
    leaf = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(join(blocks_of(jnp.asarray(leaf), 4, order), shape, order), leaf, atol=1e-5)


def test_a_block_holds_one_frequency():
    constant = np.broadcast_to(rough(shape=(8, 32)), KERNEL)
    full = blocks_of(jnp.asarray(constant), 32, "output-major-taps")
    energy = np.square(full).sum(1).reshape(9, 8)
    assert energy[0].min() > 1
    assert energy[1:].max() < 1e-9
    np.testing.assert_allclose(full[:8].reshape(32, 8), 3 * constant[0, 0].T, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((3, 3, 4, 8), "output-major", "output-major-taps"),
        ((8, 4, 3, 3), "stored", "stored-taps"),
        ((5, 4, 8), "output-major", "output-major-taps"),
        ((2, 2, 2, 4, 8), "output-major", "output-major-taps"),
        ((16, 16, 2, 2), "output-major", "output-major-taps"),
        ((16, 17, 2, 2), "output-major", None),
        ((1, 1, 4, 8), "output-major", None),
        ((4, 8), "output-major", None),
        ((8,), "stored", None),
        ((), "stored", None),
        ((0, 3, 4, 8), "output-major", None),
        ((3, 3, 4, 8), "output-major-taps", None),
    ],
)
def test_which_leaves_have_taps(shape, order, expected):
    assert with_taps(shape, order) == expected
    if expected:
        assert sorted(axes(len(shape), expected)) == list(range(len(shape)))
        assert np.prod(tap_sizes(shape, expected)) <= MAX_TAPS


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("codec", [Multilevel(), Uniform(32, threshold=0.0, header_dtype="float32")])
def test_a_leaf_comes_back(order, codec):
    leaf = smooth()
    tensor = quantize_leaf(leaf, codec, order, slope=2.0**-14)
    assert tensor.order == order
    assert oracle.sqnr_db(leaf, tensor.dequantize()) > 35
    if isinstance(codec, Multilevel):
        np.testing.assert_allclose(tensor.dequantize(), oracle.multilevel_decoded(tensor), atol=1e-5)


def test_errors_stay_as_large_as_they_are():
    tensor = quantize_leaf(rough(), Multilevel(), "output-major-taps", slope=2.0**-8)
    flat = oracle.multilevel_blocks(tensor).reshape(-1)
    before = np.square(flat - oracle.flattened(rough(), "output-major-taps")).sum()
    np.testing.assert_allclose(np.square(np.asarray(tensor.dequantize()) - rough()).sum(), before, rtol=1e-4)


def test_narrow_dtypes_are_transformed_in_float32():
    leaf = smooth().astype(jnp.bfloat16)
    tensor = quantize_leaf(leaf, Multilevel(), "output-major-taps", slope=2.0**-14)
    assert tensor.dequantize().dtype == jnp.bfloat16
    assert oracle.sqnr_db(leaf.astype(np.float64), np.asarray(tensor.dequantize(), np.float64)) > 35


# Chosen where it helps


def test_taps_are_transformed_where_that_pays():
    tree = {"smooth": {"kernel": smooth()}, "rough": {"kernel": rough()}, "dense": {"kernel": rough(0, (64, 64))}}
    packed = btc_quantize(tree, policy=ANY_SIZE, bits=4.5)
    orders = {name: leaf["kernel"].order for name, leaf in packed.items()}
    assert orders == {"smooth": "output-major-taps", "rough": "output-major", "dense": "output-major"}
    rows = btc_plan(tree, policy=ANY_SIZE, bits=4.5, measure=True).rows
    assert {row.path.split("/")[0]: row.order for row in rows} == orders


def test_they_save_error_at_equal_bits():
    tree = {"kernel": smooth()}
    plain = btc_quantize(tree, policy=ANY_SIZE, bits=4.5, taps=False)["kernel"]
    taps = btc_quantize(tree, policy=ANY_SIZE, bits=4.5)["kernel"]
    assert (plain.order, taps.order) == ("output-major", "output-major-taps")
    assert max(plain.nbytes, taps.nbytes) * 8 / plain.size <= 4.5
    gain = oracle.sqnr_db(tree["kernel"], taps.dequantize()) - oracle.sqnr_db(tree["kernel"], plain.dequantize())
    assert gain > 6


def test_a_pytorch_kernel_is_transformed_over_its_last_axes():
    leaf = np.ascontiguousarray(smooth().transpose(3, 2, 0, 1))
    packed = btc_quantize(
        {"weight": leaf}, policy=Policy(Multilevel(), names=("*",), order="stored", min_size=0), bits=4
    )
    assert packed["weight"].order == "stored-taps"
    flax = btc_quantize({"kernel": smooth()}, policy=ANY_SIZE, bits=4)["kernel"]
    np.testing.assert_allclose(
        np.asarray(packed["weight"].dequantize()).transpose(2, 3, 1, 0), flax.dequantize(), atol=1e-5
    )


def test_an_order_can_be_asked_for():
    rules = (Rule("a/*", Multilevel(), "output-major-taps"), Rule("b/*", Uniform(32), "output-major-taps"))
    tree = {name: {"kernel": rough()} for name in "ab"}
    packed = btc_quantize(tree, policy=Policy(Multilevel(), rules, min_size=0), bits=8)
    assert {leaf["kernel"].order for leaf in packed.values()} == {"output-major-taps"}


# In models and files


@pytest.mark.parametrize("bits", [3.0, 6.0])
def test_linen_models_run_on_it(bits):
    model, x = nn.Conv(32, (3, 3)), jax.random.normal(jax.random.key(0), (2, 9, 9, 8))
    variables = model.init(jax.random.key(0), x)
    variables["params"]["kernel"] = jnp.asarray(smooth())
    packed = btc_quantize(variables, policy=ANY_SIZE, bits=bits)
    assert packed["params"]["kernel"].order == "output-major-taps"
    expected = np.asarray(model.apply(btc_dequantize(packed), x))
    for apply in (model.apply, jax.jit(model.apply)):
        np.testing.assert_allclose(np.asarray(apply(packed, x)), expected, rtol=1e-5, atol=1e-5)


def test_nnx_models_run_on_it():
    model = nnx.Conv(8, 32, (3, 3), rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(smooth()))
    graphdef, state = nnx.split(model)
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 8))
    packed = btc_quantize(state, policy=ANY_SIZE, bits=5)
    assert [leaf.order for leaf in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(leaf)] == [ORDERS[0]]
    expected = nnx.merge(graphdef, btc_dequantize(packed))(x)
    np.testing.assert_allclose(nnx.merge(graphdef, packed)(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(packed, x), expected, rtol=1e-5, atol=1e-5
    )


def test_it_decodes_on_other_devices():
    tensor = quantize_leaf(smooth(), Multilevel(), ORDERS[0], slope=2.0**-8)
    assert np.array_equal(jax.device_put(tensor, jax.devices()[3]).dequantize(), tensor.dequantize())
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.device_put(tensor, jax.NamedSharding(mesh, jax.P()))
    assert np.array_equal(everywhere.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("order", ORDERS)
def test_files_keep_the_order(tmp_path, order):
    tensor = quantize_leaf(smooth(), Multilevel(), order, slope=2.0**-8)
    save(tmp_path / "m.safetensors", {"w": tensor})
    loaded = load(tmp_path / "m.safetensors")["w"]
    assert loaded.order == order
    assert same_bytes(loaded, tensor)
    assert np.array_equal(loaded.dequantize(), tensor.dequantize())
    header = (tmp_path / "m.safetensors").read_bytes()
    written = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["btc_jax"]
    assert json.loads(written)["formats"][0]["order"] == order


@pytest.mark.parametrize("order", ORDERS)
def test_a_file_may_not_ask_for_too_many_taps(tmp_path, order):
    few, many = ((2, 2, 4, 4), (64, 1, 1)) if order == ORDERS[0] else ((4, 4, 2, 2), (1, 1, 64))
    assert load(forged(tmp_path, order=order, shape=few))["w"].dequantize().shape == few
    assert load(forged(tmp_path, order=order, shape=many))["w"].dequantize().shape == many
    rows = 512 // 32
    header, planes = (0x20,) * rows, ((rows, 1), (rows, 1))
    shape = (512, 1, 1) if order == ORDERS[0] else (1, 1, 512)
    with pytest.raises(BTCFormatError, match="taps"):
        load(forged(tmp_path, order=order, shape=shape, header=header, planes=planes))
    load(forged(tmp_path, order=order.removesuffix("-taps"), shape=shape, header=header, planes=planes))


@pytest.mark.parametrize("order", ORDERS)
def test_too_many_taps_are_refused(order):
    leaf = np.ones((17, 16, 2, 3) if order == ORDERS[0] else (2, 3, 17, 16), np.float32)
    with pytest.raises(
        ValueError, match=rf"^w: order '{order}' would transform axes of \(17, 16\), more than 256 taps"
    ):
        quantize_leaf(leaf, Multilevel(), order, "w")
    with pytest.raises(ValueError, match=r"^kernel: order"):
        btc_quantize({"kernel": leaf}, policy=Policy(Multilevel(), order=order, min_size=0), bits=4)
