"""Nothing in a file is trusted: each invalid file is refused by name, with little memory and time."""

import copy
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import btc_jax
from btc_jax.checkpoint import BTCFormatError
from tests.hostile import LIES
from tests.hostile.forge import checkpoint, header_of, honest, signed, text, write
from tests.hostile.indexes import index
from tests.hostile.multilevel import multilevel

SECONDS = 2.0
MEBIBYTES = 256
LARGE = {
    name
    for name in LIES
    if name.startswith(("header_of_many", "header_of_100_mb", "index_too", "tuple", "many_leaves"))
    or name.endswith(("_leaves", "_many_dicts", "_all_sizes"))
}
"""Slow under the type checker, which checks every call."""


def test_the_forge_tells_the_truth_too(tmp_path):
    tree = btc_jax.load(checkpoint(tmp_path / "m.safetensors", *honest()))
    assert tree["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tree["w"].dequantize().shape == (8,)
    (tmp_path / "several").mkdir()
    assert set(btc_jax.load(index(tmp_path / "several"))) == {"a", "b"}
    (tmp_path / "multilevel").mkdir()
    packed = btc_jax.load(multilevel(tmp_path / "multilevel"))["w"]
    assert packed.widths.tolist() == [0, 1, 2, 8]
    assert np.isfinite(packed.dequantize()).all()


@pytest.mark.parametrize("name", ["step", "centre"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, -1, -0.0, 1e-42, 3e38])
def test_a_number_that_no_encoder_writes_gives_other_weights_and_no_harm(name, number, tmp_path):
    """It cannot be distinguished from valid data with a correct checksum, so it is decoded as it is."""
    file = multilevel(tmp_path, lambda _, arrays: arrays.update({name: np.array([number], np.float32)}))
    assert btc_jax.verify(file).ok
    decoded = np.asarray(btc_jax.load(file, dense=True)["w"])
    assert (decoded.shape, decoded.dtype) == ((4, 4, 8), np.float32)
    assert np.isnan(number) <= np.isnan(decoded).any()


@pytest.mark.parametrize("name", sorted(LIES.keys() - LARGE))
def test_each_lie_is_refused(name, tmp_path):
    path = LIES[name](tmp_path)
    with pytest.raises(BTCFormatError):
        btc_jax.load(path)
    with pytest.raises(BTCFormatError):
        btc_jax.load(path, checksums=False, dense=True)
    assert refused_by_verify(path)


def test_each_lie_takes_little_memory_and_time(tmp_path):
    """Run in one process without the type checker; no invalid file may increase its memory by more."""
    paths = []
    for name, lie in LIES.items():
        (tmp_path / name).mkdir()
        paths.append(str(lie(tmp_path / name)))
    program = f"""
import resource, sys, time, btc_jax, jax.numpy as jnp
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
jnp.zeros(3).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        btc_jax.load(path)
    except btc_jax.checkpoint.BTCFormatError as error:
        assert len(str(error)) < 2000, path
    else:
        raise AssertionError(path)
    assert time.process_time() - start < {SECONDS}, (path, time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < {MEBIBYTES}, (path, grown)
"""
    run = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def refused_by_verify(path: Path) -> bool:
    try:
        return not btc_jax.verify(path).ok
    except BTCFormatError:
        return True


OTHERS = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e30, "", "a", "../x", "0", "1", "\ud800", "\0"),
    *([], {}, [[]], [None], ["a"], [1, 2, 3], {"a": 1}, [[0, 1], [2]], [0, 1, 2, 3], ["list", "", [], [0]], "x" * 300),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], other)
    return value


def refused_or_harmless(path: Path, expected: list[str]) -> bool:
    """Whether it is refused. If not, it must load, decode and verify without any other error."""
    try:
        with btc_jax.open_checkpoint(path) as opened:
            leaves = [opened.read(leaf, dense=True) for leaf in opened.records]
            opened.build(leaves)
    except BTCFormatError:
        return True
    expected.append(text(json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])))
    return False


@pytest.mark.parametrize("consistent", [False, True])
def test_any_value_of_a_manifest_by_any_other(tmp_path, consistent):
    """With valid checksums, and the original header or the one that the changed manifest implies."""
    fields, data = honest()
    header, taken, tried, payload = header_of(fields), [], 0, b""
    payload = checkpoint(tmp_path / "m.safetensors", fields, data).read_bytes()[-sum(map(len, data.values())) :]
    for path in places(fields):
        for other in OTHERS:
            changed = replaced(fields, path, other)
            try:
                asked = header_of(changed) if consistent else header | {"__metadata__": signed(changed)}
                write(tmp_path / "m.safetensors", text(asked).encode(), payload)
            except (TypeError, ValueError, KeyError, AttributeError, IndexError):
                continue  # no header exists for such a manifest
            tried += 1
            if text(changed) != text(fields) and not refused_or_harmless(tmp_path / "m.safetensors", taken):
                # What may differ without a contradiction: names, how the codec interprets the codes, and the tree.
                names = ("header_dtype", "widths", "dtype", "order", 0, 2)
                assert path[0] == "tree" or path[-1] in names, (path, other)
    assert tried > 500
    assert len(taken) < 60, len(taken)


def test_any_value_of_an_index_by_any_other(tmp_path):
    file = index(tmp_path)
    document = json.loads(file.read_text())
    fields = json.loads(document["metadata"]["btc_jax"])
    for path in places(fields):
        for other in OTHERS:
            changed = replaced(fields, path, other)
            if text(changed) == text(fields):
                continue
            file.write_text(text(document | {"metadata": {"total_size": 48} | signed(changed)}))
            try:
                btc_jax.open_checkpoint(file).close()
            except BTCFormatError:
                continue
            assert path[0] == "tree", (path, other)


def test_random_bytes(tmp_path):
    rng, file = random.Random(0), tmp_path / "m.safetensors"
    good = checkpoint(file, *honest()).read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            start = rng.randrange(len(bad))
            bad[start : start + rng.randrange(5)] = rng.randbytes(rng.randrange(6))
        if bytes(bad) == good:
            continue
        file.write_bytes(bad)
        with pytest.raises(BTCFormatError):
            btc_jax.load(file)


def test_no_file_stays_open(tmp_path):
    opened = len(os.listdir("/proc/self/fd"))
    for name in ("shard_of_another_count", "index_without_a_tree", "tree_without_a_leaf", "two_leaves_of_one_path"):
        (tmp_path / name).mkdir()
        with pytest.raises(BTCFormatError):
            btc_jax.open_checkpoint(LIES[name](tmp_path / name))
    assert len(os.listdir("/proc/self/fd")) == opened
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
