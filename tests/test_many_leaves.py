"""How many leaves a checkpoint holds, and what each costs: the limits stated in docs/format.md."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import btc_jax
from btc_jax import Uniform, load, open_checkpoint, quantize_file, save
from btc_jax.checkpoint import handles
from btc_jax.packing import quantize_leaf

LEAVES, SHARDS = 100_000, 4096
NAMES = [
    f"model.layers.{i}.mlp.experts.{j}.{name}.weight"
    for i in range(27)
    for j in range(64)
    for name in ("gate_proj", "up_proj", "down_proj")
]
"""A mixture of experts, with names as on the Hugging Face hub."""

PROGRAM = """
import os, resource, sys, time, warnings
import numpy as np, jax, jax.numpy as jnp, btc_jax

warnings.simplefilter("error")
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
file, leaves, shards = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
one = btc_jax.packing.quantize_leaf(jnp.linspace(-1, 1, 16), btc_jax.Uniform(8, threshold=float("inf")))
names = [f"model.layers.{i // 768}.mlp.experts.{i // 3 % 256}.gate_proj{i % 3}.weight" for i in range(leaves)]
copies = [jax.tree.map(lambda array: np.array(array), one) for _ in names]
for i, copy in enumerate(copies):
    copy.planes[0][0] = i
