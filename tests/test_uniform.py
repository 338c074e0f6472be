import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import Uniform
from btc_jax.codecs import codec_from_json
from btc_jax.formats import UniformFormat
from btc_jax.packing import quantize_leaf
from tests import oracle

FEW = settings(max_examples=40, deadline=None)


def weights(seed, shape, scale=1.0, dtype=np.float32):
    """Blocks with very different spreads, a constant run, and a few outliers."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    w = rng.standard_normal(size) * np.repeat(rng.choice([0.01, 0.04, 0.06, 0.3], size // 16 + 1), 16)[:size]
    w[: size // 8] = w[:1]
    w[rng.random(size) < 0.01] *= 10
    return (w * scale).reshape(shape).astype(dtype)


def unchecked_uniform(**arguments):
    """A codec from arguments of any type: the test run's type checks would precede the codec's own."""
    codec = object.__new__(Uniform)
    getattr(Uniform.__init__, "__wrapped__", Uniform.__init__)(codec, **arguments)
    return codec


def steps(tensor):
    """The quantization step of every weight of a packed leaf, in the order of the blocks."""
    header = {name: np.asarray(array, np.float64) for name, array in tensor.header.items()}
    levels = 2.0 ** np.asarray(tensor.widths) - 1
    step = (header["maximum"] - header["minimum"]) / levels
    return np.repeat(step, tensor.format.block_size)[: tensor.size]


def within_half_a_step(leaf, tensor):
    """The codec's guarantee, up to float32 rounding of numbers as large as the grid."""
    exact = oracle.output_major(leaf).astype(np.float64)
    decoded = oracle.output_major(np.asarray(tensor.dequantize(jnp.float32))).astype(np.float64)
    largest = max(
        np.abs(np.asarray(extreme, np.float64)).max()
        for extreme in (tensor.header["minimum"], tensor.header["maximum"])
    )
    return np.all(np.abs(exact - decoded) <= steps(tensor) / 2 + 4 * np.finfo(np.float32).eps * largest + 1e-37)


@pytest.mark.parametrize("block_size", [2, 7, 64, 256])
@pytest.mark.parametrize(("low_bits", "high_bits"), [(4, 8), (1, 8), (3, 5)])
def test_equals_the_oracle(block_size, low_bits, high_bits):
    leaf = weights(block_size, (3, 3, 10, 20))
    codec = Uniform(block_size, low_bits, high_bits)
    tensor = quantize_leaf(leaf, codec)
    expected = oracle.quantize(oracle.output_major(leaf), block_size, low_bits, high_bits)
    assert np.asarray(tensor.widths).tolist() == [block[0] for block in expected]
    assert np.array_equal(tensor.header["minimum"], np.array([block[2] for block in expected]))
    assert np.array_equal(tensor.header["maximum"], np.array([block[3] for block in expected]))
    decoded = oracle.output_major(np.asarray(tensor.dequantize()))
    rounding = 2 * np.finfo(np.float32).eps * np.abs(leaf).max()
    np.testing.assert_allclose(decoded, np.concatenate([block[4] for block in expected]), rtol=0, atol=rounding)


def test_codes_equal_the_oracle():
    blocks = weights(1, (50, 64))
    leaf_params = {"threshold": jnp.full(50, 0.05, jnp.float32)}
    coded = Uniform(64).encode(UniformFormat(), jnp.asarray(blocks), jnp.zeros(50), leaf_params)
    for codes, width, block in zip(coded.codes, coded.widths, blocks, strict=True):
        bits, expected, *_ = oracle.quantize_block(block, 4, 8, 0.05)
        assert width == bits
        assert np.array_equal(codes, expected)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-4, 4),
    shape=st.sampled_from([(129,), (3, 3, 4, 5)]),
    codec=st.sampled_from(
        [Uniform(32), Uniform(7, 3, 5, 0.1), Uniform(64, threshold=0), Uniform(64, threshold=math.inf)]
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_every_weight_is_within_half_a_step(seed, exponent, shape, codec, dtype):
    leaf = np.clip(weights(seed, shape, 10.0**exponent), -6e4, 6e4).astype(jnp.dtype(dtype))
    tensor = quantize_leaf(leaf, codec)
    assert within_half_a_step(leaf.astype(np.float32), tensor)


@FEW
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-30, 30))
def test_float32_header_holds_any_scale(seed, exponent):
    leaf = weights(seed, (5, 77), 10.0**exponent)
    tensor = quantize_leaf(leaf, Uniform(32, header_dtype="float32"))
    assert within_half_a_step(leaf, tensor)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -0.1, 2.0**-20, -1e-6, 6e4])
def test_constant_leaf_is_exact_up_to_the_header(value):
    leaf = np.full((8, 9), value, np.float32)
    decoded = np.asarray(quantize_leaf(leaf, Uniform(16)).dequantize())
    assert np.all(np.abs(decoded - leaf) <= np.abs(leaf) * 2.0**-14 + 2.0**-25)
    exact = quantize_leaf(leaf, Uniform(16, header_dtype="float32")).dequantize()
    assert np.array_equal(exact, leaf)


