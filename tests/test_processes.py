"""Several processes that share a mesh: real ones, started here, with the collectives of gloo."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import btc_jax
from btc_jax.processes import is_spread, on_host, together
from tests.processes.trees import GOALS, POLICY, leaves, spread

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("BTC_JAX_KILLS", "3"))


def started(what, count, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "tests.processes.program", what, str(count)]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    quiet |= {"env": os.environ | devices}
    return [subprocess.Popen([*line, str(i), str(port), str(folder)], **quiet) for i in range(count)]


def results(what, count, folder):
    """What the processes found, which is the same in all."""
    processes = started(what, count, folder)
    for process in processes:
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out[-3000:]
    found = [json.loads((folder / f"{what}-{count}-{i}.json").read_text()) for i in range(count)]
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.fixture(scope="module")
def alone():
    """The same in one process with eight devices."""
    return {name: btc_jax.btc_quantize(spread(), policy=POLICY, **goal) for name, goal in GOALS.items()}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_pack_what_one_packs(count, alone, tmp_path):
    figures = results("pack", count, tmp_path)
    for name, expected in alone.items() if count == 2 else [("bits", alone["bits"])]:
        btc_jax.save(tmp_path / "alone.safetensors", expected)
        file = (tmp_path / f"{name}.safetensors").read_bytes()
        assert file == (tmp_path / "alone.safetensors").read_bytes(), name
        parts = btc_jax.load(tmp_path / f"{name}-parts.safetensors")
        assert btc_jax.verify(tmp_path / f"{name}-parts.safetensors").ok
        btc_jax.save(tmp_path / "parts.safetensors", parts)
        assert (tmp_path / "parts.safetensors").read_bytes() == file
        metrics = btc_jax.btc_metrics(leaves(), expected, policy=POLICY)
        assert figures[name]["bytes_after"] == metrics.bytes_after
        assert figures[name]["total"]["rmse"] == pytest.approx(metrics.total.rmse, rel=1e-6)
        assert figures[name]["total"]["effective_bits"] == metrics.total.effective_bits
    assert len(list(tmp_path.glob("bits-parts-*.safetensors"))) > count
    assert not list(tmp_path.glob(".*"))


def test_many_leaves_in_many_files(tmp_path):
    """As many as docs/format.md allows, with BTC_JAX_SLOW."""
    records, files = results("many", 2, tmp_path)
    slow = bool(os.environ.get("BTC_JAX_SLOW"))
    assert records == (100_000 if slow else 1000) + len(leaves())
    assert files > (4000 if slow else 40)


def test_what_is_wrong_in_one_process_is_an_error_in_all(tmp_path):
    nan, nan_too, like, room, folder = results("fail", 2, tmp_path)
    assert nan.startswith("up: ")
    assert "NaN" in nan
    assert nan_too.startswith("up: ")
    assert "lies in several processes" in like
    assert "lies in several processes" in room
    assert "could not be written" in folder


def test_killed_processes_leave_a_whole_checkpoint(tmp_path):
    for seed in range(KILLS):
        processes = started("save", 2, tmp_path)
        began, before = time.monotonic(), (tmp_path / "saved").exists() and (tmp_path / "saved").stat().st_mtime_ns
        while not (tmp_path / "saved").exists() or (tmp_path / "saved").stat().st_mtime_ns == before:
            assert time.monotonic() < began + 120
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        found = btc_jax.load(tmp_path / "model.safetensors")
        assert found["version"] == found["again"] >= 0
        assert btc_jax.verify(tmp_path / "model.safetensors").ok


def test_alone_everything_is_here():
    assert together(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        together(lambda: {"a": 1 // 0})
    tree = spread()
    assert not any(map(is_spread, [*tree.values(), np.ones(3), 1.0]))
    np.testing.assert_array_equal(on_host(tree["up"]), leaves()["up"])
