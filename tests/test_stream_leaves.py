"""Leaves of all kinds from file to file, and sources and targets that are refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import btc_jax
from btc_jax import dequantize_file, plan_file, quantize_file
from btc_jax.compare import compare, open_any
from btc_jax.stream import compress as compress_module
from tests.stream_support import interrupt as interrupt
from tests.stream_support import parts as parts
from tests.stream_support import source as source
from tests.stream_support import torch_params as torch_params
from tests.stream_support import written as written


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
