"""Custom formats that decode whole blocks, and other implementations of the library's formats."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import Uniform
from btc_jax.backends import REFERENCE, Backend, backend_for, register_backend
from btc_jax.codecs import Codec, Coded
from btc_jax.formats import Format, MultilevelFormat, UniformFormat, format_from_json
from btc_jax.packing import quantize_leaf


@dataclasses.dataclass(frozen=True)
class SummedFormat(Format):
    """Weights are prefix sums of codes, so none can be decoded alone."""

    id: ClassVar[str] = "tests-summed"

    block_size: int = 16

    @property
    def widths(self):
        return (2,)

    def stored_header(self, blocks):
        return {"step": jax.ShapeDtypeStruct((1,), jnp.dtype(jnp.float32))}

    def pack_header(self, widths, header, leaf_params):
        return {"step": np.reshape(leaf_params["step"], 1)}

    def unpack_header(self, stored, blocks):
        return np.full(blocks, 2, np.uint8), {"step": stored["step"] * np.ones(blocks, np.float32)}

    def grid(self, widths, header):
        return header["step"]

    def decode(self, codes, grid):
        flat = codes.reshape(len(codes), -1).astype(jnp.int32) - 1
        return (jnp.cumsum(flat, 1).astype(jnp.float32) * grid[:, None]).reshape(codes.shape)


@dataclasses.dataclass(frozen=True)
class Summed(Codec):
    id: ClassVar[str] = "tests-summed"

    block_size: int = 16
    step: float = 0.25

    @property
    def formats(self):
        return (SummedFormat(self.block_size),)

    def leaf_params(self, form, leaf, blocks, leaves, slope):
        return {"step": self.step + 0 * leaf.rms}

    def encode(self, form, blocks, spare, leaf_params):
        steps = jnp.round(blocks / leaf_params["step"][:, None]).astype(jnp.int32)
        codes = jnp.diff(steps, axis=1, prepend=0) + 1
        return Coded(jnp.full(len(blocks), 2, jnp.uint8), jnp.clip(codes, 0, 2).astype(jnp.uint32), {})

    def fits(self, header):
        return True


@pytest.mark.parametrize("shape", [(16, 16), (7, 11)])
def test_a_format_that_decodes_whole_blocks(shape):
    rng = np.random.default_rng(0)
    flat = np.concatenate([np.cumsum(rng.integers(-1, 2, 16)) for _ in range(math.ceil(math.prod(shape) / 16))])
    leaf = 0.25 * flat[: math.prod(shape)].reshape(shape).astype(np.float32)
    tensor = quantize_leaf(leaf, Summed(), "stored")
    assert np.array_equal(tensor.dequantize(), leaf)
    assert np.array_equal(jax.jit(lambda tensor: tensor.dequantize())(tensor), leaf)


def test_another_implementation_of_a_format(monkeypatch):
    monkeypatch.setattr("btc_jax.backends._BACKENDS", {})
    calls = []

    def encode(*args: Any, **kwargs: Any):
        calls.append("encode")
        return REFERENCE.encode(*args, **kwargs)

    def decode(*args: Any, **kwargs: Any):
        calls.append("decode")
        return REFERENCE.decode(*args, **kwargs)

    leaf = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    expected = quantize_leaf(leaf, Uniform()).dequantize()
    register_backend(UniformFormat, "cpu", Backend(encode, decode))
    assert backend_for(UniformFormat(), "cpu").encode is encode
    assert backend_for(UniformFormat(), "gpu") == backend_for(MultilevelFormat(), "cpu") == REFERENCE
    assert np.array_equal(quantize_leaf(leaf, Uniform()).dequantize(), expected)
    assert calls == ["encode", "decode"]


@pytest.mark.parametrize(
    "form", [UniformFormat(), UniformFormat(7, (3,), "float32"), MultilevelFormat(), MultilevelFormat(64, 0)]
)
def test_formats_come_back_from_json(form):
    assert format_from_json(form.to_json()) == form
    assert eval(repr(form)) == form


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 1}, "at least 2 weights"),
        ({"widths": (8, 4)}, "ascending"),
        ({"widths": (4, 9)}, "1 to 8"),
        ({"widths": ()}, "one or two"),
        ({"header_dtype": "bfloat16"}, "'float16' or 'float32'"),
    ],
)
def test_bad_uniform_formats(fields, message):
    with pytest.raises(ValueError, match=message):
        UniformFormat(**fields)


@pytest.mark.parametrize(("fields", "message"), [({"block_size": 8}, "16 to 256"), ({"width": 9}, "0 to 8 bits")])
def test_bad_multilevel_formats(fields, message):
    with pytest.raises(ValueError, match=message):
        MultilevelFormat(**fields)
