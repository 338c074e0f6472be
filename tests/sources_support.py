"""What the tests of sources share."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from btc_jax.sources import open_source

NATIVE = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


DTYPES = {str(np.dtype(kind)): np.dtype(kind) for kind in [*NATIVE, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]}


def arrays(dtypes, shapes=((3, 4), (), (0, 5))):
    values = np.random.default_rng(0).integers(0, 2, 12)
    return {
        f"{name}.{i}": values[: np.prod(shape, dtype=int)].reshape(shape).astype(dtype)
        for name, dtype in dtypes.items()
        for i, shape in enumerate(shapes)
    }


def assert_holds(source, expected):
    assert {leaf.path for leaf in source.leaves} == set(expected)
    for leaf in source.leaves:
        values, right = source.read(leaf.path), expected[leaf.path]
        assert type(values) is np.ndarray
        assert (values.shape, values.dtype) == (leaf.shape, leaf.dtype) == (right.shape, right.dtype)
        assert values.tobytes() == right.tobytes()


def raw(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


@pytest.fixture
def small():
    return {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "conv.bias": np.ones(2, np.float16)}


@pytest.fixture
def shards(tmp_path, small):
    for number, (name, values) in enumerate(small.items(), 1):
        save_file({name: values}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(small, 1)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def refused(path, *words, kind: type[Exception] = ValueError):
    with pytest.raises(kind) as caught:
        open_source(path)
    assert type(caught.value) is kind
    for word in (path.name, *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def bytes_read():
    """How many bytes this process has read from files so far, including Python's buffering."""
    if not os.path.exists("/proc/self/io"):
        pytest.skip("only Linux counts the bytes that a process reads")
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


class Unpickled:
    """An object that fails the test if it is ever unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)
