"""What the tests of the command line share."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from btc_jax_cli import commands

RNG = np.random.default_rng(0)


def btc(*args):
    """Exit code, stdout and stderr. An exception other than an exit fails the test."""
    result = CliRunner().invoke(commands.app, [str(arg) for arg in args], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def as_json(*args, code=0):
    found, out, err = btc(*args, "--json")
    assert (found, err, out.count("\n")) == (code, "", 1)
    return json.loads(out, parse_constant=pytest.fail)


def refused(*args, code=2):
    """The one line on stderr."""
    found, out, err = btc(*args)
    assert (found, out, err.count("\n")) == (code, "", 1), (found, out, err)
    assert err.startswith("btc: ")
    return err


def weights(*shape):
    return RNG.normal(0, 0.03, shape).astype(np.float32)


LEAVES = {
    "conv.weight": weights(16, 8, 3, 3),
    "conv.bias": weights(16),
    "head.weight": weights(64, 64).astype(ml_dtypes.bfloat16),
    "steps": np.arange(3, dtype=np.int64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_file(LEAVES, folder / "model.safetensors")
    assert btc("quantize", folder / "model.safetensors", folder / "small.btc", "--min-size", 1000)[0] == 0
    return folder


@pytest.fixture
def source(folder):
    return folder / "model.safetensors"


@pytest.fixture
def small(folder):
    return folder / "small.btc"


def damaged(file, target):
    """A copy with one bit of its last byte flipped, in the payload."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    return target