def test_constant_in_float16_has_step_and_codes_zero():
    tensor = quantize_leaf(np.full(64, 0.5, np.float32), Uniform(32))
    assert not np.any(tensor.planes[0])
    assert np.array_equal(tensor.header["minimum"], tensor.header["maximum"])


def test_a_minimum_of_zero_is_stored_as_negative_zero():
    header = quantize_leaf(np.zeros((64,), np.float32), Uniform(32)).header
    assert np.asarray(header["minimum"]).view(np.uint16).tolist() == [0x8000] * 2


def test_deviation_at_the_threshold_is_wide():
    block = np.tile(np.array([-0.25, 0.25], np.float32), 16)  # its deviation is exactly 0.25
    assert np.asarray(quantize_leaf(block, Uniform(32, threshold=0.25)).widths) == 8
    assert np.asarray(quantize_leaf(block, Uniform(32, threshold=0.2500001)).widths) == 4


def test_tail_is_judged_by_its_own_weights():
    leaf = np.concatenate([np.zeros(64), np.tile([-1.0, 1.0], 5)]).astype(np.float32)
    tensor = quantize_leaf(leaf, Uniform(64))
    assert np.asarray(tensor.widths).tolist() == [4, 8]
    np.testing.assert_allclose(tensor.dequantize(), leaf, rtol=1e-6)


@pytest.mark.parametrize("spike", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threshold", [0.05, 0.0, math.inf])
@pytest.mark.parametrize("place", [0, 5, 63, 130])
def test_not_finite_weights_are_an_error(spike, threshold, place):
    leaf = weights(0, (131,))
    leaf[place] = spike
    with pytest.raises(ValueError, match=r"^head/kernel: 1 of 131 weights are NaN or infinite"):
        quantize_leaf(leaf, Uniform(32, threshold=threshold), path="head/kernel")


def test_weights_beyond_float16_ask_for_a_float32_header():
    leaf = np.array([1e5, 0, 1, 2], np.float32)
    with pytest.raises(ValueError, match=r"kernel: weights as large as 100000 .* header_dtype='float32'"):
        quantize_leaf(leaf, Uniform(2), path="kernel")
    np.testing.assert_allclose(quantize_leaf(leaf, Uniform(2, header_dtype="float32")).dequantize(), leaf, rtol=1e-6)


def test_a_range_beyond_float32_is_an_error():
    with pytest.raises(ValueError, match="3e\\+38"):
        quantize_leaf(np.array([3e38, -3e38], np.float32), Uniform(2, header_dtype="float32"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"block_size": 1}, ValueError, "block_size is 1; a block holds at least 2"),
        ({"block_size": 2**16 + 1}, ValueError, "at most 65536"),
        ({"block_size": 2.5}, TypeError, "block_size is 2.5"),
        ({"low_bits": 0}, ValueError, "low_bits is 0"),
        ({"low_bits": 8}, ValueError, "1 <= low_bits < high_bits <= 8"),
        ({"high_bits": 9}, ValueError, "high_bits is 9"),
        ({"threshold": -0.1}, ValueError, "threshold is -0.1"),
        ({"threshold": 1e300}, ValueError, "beyond float32; give inf"),
        ({"threshold": math.nan}, ValueError, "threshold is nan"),
        ({"threshold": "much"}, TypeError, "threshold is 'much'"),
        ({"header_dtype": "bfloat16"}, ValueError, "header_dtype is 'bfloat16'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        unchecked_uniform(**arguments)


@pytest.mark.parametrize("codec", [Uniform(), Uniform(32, 3, 5, 0.1, "float32"), Uniform(threshold=math.inf)])
def test_config_round_trips(codec):
    assert codec_from_json(json.loads(json.dumps(codec.to_json(), allow_nan=False))) == codec
    assert eval(repr(codec), {"Uniform": Uniform, "inf": math.inf}) == codec
    assert len({codec, codec_from_json(codec.to_json())}) == 1


def test_numpy_numbers_are_taken():
    assert unchecked_uniform(block_size=np.int64(64), threshold=np.float32(0.5)) == Uniform(64, threshold=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id": "none"}, "unknown codec 'none'.*'uniform'"),
        ({}, "unknown codec 'None'"),
        ({"id": "uniform", "blocksize": 3}, "blocksize"),
        ({"id": "uniform", "block_size": 1}, "block_size is 1"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        codec_from_json(config)


def test_float64_weights():
    leaf = weights(3, (40, 50)).astype(np.float64)
    with jax.enable_x64(True):
        tensor = quantize_leaf(leaf, Uniform(32))
        decoded = tensor.dequantize()
        assert tensor.dtype == decoded.dtype == np.float64
    assert within_half_a_step(leaf.astype(np.float32), tensor)


@pytest.mark.parametrize("codec", [Uniform(), Uniform(threshold=0.0), Uniform(header_dtype="float32")])
@pytest.mark.parametrize("blocks", [0, 1, 9])
def test_the_stored_header_is_as_announced(codec, blocks):
    tensor = quantize_leaf(np.ones((blocks, codec.block_size), np.float32), codec, "stored")
    announced = tensor.format.stored_header(blocks)
    described = {name: (array.shape, array.dtype) for name, array in tensor.header.items()}
    assert described == {name: (array.shape, array.dtype) for name, array in announced.items()}
