"""Targets from file to file."""

import gc
import weakref

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import btc_jax
from btc_jax import Multilevel, Policy, dequantize_file, plan_file, quantize_file
from btc_jax.sources import SafetensorsSource
from btc_jax.stream import plan as plan_module
from tests.stream_support import interrupt as interrupt
from tests.stream_support import parts as parts
from tests.stream_support import source as source
from tests.stream_support import torch_params as torch_params
from tests.stream_support import written as written


def same_leaves(packed, expected):
    assert packed.keys() == expected.keys()
    for path, leaf in expected.items():
        assert jax.tree.structure(packed[path]) == jax.tree.structure(leaf), path
        for a, b in zip(jax.tree.leaves(packed[path]), jax.tree.leaves(leaf), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("target", [{"bits": 4.5}, {"rmse": 0.004}, {"sqnr_db": 24.0}], ids=str)
def test_a_target_is_shared_out_as_in_memory(source, tmp_path, target):
    done = quantize_file(source, tmp_path / "q.safetensors", **target)
    policy = Policy(Multilevel(), names=("*.weight",), order="stored")
    expected = btc_jax.btc_quantize(torch_params(), policy=policy, **target)
    same_leaves(btc_jax.load(tmp_path / "q.safetensors"), expected)
    total = btc_jax.btc_metrics(torch_params(), expected, policy=policy).total
    assert done.effective_bits == total.effective_bits
    # The encoder sums the errors of a block in float32.
    assert [done.rmse, done.sqnr_db] == pytest.approx([total.rmse, total.sqnr_db], rel=1e-7)


def smooth_kernel():
    """A kernel with its energy in few frequencies, as in trained networks."""
    rng = np.random.default_rng(1)
    return (0.1 * rng.standard_normal((32, 32, 1, 1)) * np.ones((32, 32, 3, 3))).astype(np.float32)


def test_taps_are_transformed_where_that_pays_in_pytorchs_layout(tmp_path):
    kernels = {"smooth.weight": smooth_kernel(), "rough.weight": smooth_kernel()}
    kernels["rough.weight"] += np.random.default_rng(2).standard_normal((32, 32, 3, 3)).astype(np.float32)
    save_file(kernels, tmp_path / "m.safetensors")
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=4)
    packed = btc_jax.load(tmp_path / "q.safetensors")
    assert (packed["smooth.weight"].order, packed["rough.weight"].order) == ("stored-taps", "stored")
    plain = Policy(Multilevel(), names=("*.weight",))
    plan = plan_file(tmp_path / "m.safetensors", policy=plain, bits=4, taps=False, measure=True)
    assert {row.order for row in plan.rows} == {"stored"}


@pytest.mark.parametrize("shards", [None, 5000])
def test_size_counts_all_that_is_written(source, tmp_path, shards):
    done = quantize_file(source, tmp_path / "q.safetensors", size="15KB", max_shard_bytes=shards)
    assert done.bytes_after == written(tmp_path)
    assert (0.95 if shards is None else 0.8) * 15_000 < written(tmp_path) <= 15_000


def test_a_size_below_the_headers_says_what_can_be(source, tmp_path):
    with pytest.raises(ValueError, match=r"size of 1,000 cannot be reached: these leaves and codecs reach from \d,"):
        quantize_file(source, tmp_path / "q.safetensors", size=1000)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("target", [{"bits": 0.1}, {"bits": 9}, {"sqnr_db": 300}, {"rmse": 1e-12}], ids=str)
def test_a_target_out_of_reach_writes_nothing(source, tmp_path, target):
    with pytest.raises(ValueError, match="cannot be reached"):
        quantize_file(source, tmp_path / "q.safetensors", **target)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_wrong_targets_are_refused_before_the_source_is_opened(tmp_path):
    for target in ({"bits": 4, "size": "1MB"}, {"bits": float("nan")}, {"size": "many"}, {"rmse": -1}):
        for function in (lambda **given: quantize_file("nowhere", tmp_path / "q", **given), plan_of_nowhere):
            with pytest.raises(ValueError, match=r"one target|must be"):
                function(**target)


def plan_of_nowhere(**target):
    plan_file("nowhere", **target)


def test_a_plan_that_is_measured_is_what_is_done(source, tmp_path):
    plan, exact = plan_file(source, bits=4), plan_file(source, bits=4, measure=True)
    quantize_file(source, tmp_path / "q.safetensors", bits=4)
    with btc_jax.open_checkpoint(tmp_path / "q.safetensors") as checkpoint:
        stored = {path: (record.nbytes, record.details.get("order")) for path, record in checkpoint.records.items()}
    assert {row.path: (row.bytes_min, row.codec and row.order) for row in exact.rows} == stored
    assert plan.bytes_min < exact.bytes_min == exact.bytes_max < plan.bytes_max