tree = dict(zip(names, copies, strict=True))
btc_jax.save(file, tree, max_shard_bytes=shards and -(-leaves // shards) * one.nbytes)

def measured(what, call):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = call()
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(what, round(seconds, 2), grown / 1024)
    return result

checkpoint = measured("open", lambda: btc_jax.open_checkpoint(file))
assert len(checkpoint.records) == leaves
assert len(checkpoint.files) == 1 + (shards or 1)
checkpoint.close()
wanted = {name: i for i, name in enumerate(names)}
loaded = measured("load", lambda: btc_jax.load(file, select="model.layers.[159].mlp.experts.1*"))
assert len(loaded) > 900
for name, leaf in loaded.items():
    assert int(leaf.planes[0][0, 0]) == wanted[name]
if os.environ.get("BTC_JAX_SLOW"):
    assert measured("verify", lambda: btc_jax.verify(file)).ok
"""


@pytest.mark.parametrize(("leaves", "shards"), [(LEAVES, None), (3 * SHARDS, SHARDS)], ids=["leaves", "files"])
def test_as_many_as_are_promised(tmp_path, leaves, shards):
    """In a process without the type checker, which checks every call, and with a low limit on open files."""
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "m.safetensors"), str(leaves), str(shards)]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    measured = {line.split()[0]: [float(n) for n in line.split()[1:]] for line in run.stdout.splitlines()}
    assert measured["open"][0] < 10, measured
    assert measured["open"][1] < 256, measured


@pytest.fixture(scope="module")
def kernel():
    return quantize_leaf(jax.random.normal(jax.random.key(0), (64, 64)), Uniform(32, threshold=0.9))


def copies(kernel, names):
    return {name: jax.tree.map(lambda array: array + jnp.zeros_like(array), kernel) for name in names}


def header_bytes(path: Path) -> int:
    with open_checkpoint(path) as checkpoint:
        return sum(file.stat().st_size for file in {*checkpoint.files}) - checkpoint.nbytes


def test_a_mixture_of_experts_in_one_file_and_in_several(tmp_path, kernel):
    tree = copies(kernel, NAMES[::9])
    for shards in (None, 40_000):
        save(tmp_path / "m.safetensors", tree, max_shard_bytes=shards)
        loaded = load(tmp_path / "m.safetensors")
        assert list(loaded) == sorted(tree)
        for leaf in loaded.values():
            assert all(jnp.array_equal(a, b) for a, b in zip(leaf.planes, kernel.planes, strict=True))
        if shards is None:
            assert header_bytes(tmp_path / "m.safetensors") < 200 * len(tree)


def test_bytes_a_leaf_with_measured_errors(tmp_path):
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in NAMES[:60]}
    save_file(weights, tmp_path / "m.safetensors")
    quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", Uniform(32))
    assert header_bytes(tmp_path / "q.safetensors") < 240 * len(weights)


def test_loading_compiles_nothing(tmp_path):
    """Leaves of many sizes, each of which would need its own program."""
    tree = {
        f"w{n}": quantize_leaf(np.linspace(-1, 1, n, dtype=np.float32), btc_jax.Multilevel(width=4)) for n in (40, 70)
    }
    sizes = jax.tree.map(np.asarray, tree)
    save(tmp_path / "m.safetensors", sizes)
    program = f"""
import jax, btc_jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **more: compiled.append(event))
btc_jax.load({str(tmp_path / "m.safetensors")!r})
assert btc_jax.verify({str(tmp_path / "m.safetensors")!r}).ok
assert not [event for event in compiled if "compile" in event], compiled
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_few_files_are_open_at_a_time(tmp_path, kernel, monkeypatch):
    monkeypatch.setattr(handles, "MAX_OPEN", 3)
    tree = copies(kernel, NAMES[:10])
    save(tmp_path / "m.safetensors", tree, max_shard_bytes=1)
    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        for path in [*tree, *reversed(tree)]:
            checkpoint.read(path)
            assert len(os.listdir("/proc/self/fd")) <= before + 3
        first = checkpoint.files[1]
        content = first.read_bytes()
        first.unlink()
        path = sorted(tree)[0]
        list(map(checkpoint.read, sorted(tree)[5:]))
        with pytest.raises(btc_jax.checkpoint.BTCFormatError, match="removed while the checkpoint was open"):
            checkpoint.read(path)
        first.write_bytes(content)
        with pytest.raises(btc_jax.checkpoint.BTCFormatError, match="replaced while the checkpoint was open"):
            checkpoint.read(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_leaves_are_refused_before_any_is_quantized(tmp_path, monkeypatch):
    save_file({f"{i}.weight": np.ones((64, 64), np.float32) for i in range(9)}, tmp_path / "m.safetensors")
    monkeypatch.setattr("btc_jax.stream.compress.packed_leaf", None)
    monkeypatch.setattr("btc_jax.checkpoint.write.MAX_SHARDS", 8)
    with pytest.raises(ValueError, match=r"9 leaves would be split into 9 files.*raise max_shard_bytes"):
        quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", max_shard_bytes=1)
    monkeypatch.setattr("btc_jax.checkpoint.header.MAX_TEXT", 1000)
    with pytest.raises(ValueError, match=r"9 leaves need a header of .*max_shard_bytes"):
        quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_experts_stacked_in_three_leaves_are_planned_saved_and_loaded(tmp_path):
    layers = 48 if os.environ.get("BTC_JAX_SLOW") else 6  # 18,432 kernels, or 2,304
    keys = dict(zip(("gate", "up", "down"), jax.random.split(jax.random.key(0), 3), strict=True))
    params = {name: jax.random.normal(key, (layers, 128, 8, 32)) for name, key in keys.items()}
    policy = btc_jax.Policy(btc_jax.Multilevel(width=4), rules=(btc_jax.Rule("*", stack=(0, 1)),))
    plan = btc_jax.btc_plan(params, policy=policy)
    packed = jax.jit(lambda tree: btc_jax.btc_quantize(tree, policy=policy))(params)
    assert sum(int(np.prod(leaf.pieces)) for leaf in packed.values()) == layers * 384
    assert plan.bytes_min == plan.bytes_max == sum(leaf.nbytes for leaf in packed.values())
    save(tmp_path / "experts.safetensors", packed)
    loaded = load(tmp_path / "experts.safetensors")
    for name, leaf in packed.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, loaded[name])
    np.testing.assert_allclose(loaded["up"][5, 3], params["up"][5, 3], atol=0.5)
