import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx, serialization
from safetensors.numpy import load_file, save_file

import btc_jax
from btc_jax import Multilevel, Policy, Rule, Uniform, dequantize_file, plan_file, quantize_file
from btc_jax.compare import compare, open_any
from btc_jax.policy import BTCPolicyError
from btc_jax.sources import SafetensorsSource
from btc_jax.stream import compress as compress_module
from btc_jax.stream import plan as plan_module

TORCH = {
    "conv.weight": (8, 8, 9, 9),
    "fc.weight": (70, 100),
    "emb.weight": (100, 60),
    "conv.bias": (8,),
    "bn.num_batches_tracked": (),
}


def torch_params():
    rng = np.random.default_rng(0)
    params = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in TORCH.items()}
    params["fc.weight"] = params["fc.weight"].astype(np.float16)
    params["bn.num_batches_tracked"] = np.array(7, np.int64)
    return params


@pytest.fixture
def source(tmp_path):
    save_file(torch_params(), tmp_path / "torch.safetensors")
    return tmp_path / "torch.safetensors"


def parts(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith((".parts", ".tmp"))]


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


def interrupt(path, nbytes):
    raise KeyboardInterrupt


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


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.dropout = nnx.Linear(64, 64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)


def test_prng_keys_do_not_keep_an_nnx_state_from_being_restored(tmp_path):
    model = Model(nnx.Rngs(3))
    state, key = nnx.state(model), model.dropout.rngs.key[...]  # pyright: ignore
    btc_jax.save(tmp_path / "q.safetensors", btc_jax.btc_quantize(state))
    done = dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    restored = load_file(tmp_path / "dense.safetensors")
    assert restored.keys() == {"linear/kernel", "linear/bias", "dropout/rngs/key", "dropout/rngs/count"}
    assert done.changed == {"dropout/rngs/key": "key<fry> as uint32[2]"}
    assert done.left_out == {}
    np.testing.assert_array_equal(restored["dropout/rngs/key"], jax.random.key_data(key))


def test_what_is_not_an_array_is_restored_as_one_or_left_out(tmp_path):
    numbers = {"int": -(2**63), "float": 0.1, "bool": True}
    others = {"huge": 2**63, "text": "net", "complex": np.array([1 + 2j]), "int4": jnp.arange(3, dtype=jnp.int4)}
    keys = jax.random.split(jax.random.key(0), (2, 3))
    btc_jax.save(tmp_path / "q.safetensors", numbers | others | {"keys": keys, "w": jnp.ones(2)})
    done = dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    restored = load_file(tmp_path / "dense.safetensors")
    assert {name: restored[name].item() for name in numbers} == numbers
    assert done.left_out == {"huge": "Python int", "text": "Python str"}
    assert done.changed == {
        **{"int": "Python int as int64[]", "float": "Python float as float64[]", "bool": "Python bool as bool[]"},
        **{"keys": "key<fry> as uint32[2, 3, 2]", "complex": "complex128 as uint8[1, 16]"},
        "int4": "int4 as uint8[3, 1]",
    }
    assert done.leaves == len(restored) == 7
    np.testing.assert_array_equal(restored["keys"], jax.random.key_data(keys))
    assert restored["complex"].view(complex).item() == 1 + 2j
    assert restored["int4"].ravel().tolist() == [0, 1, 2]


BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}


def plain_file(path, tensors):
    """Write a safetensors file of raw tensors: code, shape and bytes by name."""
    header, data = {}, b""
    for name, (code, shape, values) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def plain_tensors(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    for name, entry in tensors.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], data[start + begin : start + end])
    return tensors


