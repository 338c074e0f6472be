import os
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

import btc_jax
from btc_jax import Policy, Rule, Uniform, dequantize_file, plan_file, quantize_file
from btc_jax.policy import BTCPolicyError
from tests.stream_support import interrupt as interrupt
from tests.stream_support import parts as parts
from tests.stream_support import source as source
from tests.stream_support import torch_params as torch_params


def test_a_pytorch_checkpoint_as_it_is(source, tmp_path):
    done = quantize_file(source, tmp_path / "q.safetensors", Uniform(32))
    params, packed = torch_params(), btc_jax.load(tmp_path / "q.safetensors")
    assert (done.leaves, done.packed, done.resumed) == (5, 3, 0)
    assert done.bytes_before == sum(array.nbytes for array in params.values())
    assert done.bytes_after == (tmp_path / "q.safetensors").stat().st_size
    expected = btc_jax.packing.quantize_leaf(params["conv.weight"], Uniform(32), "stored")
    assert np.array_equal(packed["conv.weight"].dequantize(), expected.dequantize())
    assert packed["fc.weight"].dtype == np.float16
    assert packed["bn.num_batches_tracked"] == 7
    assert not parts(tmp_path)


def test_the_same_as_saving_the_quantized_tree(source, tmp_path):
    quantize_file(source, tmp_path / "q.safetensors")
    policy = Policy(names=("*.weight",), order="stored")
    expected = btc_jax.btc_quantize(torch_params(), policy=policy)
    with btc_jax.open_checkpoint(tmp_path / "q.safetensors") as checkpoint:
        assert checkpoint.nbytes == sum(leaf.nbytes for leaf in expected.values())
        error = checkpoint.records["conv.weight"].details["error"]
    total = btc_jax.btc_metrics(torch_params(), expected, policy=policy)
    measures = next(leaf.measures for leaf in total.leaves if leaf.path == "conv.weight")
    assert measures is not None
    assert error.keys() == {"rmse", "relative_rmse", "sqnr_db", "largest_error"}
    assert error == pytest.approx({name: getattr(measures, name) for name in error}, rel=5e-4)


def test_plan_bounds_what_is_done(source, tmp_path):
    plan = plan_file(source)
    quantize_file(source, tmp_path / "q.safetensors")
    with btc_jax.open_checkpoint(tmp_path / "q.safetensors") as checkpoint:
        assert plan.bytes_min <= checkpoint.nbytes <= plan.bytes_max
        assert {row.path for row in plan.rows} == set(checkpoint.records)


def test_restore_gives_back_names_shapes_and_dtypes(source, tmp_path):
    quantize_file(source, tmp_path / "q.safetensors")
    done = dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    restored, params = load_file(tmp_path / "dense.safetensors"), torch_params()
    assert done == btc_jax.stream.DequantizedFile(5, (tmp_path / "dense.safetensors").stat().st_size, {}, {})
    assert {k: (v.shape, v.dtype) for k, v in restored.items()} == {k: (v.shape, v.dtype) for k, v in params.items()}
    assert np.array_equal(restored["conv.bias"], params["conv.bias"])
    np.testing.assert_allclose(restored["conv.weight"], params["conv.weight"], atol=0.02)


def test_float64_is_remembered(tmp_path):
    np.savez(tmp_path / "model.npz", kernel=np.linspace(-0.1, 0.1, 4096).reshape(64, 64))
    quantize_file(tmp_path / "model.npz", tmp_path / "q.safetensors")
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    assert load_file(tmp_path / "dense.safetensors")["kernel"].dtype == np.float64


def test_a_flax_msgpack_file_becomes_nested_dicts(tmp_path):
    params = {"Dense_0": {"kernel": jnp.full((64, 64), 0.5, jnp.bfloat16), "bias": jnp.ones(64)}}
    (tmp_path / "flax.msgpack").write_bytes(serialization.to_bytes(params))
    quantize_file(tmp_path / "flax.msgpack", tmp_path / "q.safetensors")
    packed = btc_jax.load(tmp_path / "q.safetensors")
    assert packed["Dense_0"]["kernel"].order == "output-major"
    assert np.array_equal(packed["Dense_0"]["kernel"].dequantize(), np.full((64, 64), 0.5, ml_dtypes.bfloat16))


