"""The multilevel codec: it stores what its description says, and no other header would be better."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import Multilevel, btc_dequantize, btc_quantize, btc_reconstruct, coding, load, save
from btc_jax.checkpoint import BTCFormatError
from btc_jax.codecs import codec_from_json
from btc_jax.formats import MultilevelFormat
from btc_jax.packing import quantize_leaf
from btc_jax.seal import SEAL
from btc_jax.tiles import blocks_in
from tests import oracle
from tests.hostile.forge import checkpoint, manifest, packed_format
from tests.hostile.forge import packed as packed_record

FEW = settings(max_examples=15, deadline=None)
LEAF = (50, 61)
"""95 full blocks of 32 and one of 10. Compiling dominates, so most tests share this shape and layout."""
EPS = np.finfo(np.float32).eps


def weights(seed, shape=LEAF, octaves=(-8, 3)):
    """Gaussian weights, every 32 with another scale from a wide range."""
    rng, size = np.random.default_rng(seed), math.prod(shape)
    scales = np.repeat(2.0 ** rng.uniform(octaves[0], octaves[1], -(-size // 32)), 32)[:size]
    return (rng.standard_normal(size) * scales).reshape(shape).astype(np.float32)


def packed(leaf, slope=2.0**-8, **fields):
    return quantize_leaf(leaf, Multilevel(**fields), "stored", slope=slope)


def same_bytes(a, b):
    """Whether two packed leaves have the same headers and planes; not the leaf's own numbers, which are its scale."""
    planes = [[np.asarray(plane).tobytes() for plane in tensor.planes] for tensor in (a, b)]
    headers = [np.asarray(tensor.header["header"]).tobytes() for tensor in (a, b)]
    return planes[0] == planes[1] and headers[0] == headers[1]


def unchecked(function):
    """Without the test run's type checks, which would precede those of the package."""
    return getattr(function, "__wrapped__", function)


def unchecked_codec(**arguments):
    codec = object.__new__(Multilevel)
    unchecked(Multilevel.__init__)(codec, **arguments)
    return codec


# The format


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


# The encoder


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


# Leaves of all kinds


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


# In jax and in files


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
