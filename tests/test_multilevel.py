"""The multilevel codec: it stores what its description says, and no other header would be better."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import Multilevel, coding
from btc_jax.codecs import codec_from_json
from btc_jax.formats import MultilevelFormat
from btc_jax.packing import quantize_leaf
from btc_jax.seal import SEAL
from btc_jax.tiles import blocks_in
from tests import oracle
from tests.multilevel_support import LEAF as LEAF
from tests.multilevel_support import packed as packed
from tests.multilevel_support import same_bytes as same_bytes
from tests.multilevel_support import weights as weights

FEW = settings(max_examples=15, deadline=None)


EPS = np.finfo(np.float32).eps


def unchecked(function):
    """Without the test run's type checks, which would precede those of the package."""
    return getattr(function, "__wrapped__", function)


def unchecked_codec(**arguments):
    codec = object.__new__(Multilevel)
    unchecked(Multilevel.__init__)(codec, **arguments)
    return codec


@pytest.mark.parametrize("width", [None, 0, 5, 8])
def test_each_of_256_headers_means_what_is_documented(width):
    form, step, centre = MultilevelFormat(256, width), float(np.float32(0.3)), float(np.float32(-0.7))
    numbers = {"step": jnp.full(1, step), "centre": jnp.full(1, centre)}
    widths, header = form.unpack_header({"header": jnp.arange(256, dtype=jnp.uint8)} | numbers, 256)
    expected = [oracle.multilevel_levels(h, step, centre, width) for h in range(256)]
    assert np.asarray(widths).tolist() == [len(levels).bit_length() - 1 for levels in expected]
    codes = jnp.asarray([np.arange(256) % len(levels) for levels in expected], jnp.uint32)
    decoded = np.asarray(form.decode(codes, form.grid(widths, header)))
    for h, levels in enumerate(expected):
        largest = np.abs(levels).max() + oracle.multilevel_grid(h, step)[1]
        np.testing.assert_allclose(decoded[h], levels[np.asarray(codes)[h]], rtol=0, atol=3 * EPS * largest)


@pytest.mark.parametrize(("width", "order"), [(None, "stored"), (None, "output-major"), (0, "stored"), (5, "stored")])
def test_decodes_as_the_oracle(width, order):
    tensor = quantize_leaf(weights(1), Multilevel(width=width), order, slope=2.0**-10)
    expected = oracle.multilevel_decoded(tensor)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=0, atol=4 * EPS * np.abs(expected).max())


def test_everything_stored_is_counted():
    tensor = packed(weights(0))
    counted = [int((np.asarray(tensor.widths) >= end).sum()) for end in range(1, 9)]
    assert tensor.nbytes == sum(counted) * 32 // 8 + tensor.num_blocks + 2 * 4 + SEAL.nbytes


@pytest.mark.parametrize("codec", [Multilevel(), Multilevel(64, 5), Multilevel(width=0)])
@pytest.mark.parametrize("blocks", [0, 1, 9])
def test_the_stored_header_is_as_announced(codec, blocks):
    tensor = quantize_leaf(np.ones((blocks, codec.block_size), np.float32), codec, "stored", slope=0.01)
    announced = tensor.format.stored_header(blocks)
    described = {name: (array.shape, array.dtype) for name, array in tensor.header.items()}
    assert described == {name: (array.shape, array.dtype) for name, array in announced.items()}


@pytest.mark.parametrize("codec", [Multilevel(), Multilevel(64, effort="exhaustive"), Multilevel(width=3)])
def test_config_round_trips(codec):
    assert codec_from_json(json.loads(json.dumps(codec.to_json(), allow_nan=False))) == codec
    assert eval(repr(codec), {"Multilevel": Multilevel}) == codec
    assert len({codec, codec_from_json(codec.to_json())}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 15}, ValueError, "block_size is 15; it can be 16 to 256"),
        ({"block_size": 257}, ValueError, "block_size is 257"),
        ({"block_size": 32.5}, TypeError, "block_size is 32.5"),
        ({"width": 9}, ValueError, "width is 9; it can be 0 to 8"),
        ({"width": -1}, ValueError, "width is -1"),
        ({"width": 2.5}, TypeError, "width is 2.5"),
        ({"width": "each"}, TypeError, "width is 'each'"),
        ({"effort": "much"}, ValueError, "effort is 'much'; it can be 'fast' or 'exhaustive'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        unchecked_codec(**arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"id": "multilevel", "levels": 3}, "levels"), ({"id": "multilevel", "width": 9}, "width is 9")],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        codec_from_json(config)


def levels_of(tensor):
    """The levels of each block of a packed leaf."""
    step, centre = (float(np.asarray(tensor.header[name])[0]) for name in ("step", "centre"))
    headers = np.asarray(tensor.header["header"])
    return [oracle.multilevel_levels(h, step, centre, tensor.format.width) for h in headers]


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    octave=st.integers(-24, 4),
    exponent=st.floats(-30, 30),
    width=st.sampled_from([None, None, None, 5]),
)
def test_codes_are_those_of_the_nearest_levels(seed, octave, exponent, width):
    leaf = weights(seed) * np.float32(10.0**exponent)
    tensor = packed(leaf, 2.0**octave, width=width)
    codes = oracle.multilevel_codes(tensor)
    for start, levels, chosen in zip(range(0, leaf.size, 32), levels_of(tensor), codes, strict=True):
        block = leaf.reshape(-1)[start : start + 32].astype(np.float64)
        distance = np.abs(block - levels[chosen[: block.size]])
        best = np.abs(block[:, None] - levels).min(1)
        assert np.all(distance <= best + 4 * EPS * (np.abs(block) + np.abs(levels).max()))


