import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import Policy, Rule, btc_quantize
from btc_jax.baselines import Baseline, absmax4, apply_baseline, percentile8, uniform8
from tests import oracle

ANY = Policy(names=("*",), min_size=0)
STORED = Policy(names=("*",), min_size=0, order="stored")
BASELINES = [uniform8(), percentile8(), percentile8(95), absmax4(32)]


def weights(shape, seed=0, scale=0.1):
    """Weights whose channels have different spreads, with a few outliers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, shape) * rng.uniform(0.1, 1, shape[-1])
    return (scale * w).astype(np.float32)


def on_grid(w, low, high):
    """Round float64 weights to 256 levels from low to high, clipping the rest."""
    if high == low:
        return np.full_like(w, low)
    position = (w - low) / (high - low) * 255
    return low + np.minimum(np.maximum(np.rint(position), 0), 255) / 255 * (high - low)


def uniform_reference(groups):
    return [on_grid(g, g.min(), g.max()) for g in groups]


def percentile_reference(percentile):
    return lambda groups: [on_grid(g, *np.percentile(g, [100 - percentile, percentile])) for g in groups]


def absmax_reference(groups):
    scales = [np.float64(np.float16(np.abs(g).max() / 7)) for g in groups]
    return [s * np.clip(np.rint(g / s), -7, 7) if s else 0 * g for g, s in zip(groups, scales, strict=True)]


def reference(reconstruct, leaf, group):
    """The leaf that a baseline returns, flat in output-major order, in float64."""
    flat = oracle.output_major(leaf).astype(np.float64)
    starts = range(0, flat.size, group)
    return np.concatenate(reconstruct([flat[i : i + group] for i in starts]))


def apply(leaf, baseline, policy=ANY):
    tree, metrics = apply_baseline({"w": leaf}, baseline, policy=policy)
    return tree["w"], metrics


def assert_same(ours, expected):
    """Equal up to float32 rounding, which is far below a step."""
    np.testing.assert_allclose(oracle.output_major(ours), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(24, 20), (3, 3, 7, 11)])
def test_uniform8_runs_between_the_extremes_of_the_whole_tensor(shape):
    leaf = weights(shape)
    decoded, metrics = apply(leaf, uniform8())
    assert_same(decoded, reference(uniform_reference, leaf, leaf.size))
    assert len(np.unique(decoded)) <= 256
    assert metrics.total.payload_bits == 8
    assert metrics.total.header_bits == 64 / leaf.size
    assert metrics.total.effective_bits == 8 + 64 / leaf.size


@pytest.mark.parametrize("percentile", [99.9, 95.0, 100.0, 75])
@pytest.mark.parametrize("shape", [(24, 20), (3, 3, 7, 11)])
def test_percentile8_clips_each_output_channel(shape, percentile):
    leaf = weights(shape)
    decoded, metrics = apply(leaf, percentile8(percentile))
    assert_same(decoded, reference(percentile_reference(percentile), leaf, leaf.size // shape[-1]))
    low, high = np.percentile(leaf.astype(np.float64), [100 - percentile, percentile], axis=range(leaf.ndim - 1))
    slack = 1e-6 * np.abs(leaf).max()
    assert np.all((np.asarray(decoded) >= low - slack) & (np.asarray(decoded) <= high + slack))
    assert metrics.total.payload_bits == 8
    assert metrics.total.effective_bits == 8 + 64 * shape[-1] / leaf.size


@pytest.mark.parametrize(("shape", "group"), [((24, 20), 32), ((3, 3, 7, 11), 32), ((7, 11), 100), ((8, 8), 1)])
def test_absmax4_scales_each_group_and_a_short_last_one(shape, group):
    leaf = weights(shape)
    decoded, metrics = apply(leaf, absmax4(group))
    assert_same(decoded, reference(absmax_reference, leaf, group))
    bits = 4 * leaf.size + 16 * math.ceil(leaf.size / group)
    assert metrics.total.payload_bits == 4
    assert metrics.total.header_bits == (bits - 4 * leaf.size) / leaf.size
    assert metrics.bytes_after == math.ceil(bits / 8)


def test_absmax4_clips_where_its_scale_was_rounded_down():
    # The scale is 1.4 times the least float16, which is stored as 1.
    least = 2.0**-24
    leaf = (np.linspace(-1, 1, 32) * 7 * 1.4 * least).astype(np.float32).reshape(32, 1)
    decoded, _ = apply(leaf, absmax4(32))
    np.testing.assert_array_equal(decoded, least * np.clip(np.rint(leaf / least), -7, 7))


def test_bits_are_rounded_up_to_bytes_for_each_leaf():
    tree = {"a": weights((3, 1)), "b": weights((5, 1)), "bias": np.zeros(3, np.float32)}
    _, metrics = apply_baseline(tree, absmax4(4), policy=ANY)
    assert [leaf.bytes_after for leaf in metrics.leaves] == [4, 7, 12]
    assert metrics.bytes_after == 23
    assert metrics.total.effective_bits == 8 * 11 / 8
    assert metrics.total.wide_share == 0


def test_channels_are_the_first_axis_in_stored_order():
    leaf = weights((4, 3, 3, 5))
    channels = np.moveaxis(leaf, 0, -1)
    decoded, metrics = apply(leaf, percentile8(95), STORED)
    expected = reference(percentile_reference(95), channels.reshape(-1, 4), 45)
    np.testing.assert_allclose(np.asarray(decoded).reshape(-1), expected, atol=1e-6)
    assert metrics.total.header_bits == 64 * 4 / leaf.size


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_layouts_of_torch_and_flax_give_the_same_weights(baseline):
    torch = weights((8, 6, 3, 3))
    stored, a = apply(torch, baseline, STORED)
    flax, b = apply(torch.transpose(2, 3, 1, 0), baseline)
    np.testing.assert_array_equal(stored, np.asarray(flax).transpose(3, 2, 0, 1))
    assert a.total.effective_bits == b.total.effective_bits


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_constants_come_back(baseline, value):
    decoded, metrics = apply(np.full((24, 20), value, np.float32), baseline)
    np.testing.assert_allclose(decoded, value, rtol=1e-3)
    if value == 0 or baseline.bits == 8:
        assert metrics.total.rmse == 0
        assert metrics.total.sqnr_db == math.inf


def test_figures_are_those_of_numpy_over_all_leaves():
    tree = {"a": weights((24, 20), 1), "b": {"w": weights((3, 3, 7, 11), 2)}}
    decoded, metrics = apply_baseline(tree, absmax4(32), policy=ANY)
    w = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)]).astype(np.float64)
    e = w - np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(decoded)])
    assert metrics.total.rmse == pytest.approx(np.sqrt(np.mean(e**2)), rel=1e-6)
    assert metrics.total.sqnr_db == pytest.approx(10 * np.log10(np.sum(w**2) / np.sum(e**2)), rel=1e-6)
    assert metrics.total.largest_error == pytest.approx(np.abs(e).max(), rel=1e-6)
    assert [leaf.path for leaf in metrics.leaves] == ["a", "b/w"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_dtype_of_the_leaf_is_kept_and_its_error_counted(baseline, dtype):
    leaf = weights((24, 20)).astype(dtype)
    decoded, metrics = apply(leaf, baseline)
    assert decoded.dtype == leaf.dtype
    error = np.asarray(leaf, np.float64) - np.asarray(decoded, np.float64)
    assert metrics.total.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
    assert metrics.bytes_before == 2 * leaf.size


def test_only_leaves_that_the_policy_takes_are_changed():
    packed = btc_quantize({"w": weights((24, 20))}, policy=ANY)["w"]
    head, bias = weights((64, 64)), np.ones(5, np.float32)
    tree = {"body": {"kernel": weights((64, 64))}, "head": {"kernel": head}, "bias": bias, "packed": packed}
    decoded, metrics = apply_baseline(tree, absmax4(), policy=Policy(rules=(Rule("head/*", None),)))
    assert decoded["head"]["kernel"] is head
    assert decoded["bias"] is bias
    assert decoded["packed"] is packed
    assert not np.array_equal(decoded["body"]["kernel"], tree["body"]["kernel"])
    assert [leaf.reason for leaf in metrics.leaves] == ["bias", "default", "rule 1", "already quantized"]
    assert metrics.bytes_after == 20 + 2304 + 16384 + packed.nbytes


def test_without_a_policy_the_default_decides():
    tree = {"kernel": weights((64, 64)), "small": {"kernel": weights((4, 4))}}
    _, metrics = apply_baseline(tree, uniform8())
    assert [leaf.reason for leaf in metrics.leaves] == ["default", "would not become smaller"]
    assert metrics.total.weights == 4096


def test_leaf_without_weights():
    tree = {"empty": np.zeros((0, 4), np.float32), "kernel": np.zeros((64, 64), np.float32)}
    decoded, metrics = apply_baseline(tree, uniform8())
    assert decoded["empty"].shape == (0, 4)
    assert [(leaf.reason, leaf.bytes_after) for leaf in metrics.leaves] == [("empty", 0), ("default", 4104)]


def test_a_baseline_of_ones_own():
    halves = Baseline("halves", 2, 0, 0, lambda groups: jnp.round(2 * groups) / 2)
    leaf = weights((24, 20), scale=1)
    decoded, metrics = apply(leaf, halves)
    np.testing.assert_array_equal(decoded, np.rint(2 * leaf) / 2)
    assert metrics.total.effective_bits == 2


@pytest.mark.parametrize("percentile", [50.0, 0.0, -1.0, 100.1, math.nan])
def test_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match=r"percentile is .*above 50 and at most 100"):
        percentile8(percentile)


@pytest.mark.parametrize("size", [0, -1])
def test_group_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"group_size is {size}; it must be 1 or more"):
        absmax4(size)


@pytest.mark.parametrize(
    ("baseline", "bad"), [(uniform8(), math.nan), (percentile8(), math.inf), (absmax4(), math.nan)]
)
def test_weights_that_are_not_finite_are_refused_by_path(baseline, bad):
    leaf = weights((24, 20))
    leaf[3, 4] = bad
    with pytest.raises(ValueError, match="w: 1 of 480 weights"):
        apply(leaf, baseline)


def test_weights_too_large_for_the_header_of_absmax4_are_refused_by_path():
    with pytest.raises(ValueError, match=r"w: weights as large as .* do not fit"):
        apply(weights((24, 20)) * np.float32(1e8), absmax4())


def test_leaf_without_values_is_refused_by_path():
    tree = {"layer": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}}
    with pytest.raises(TypeError, match="layer/kernel"):
        apply_baseline(tree, uniform8())


def test_a_policy_that_takes_nothing_is_refused_as_by_btc_quantize():
    with pytest.raises(ValueError, match="no leaf is packed"):
        apply_baseline({"bias": np.zeros(5, np.float32)}, uniform8())