@pytest.mark.parametrize("target", [{}, {"size": "80KB"}], ids=str)
def test_leaves_of_other_dtypes_come_back_bit_for_bit(tmp_path, target):
    rng = np.random.default_rng(0)
    odd = {f"{code}.weight": (code, [64, 64], rng.bytes(64 * 64 * bits // 8)) for code, bits in BITS.items()}
    kernel = (0.1 * rng.standard_normal((64, 64))).astype(np.float32)
    plain_file(tmp_path / "m.safetensors", odd | {"w.weight": ("F32", [64, 64], kernel.tobytes())})
    reasons = {row.path: row.reason for row in plan_file(tmp_path / "m.safetensors").rows}
    assert reasons == {
        "F4.weight": "F4",
        "F6_E2M3.weight": "F6_E2M3",
        "F6_E3M2.weight": "F6_E3M2",
        "F8_E8M0.weight": "float8_e8m0fnu",
        "F8_E4M3FNUZ.weight": "float8_e4m3fnuz",
        "F8_E5M2FNUZ.weight": "float8_e5m2fnuz",
        "C64.weight": "complex",
        "w.weight": "default",
    }
    done = quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", **target)
    assert (done.packed, done.leaves) == (1, 8)
    assert done.bytes_after == written(tmp_path) <= 80_000
    assert btc_jax.verify(tmp_path / "q.safetensors").ok
    restored = dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    assert restored.changed == restored.left_out == {}
    found = plain_tensors(tmp_path / "dense.safetensors")
    assert {name: found[name] for name in odd} == odd
    with open_any(tmp_path / "m.safetensors") as a, open_any(tmp_path / "q.safetensors") as b:
        assert [leaf.path for leaf in compare(a, b).different] == ["w.weight"]


def test_text_and_lost_dtypes_do_not_keep_a_source_from_being_read(tmp_path):
    odd = {"text": np.array("net"), "lost": np.arange(3).astype(jnp.bfloat16)}
    np.savez(tmp_path / "m.npz", kernel=np.full((64, 64), 0.5, np.float32), **odd)
    quantize_file(tmp_path / "m.npz", tmp_path / "q.safetensors", size="20KB")
    done = dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    assert done.changed == {"text": "<U3 as uint8[12]", "lost": "V2 (dtype lost in .npz) as uint8[6]"}
    restored = load_file(tmp_path / "dense.safetensors")
    assert restored["lost"].view(jnp.bfloat16).tolist() == [0, 1, 2]
    assert restored["text"].view("<U3") == "net"


@pytest.mark.parametrize("origin", [["F4", [64]], ["F4", []], ["F6_E2M3", [8]]], ids=str)
def test_a_record_that_lies_about_its_origin_is_refused(tmp_path, monkeypatch, origin):
    plain_file(tmp_path / "m.safetensors", {"a": ("F4", [8], bytes(4)), "weight": ("F32", [64, 64], bytes(2**14))})
    monkeypatch.setattr(compress_module, "origin_json", lambda real: {"origin": origin} if real else {})
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors")
    with pytest.raises(btc_jax.checkpoint.BTCFormatError, match="'a' of 4 bytes"):
        dequantize_file(tmp_path / "q.safetensors", tmp_path / "dense.safetensors")
    assert not (tmp_path / "dense.safetensors").exists()


def test_a_compressed_checkpoint_is_not_compressed_again(source, tmp_path):
    quantize_file(source, tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match="compressed checkpoint already"):
        quantize_file(tmp_path / "q.safetensors", tmp_path / "again.safetensors")


def test_an_nnx_state_in_an_orbax_folder(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    state = nnx.state(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
    assert quantize_file(tmp_path / "orbax", tmp_path / "q.safetensors").packed == 1
    assert set(btc_jax.load(tmp_path / "q.safetensors")) == {"kernel", "bias"}


def test_a_source_that_changes_meanwhile_is_refused(source, tmp_path):
    def change(path, nbytes):
        params = torch_params() | {"conv.bias": np.ones(8, np.float32)}
        save_file(params, tmp_path / "new.safetensors")
        os.replace(tmp_path / "new.safetensors", source)

    with pytest.raises(ValueError, match="was changed while it was read"):
        quantize_file(source, tmp_path / "q.safetensors", on_leaf=change)
    assert not (tmp_path / "q.safetensors").exists()
    assert not parts(tmp_path)


def test_the_source_is_never_the_target(source, tmp_path):
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is the source"):
        quantize_file(source, source)
    assert source.read_bytes() == before
    quantize_file(source, tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match="is the source"):
        dequantize_file(tmp_path / "q.safetensors", tmp_path / "q.safetensors")


def test_a_bad_target_is_refused_before_any_work(source, tmp_path):
    def never(path, nbytes):
        raise AssertionError("work was done")

    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        quantize_file(source, tmp_path / "q.btc", max_shard_bytes=100, on_leaf=never)


def test_a_flipped_bit_in_a_part_is_done_again(source, tmp_path):
    target = tmp_path / "q.safetensors"
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, target, on_leaf=interrupt)
    (folder,) = (tmp_path / name for name in parts(tmp_path))
    data = bytearray((folder / "0.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "0.safetensors").write_bytes(data)
    assert quantize_file(source, target).resumed == 0
    assert btc_jax.verify(target).ok


def test_parts_of_another_target_are_left_alone(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, tmp_path / "q.other", on_leaf=interrupt)
    quantize_file(source, tmp_path / "q")
    assert quantize_file(source, tmp_path / "q.other").resumed == 1


def written(folder):
    """Bytes of all files of the checkpoint `q`."""
    return sum(path.stat().st_size for path in folder.glob("q*"))


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

    def watched(self, path):
        nonlocal most
        gc.collect()
        most = max(most, sum(leaf() is not None for leaf in before), large_arrays(shape))
        leaf = read(self, path)
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

    def watched(self, path):
        gc.collect()
        kept.append(sum(array.nbytes for array in jax.live_arrays()) - start)
        return read(self, path)

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