@FEW
@given(seed=st.integers(0, 2**32 - 1), octave=st.integers(-24, 4))
def test_no_error_exceeds_its_bound(seed, octave):
    """Levels of a half-range `h` are at most `3 h / 2 ** width` apart, and the range determines the width: so every
    weight within the range of its block is off by at most 1.27 steps of the leaf, and the error of a block is at most
    its own magnitude."""
    leaf = weights(seed)
    tensor = packed(leaf, 2.0**octave)
    step, centre = (float(np.asarray(tensor.header[name])[0]) for name in ("step", "centre"))
    errors = np.abs(oracle.flattened(leaf, "stored") - oracle.multilevel_blocks(tensor).reshape(-1)[: leaf.size])
    grids = [oracle.multilevel_grid(h, step) for h in np.asarray(tensor.header["header"])]
    width, half, middle = (np.repeat(column, 32)[: leaf.size] for column in np.array(grids).T)
    beyond = np.maximum(np.abs(leaf.reshape(-1) - centre - middle) - half, 0)
    assert np.all(errors <= 1.5 * half / 2.0**width + beyond + 1e-6)
    regular = (width > 0) & (half < 2**8 * step) & (beyond == 0)
    assert np.all(errors[regular] <= 0.75 * 2**0.75 * step + 1e-6)
    energy = np.add.reduceat((leaf.reshape(-1) - centre) ** 2, np.arange(0, leaf.size, 32))
    assert np.all(np.add.reduceat(errors**2, np.arange(0, leaf.size, 32)) <= energy * (1 + 1e-5))


BLOCKS = {
    "gauss": lambda rng: rng.standard_normal((150, 32)),
    "laplace": lambda rng: rng.laplace(size=(150, 32)),
    "of many scales": lambda rng: rng.standard_normal((150, 32)) * 2.0 ** rng.integers(-8, 3, (150, 1)),
    "student": lambda rng: rng.standard_t(3, size=(150, 32)),
    "cauchy": lambda rng: rng.standard_cauchy((150, 32)),
    "exponential": lambda rng: rng.exponential(size=(150, 32)),
    "off centre": lambda rng: rng.standard_normal((150, 32)) + rng.standard_normal((150, 1)),
}


def encoded(blocks, slope, codec):
    recipe = coding.Recipe(codec, codec.formats[0], "stored", slope)
    laid = blocks_in(blocks, 32, "stored")
    leaf_params, _ = coding.surveyed(laid, recipe)
    (tile,) = coding.encoded(laid, recipe, leaf_params, 1.0)
    return leaf_params, tile


@functools.cache
def problem(name, octave):
    """Blocks, and the costs of all headers for them."""
    blocks = BLOCKS[name](np.random.default_rng(0)).astype(np.float32)
    leaf_params, _ = encoded(blocks, 2.0**octave, Multilevel())
    step, centre, unit = (float(leaf_params[key]) for key in ("step", "centre", "unit"))
    scaled = (blocks.astype(np.float64) - centre) / unit
    return blocks, oracle.multilevel_costs(scaled, step / unit, 0.0, 2.0**octave, 32)


def excess_cost(name, octave, codec):
    """The relative excess of the cost of all blocks over that of their best headers."""
    blocks, costs = problem(name, octave)
    _, coded = encoded(blocks, 2.0**octave, codec)
    chosen = costs[np.asarray(coded.header["header"]), np.arange(len(blocks))]
    return chosen.sum() / costs.min(0).sum() - 1


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("octave", [-12, -7, -2])
def test_the_exhaustive_encoder_finds_the_best_headers(name, octave):
    assert -1e-6 < excess_cost(name, octave, Multilevel(effort="exhaustive")) < 0.005


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("octave", [-12, -7, -2])
def test_the_fast_encoder_is_near(name, octave):
    assert -1e-6 < excess_cost(name, octave, Multilevel()) < (0.05 if name == "cauchy" else 0.03)


def test_the_fast_encoder_is_near_where_an_outlier_just_exceeds_an_escape():
    """The next escape is up to 8 times as coarse, so clipping the outlier a little is better."""
    blocks = np.random.default_rng(0).standard_normal((150, 32)).astype(np.float32)
    blocks[7, 3] = 75.7  # 2 ** 9.505 steps; escapes hold 2 ** 9.5 and 2 ** 11
    costs = []
    for codec in (Multilevel(), Multilevel(effort="exhaustive")):
        leaf_params, coded = encoded(blocks, 2.0**-10, codec)
        step, unit = float(leaf_params["step"]), float(leaf_params["unit"])
        scaled = blocks[7:8].astype(np.float64) / unit
        headers = oracle.multilevel_costs(scaled, step / unit, 0.0, 2.0**-10, 32)
        costs.append(headers[int(coded.header["header"][7]), 0])
    assert costs[0] < 1.1 * costs[1]


def test_every_width_is_used():
    """A block at twice the scale has one more bit, from none to eight."""
    block = np.random.default_rng(0).standard_normal(32)
    leaf = np.zeros(LEAF, np.float32)
    leaf.reshape(-1)[: 12 * 32] = np.outer(2.0 ** np.arange(12), block).reshape(-1)
    widths = np.asarray(packed(leaf, 2.0**-9).widths)[:12].astype(int)
    assert set(widths) == set(range(9))
    assert set(np.diff(widths)) <= {0, 1}


@FEW
@given(seed=st.integers(0, 2**32 - 1), octave=st.integers(-20, 2), exponent=st.integers(-90, 90))
def test_a_power_of_two_changes_no_bit(seed, octave, exponent):
    leaf = weights(seed)
    assert same_bytes(packed(leaf, 2.0**octave), packed(np.ldexp(leaf, exponent), 2.0**octave))


def test_the_same_twice():
    assert same_bytes(packed(weights(2)), packed(weights(2)))
