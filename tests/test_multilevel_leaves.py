"""Leaves of all shapes, dtypes and scales under the multilevel codec."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import Multilevel, btc_dequantize, btc_quantize, btc_reconstruct, load, save
from btc_jax.checkpoint import BTCFormatError
from btc_jax.packing import quantize_leaf
from btc_jax.seal import SEAL
from tests import oracle
from tests.hostile.forge import checkpoint, manifest, packed_format
from tests.hostile.forge import packed as packed_record
from tests.multilevel_support import LEAF as LEAF
from tests.multilevel_support import packed as packed
from tests.multilevel_support import same_bytes as same_bytes
from tests.multilevel_support import weights as weights


@pytest.mark.parametrize("shape", [(5, 7, 3), (2, 3, 3, 4, 5)])
def test_shapes(shape):
    leaf = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    tensor = quantize_leaf(leaf, Multilevel(width=8))
    assert tensor.dequantize().shape == shape
    np.testing.assert_allclose(tensor.dequantize(), leaf, atol=0.05)


@pytest.mark.parametrize("shape", [(0,), (0, 4), ()])
def test_leaves_of_no_weight_or_one(shape):
    """Also without a given slope, if the requested bits cannot be used."""
    leaf = np.full(shape, 0.3, np.float32)
    assert np.array_equal(quantize_leaf(leaf, Multilevel()).dequantize(), leaf)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype):
    leaf = np.clip(weights(3), -4, 4).astype(jnp.dtype(dtype))
    tensor = packed(leaf, 2.0**-12)
    assert tensor.dtype == tensor.dequantize().dtype == dtype
    assert oracle.sqnr_db(leaf.astype(np.float64), np.asarray(tensor.dequantize(), np.float64)) > 35


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3.7, 1e-30, 1e30, 2.0**-120])
def test_one_value_is_exact_and_takes_no_payload(value):
    tensor = packed(np.full(LEAF, value, np.float32))
    assert np.array_equal(tensor.dequantize(), np.full(LEAF, value, np.float32))
    assert tensor.nbytes == tensor.num_blocks + 8 + SEAL.nbytes


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_one_value_by_a_target(value):
    tree = {"kernel": np.full((64, 64), value, np.float32)}
    targets = [functools.partial(btc_quantize, **{kind: 4096}) for kind in ("size", "rmse")]
    targets += [functools.partial(btc_quantize, bits=4.5), functools.partial(btc_quantize, sqnr_db=20), btc_quantize]
    for quantize in targets:
        tensor = quantize(tree, Multilevel())["kernel"]
        assert np.array_equal(tensor.dequantize(), tree["kernel"])
        assert tensor.nbytes == 128 + 8 + SEAL.nbytes


def test_weights_around_a_value_far_from_zero():
    leaf = np.random.default_rng(0).standard_normal(LEAF).astype(np.float32)
    errors = [
        oracle.sqnr_db(leaf, oracle.multilevel_decoded(packed(leaf + c, 2.0**-8 / (1 + c * c))) - c) for c in (0, 5)
    ]
    assert abs(errors[0] - errors[1]) < 0.3


@pytest.mark.parametrize("count", [1, 3])
def test_outliers_leave_other_blocks_unharmed(count):
    leaf = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    spoilt = leaf.copy()
    spoilt[:count, 0] = [1e4, -1e4, 1e4][:count]
    rest = np.ones((64, 64), bool)
    rest[:, 0] = False
    for bits in (3.5, 4.5, 5.5):
        decoded = [np.asarray(btc_quantize({"kernel": w}, bits=bits)["kernel"].dequantize()) for w in (leaf, spoilt)]
        plain, rounded = (oracle.sqnr_db(leaf[rest], w[rest]) for w in decoded)
        assert rounded > plain - 1
        assert np.abs(decoded[1][:count, 0] - spoilt[:count, 0]).max() < 1e4 / 20  # 8 bits, in coarse ranges


def test_an_outlier_of_one_leaf_leaves_all_leaves_unharmed():
    rng = np.random.default_rng(0)
    tree = {f"{i}/kernel": rng.standard_normal((64, 64)).astype(np.float32) for i in range(4)}
    spoilt = tree | {"0/kernel": tree["0/kernel"].copy()}
    spoilt["0/kernel"][3, 5] = 1e4
    decoded = [btc_dequantize(btc_quantize(t, bits=4.5)) for t in (tree, spoilt)]
    for path, leaf in tree.items():
        rest = leaf == spoilt[path]
        rest[:, 5] = False
        plain, rounded = (oracle.sqnr_db(leaf[rest], np.asarray(d[path])[rest]) for d in decoded)
        assert rounded > plain - 1, path


def test_heavy_tails():
    leaf = np.random.default_rng(0).standard_cauchy(LEAF).astype(np.float32)
    decoded = oracle.multilevel_decoded(packed(leaf, 2.0**-16))
    assert oracle.sqnr_db(leaf, decoded) > 25


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_any_scale(scale):
    leaf = np.random.default_rng(0).standard_normal(LEAF).astype(np.float32)
    usual = oracle.sqnr_db(leaf, oracle.multilevel_decoded(packed(leaf)))
    scaled = (leaf * scale).astype(np.float32)
    assert abs(oracle.sqnr_db(scaled, np.asarray(packed(scaled).dequantize(), np.float64)) - usual) < 0.01


def test_weights_near_the_smallest_normal_number():
    leaf = np.random.default_rng(0).standard_normal(LEAF).astype(np.float32) * np.float32(1e-36)
    assert oracle.sqnr_db(leaf * 1e36, np.asarray(packed(leaf).dequantize(), np.float64) * 1e36) > 15


def test_subnormal_weights_are_off_by_less_than_a_normal_number():
    leaf = (np.random.default_rng(0).standard_normal((64, 64)) * 1e-39).astype(np.float32)
    for tensor in (packed(leaf), btc_quantize({"kernel": leaf}, bits=4.5)["kernel"]):
        assert np.abs(np.asarray(tensor.dequantize(), np.float64) - leaf).max() < np.finfo(np.float32).tiny


@pytest.mark.parametrize("codec", [Multilevel(), Multilevel(width=5)])
def test_weights_too_large_are_an_error(codec):
    leaf = weights(0) * np.float32(1e36)
    for slope in (0.01, None):
        with pytest.raises(ValueError, match=r"^head/kernel: weights as large as .*e\+3\d leave no room"):
            quantize_leaf(leaf, codec, "stored", "head/kernel", slope)


@pytest.mark.parametrize("spike", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 40, 3049])
def test_not_finite_weights_are_an_error(spike, place):
    leaf = weights(0)
    leaf.reshape(-1)[place] = spike
    for slope in (0.01, None):
        with pytest.raises(ValueError, match=r"^head/kernel: 1 of 3050 weights are NaN or infinite"):
            quantize_leaf(leaf, Multilevel(), "stored", "head/kernel", slope)


def test_float64_weights():
    leaf = np.random.default_rng(0).standard_normal((40, 50))
    with jax.enable_x64(True):
        tensor = quantize_leaf(leaf, Multilevel(), slope=2.0**-12)
        assert tensor.dtype == tensor.dequantize().dtype == np.float64
        assert oracle.sqnr_db(leaf, tensor.dequantize()) > 35


def test_decodes_inside_jit_and_on_another_device():
    tensor = packed(weights(4))
    decoded = np.asarray(tensor.dequantize())
    assert np.array_equal(jax.jit(lambda t: t.dequantize())(tensor), decoded)
    moved = jax.device_put(tensor, jax.devices()[3])
    assert np.array_equal(moved.dequantize(), decoded)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    assert np.array_equal(jax.device_put(tensor, everywhere).dequantize(), decoded)


def test_an_optimizer_refuses_it():
    optax = pytest.importorskip("optax")
    with pytest.raises(TypeError, match="init of an optimizer"):
        optax.adam(1e-3).init({"kernel": packed(weights(0))})


def test_no_gradient():
    tensor = packed(weights(0))
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda t: t.dequantize().sum(), allow_int=True)(tensor)


def test_reconstruct_is_quantize_and_decode():
    tree = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)}
    for codec in (Multilevel(slope=2.0**-8), Multilevel()):
        expected = btc_dequantize(btc_quantize(tree, codec))["kernel"]
        np.testing.assert_allclose(btc_reconstruct(tree, codec)["kernel"], expected, rtol=1e-6, atol=1e-6)
        if not codec.rate_controlled:
            traced = jax.jit(functools.partial(btc_reconstruct, codec=codec))(tree)
            np.testing.assert_allclose(traced["kernel"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", [Multilevel(), Multilevel(width="leaf")])
def test_reconstruct_under_jit_refuses_what_adapts_to_a_target(codec):
    with pytest.raises(TypeError, match=r"^kernel is traced, and Multilevel\(.* is rate-controlled.*btc_allocate"):
        jax.jit(functools.partial(btc_reconstruct, codec=codec))({"kernel": jnp.ones((64, 64))})


@pytest.mark.parametrize("width", [None, 0, 5])
def test_files_give_back_every_bit(tmp_path, width):
    tensor = packed(weights(5), width=width)
    save(tmp_path / "m.safetensors", {"w": tensor})
    loaded = load(tmp_path / "m.safetensors")["w"]
    assert same_bytes(loaded, tensor)
    assert (loaded.shape, loaded.dtype, loaded.format, loaded.order) == (LEAF, np.float32, tensor.format, "stored")
    assert np.array_equal(loaded.dequantize(), tensor.dequantize())


def forged(folder, changes=(), header=(0x20, 0x28), planes=((2, 1), (2, 1)), order="stored", shape=(64,)):
    """A file of one leaf of two blocks: both of width 2 by their headers, unless changed."""
    numbers = np.zeros(1, np.float32).tobytes(), bytes(header), np.ones(1, np.float32).tobytes()
    data = SEAL.tobytes() + b"".join(numbers) + b"".join(bytes(4 * rows * words) for rows, words in planes)
    codec = {"id": "multilevel", "block_size": 32, "width": None} | dict(changes)
    fields = manifest([packed_format(codec, order)], [packed_record(data, list(shape))])
    return checkpoint(folder / "m.safetensors", fields, {"w": data})


def test_the_forged_file_is_sound_without_a_lie(tmp_path):
    assert load(forged(tmp_path))["w"].dequantize().shape == (64,)


@pytest.mark.parametrize(
    "lie",
    [
        {"changes": {"width": "leaf"}},
        {"changes": {"width": 9}},
        {"changes": {"width": True}},
        {"changes": {"block_size": 2**20}},
        {"changes": {"slope": 1e999}},
        {"changes": {"levels": 3}},
        {"header": (0x28, 0x48)},  # the second says 3 bits
        {"header": (0x28, 0)},  # the second says none
        {"header": (0x28, 1)},  # the second says 8
        {"header": (0x28,)},
        {"planes": ((2, 1), (1, 1))},
        {"planes": ((2, 2), (2, 1))},
        {"order": "taps"},
    ],
)
def test_lies_are_refused(tmp_path, lie):
    with pytest.raises(BTCFormatError):
        load(forged(tmp_path, **lie))