def test_a_run_for_a_target_goes_on_with_the_same_choices(source, tmp_path):
    quantize_file(source, tmp_path / "whole.safetensors", bits=4)
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, tmp_path / "q.safetensors", bits=4, on_leaf=interrupt)
    assert quantize_file(source, tmp_path / "q.safetensors", bits=4).resumed == 1
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not parts(tmp_path)


@pytest.mark.parametrize("other", [{"bits": 3}, {"bits": 4, "codec": Multilevel(effort="exhaustive")}, {}], ids=str)
def test_another_target_does_not_resume(source, tmp_path, other):
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, tmp_path / "q.safetensors", bits=4, on_leaf=interrupt)
    assert quantize_file(source, tmp_path / "q.safetensors", **other).resumed == 0
    assert not parts(tmp_path)


def test_one_leaf_is_in_memory_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shape = (1024, 512)  # large enough to be sampled
    save_file({f"{i}.weight": rng.standard_normal(shape, np.float32) for i in range(5)}, tmp_path / "m.safetensors")
    read, before, most, reads = SafetensorsSource.read, [], 0, []

    def watched(self, path, *box):
        nonlocal most
        gc.collect()
        most = max(most, sum(leaf() is not None for leaf in before), large_arrays(shape))
        leaf = read(self, path, *box)
        before.append(weakref.ref(leaf))
        reads.append(path)
        return leaf

    monkeypatch.setattr(SafetensorsSource, "read", watched)
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=4.5)
    assert most <= 1, "a leaf was kept while the next was read"
    assert {reads.count(f"{i}.weight") for i in range(5)} == {2}  # for the statistics, and for the codes


def large_arrays(shape):
    """Arrays of a whole leaf, or of all its blocks, that jax holds."""
    return sum(array.size >= np.prod(shape) and array.dtype == np.float32 for array in jax.live_arrays())


def test_samples_of_leaves_are_small(tmp_path, monkeypatch):
    """What is kept of a leaf between two reads: at most half a megabyte."""
    save_file({f"{i}.weight": np.ones((600, 1000), np.float32) * i for i in range(3)}, tmp_path / "m.safetensors")
    start, kept, read = sum(array.nbytes for array in jax.live_arrays()), [], SafetensorsSource.read

    def watched(self, path, *box):
        gc.collect()
        kept.append(sum(array.nbytes for array in jax.live_arrays()) - start)
        return read(self, path, *box)

    monkeypatch.setattr(SafetensorsSource, "read", watched)
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=4.5)
    assert max(kept) <= 3 * 2**19


def test_not_finite_weights_under_a_target(tmp_path):
    save_file({"a.weight": np.full((64, 64), np.nan, np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^a\.weight: 4096 of 4096 weights are NaN"):
        quantize_file(tmp_path / "bad.safetensors", tmp_path / "q.safetensors", bits=4)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_float64_under_a_target(tmp_path):
    np.savez(tmp_path / "model.npz", kernel=np.linspace(-0.1, 0.1, 4096).reshape(64, 64))
    quantize_file(tmp_path / "model.npz", tmp_path / "q.safetensors", bits=6)
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    restored = load_file(tmp_path / "dense.safetensors")["kernel"]
    assert restored.dtype == np.float64
    np.testing.assert_allclose(restored, np.linspace(-0.1, 0.1, 4096).reshape(64, 64), atol=0.005)


def test_leaves_that_come_back_exactly(tmp_path):
    np.savez(tmp_path / "model.npz", kernel=np.zeros((64, 64), np.float32))
    done = quantize_file(tmp_path / "model.npz", tmp_path / "q.safetensors", bits=4)
    assert (done.rmse, done.sqnr_db) == (0, float("inf"))
    assert done.effective_bits < 0.3


def test_two_runs_for_a_target_do_not_disturb_each_other(source, tmp_path, monkeypatch):
    def second_run(*given, **options):
        monkeypatch.undo()
        with pytest.raises(BlockingIOError, match="another process is writing"):
            quantize_file(source, tmp_path / "q.safetensors", bits=4)
        return choose(*given, **options)

    choose = plan_module.choose
    monkeypatch.setattr(plan_module, "choose", second_run)
    quantize_file(source, tmp_path / "q.safetensors", bits=4)
    assert btc_jax.verify(tmp_path / "q.safetensors").ok