def test_an_interrupted_run_goes_on(source, tmp_path):
    whole, target, seen = tmp_path / "whole.safetensors", tmp_path / "q.safetensors", []
    quantize_file(source, whole, max_shard_bytes=None)

    def stop_at_two(path, nbytes):
        seen.append(path)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, target, on_leaf=stop_at_two)
    assert not target.exists()
    assert len(parts(tmp_path)) == 1
    assert quantize_file(source, target).resumed == 2
    assert target.read_bytes() == whole.read_bytes()
    assert not parts(tmp_path)


def test_a_killed_run_goes_on(source, tmp_path):
    target = tmp_path / "q.safetensors"
    script = """
        import os, signal, sys
        from btc_jax import quantize_file
        seen = []
        def kill(path, nbytes):
            seen.append(path)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        quantize_file(sys.argv[1], sys.argv[2], on_leaf=kill)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(target)]
    assert subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == -signal.SIGKILL
    assert not target.exists()
    assert quantize_file(source, target).resumed == 3
    assert btc_jax.verify(target).ok
    assert not parts(tmp_path)


def test_another_policy_does_not_resume(source, tmp_path):
    target = tmp_path / "q.safetensors"
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, target, on_leaf=interrupt)
    assert quantize_file(source, target, Uniform(32)).resumed == 0
    assert not parts(tmp_path)


def test_a_damaged_part_is_done_again(source, tmp_path):
    target = tmp_path / "q.safetensors"
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, target, on_leaf=interrupt)
    (folder,) = (tmp_path / name for name in parts(tmp_path))
    (folder / "0.safetensors").write_bytes(b"not a checkpoint")
    assert quantize_file(source, target).resumed == 0
    assert btc_jax.verify(target).ok


def test_shards(source, tmp_path):
    quantize_file(source, tmp_path / "q.safetensors", max_shard_bytes=5000)
    assert len(list(tmp_path.glob("q-*-of-*.safetensors"))) > 1
    assert btc_jax.verify(tmp_path / "q.safetensors").ok


def test_not_finite_weights_name_the_leaf_and_write_nothing(tmp_path):
    save_file({"a.weight": np.full((64, 64), np.nan, np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^a\.weight: 4096 of 4096 weights are NaN"):
        quantize_file(tmp_path / "bad.safetensors", tmp_path / "q.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_nothing_to_quantize(tmp_path):
    save_file({"a.weight": np.ones((3, 3), np.float32)}, tmp_path / "small.safetensors")
    with pytest.raises(BTCPolicyError, match="no leaf is packed"):
        quantize_file(tmp_path / "small.safetensors", tmp_path / "q.safetensors")


def test_rules_work_on_paths(source, tmp_path):
    policy = Policy(names=("*.weight",), rules=(Rule("emb.*", None),))
    assert quantize_file(source, tmp_path / "q.safetensors", policy=policy).packed == 2


def test_conflicting_paths(tmp_path):
    save_file({"a": np.ones((64, 64), np.float32), "a/b": np.ones(2, np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="conflicting paths"):
        plan_file(tmp_path / "odd.safetensors")
    save_file({"a": np.ones((64, 64), np.float32), "a/b/c": np.ones(2, np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="conflicting paths"):
        plan_file(tmp_path / "odd.safetensors")


def test_two_runs_to_one_target_do_not_disturb_each_other(source, tmp_path):
    def second_run(path, nbytes):
        with pytest.raises(BlockingIOError, match="another process is writing"):
            quantize_file(source, tmp_path / "q.safetensors", Uniform(32))

    quantize_file(source, tmp_path / "q.safetensors", on_leaf=second_run)
    assert btc_jax.verify(tmp_path / "q.safetensors").ok


def test_a_policy_without_order_keeps_pytorchs(source):
    plan = plan_file(source, policy=Policy(names=("*.weight",), rules=(Rule("fc.*", Uniform(32)),)))
    assert {row.order for row in plan.rows if row.codec} == {"stored"}
