"""The example of a sharded model at a small size, in a separate process because of its devices."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_packs_saves_and_restores_in_shards():
    command = [sys.executable, "-m", "examples.large", "--width", "512", "--layers", "2"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    numbers = [
        [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", line)[1:]] for line in output.splitlines()
    ]
    (_, devices, before), (bits, after), (places, same, kl), (size, fewer, restored), (same_there, kl_there) = numbers
    assert (devices, places, fewer) == (8, 256, 4)
    assert bits <= 4.5
    assert after <= 0.16 * before
    assert restored < 2.1 * after
    assert size < 8.1 * after
    assert same > 50
    assert same_there == same
    assert 0 < kl < 0.1
    assert abs(kl_there - kl) < 1e-3
