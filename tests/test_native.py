"""The native kernels: bit-identical to the reference on every instruction set; and running without a compiler."""

import os
import shutil
import subprocess
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import Multilevel, Uniform, backend
from btc_jax.backends import native
from btc_jax.native import build, library, why_not
from btc_jax.native.build import BuildError
from btc_jax.native.loading import cache_folder, load
from btc_jax.packing import quantize_leaf
from btc_jax.primitives import decode_p, multiply, rows
from btc_jax.primitives.lookup import reference as looked_up_by_xla
from btc_jax.primitives.product import reference as multiplied_by_xla
from btc_jax.primitives.whole import reference as decoded_by_xla

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels here: {why_not()}")

HEADERS: list[tuple[float, Literal["float16", "float32"]]] = [
    (0.0, "float16"),
    (0.05, "float16"),
    (0.05, "float32"),
    (float("inf"), "float16"),
]
CODECS = [
    *(Multilevel(block_size=size, slope=slope) for size in (32, 64, 96) for slope in (1e-4, 0.3)),
    *(Multilevel(block_size=size, width=width) for size in (32, 128) for width in range(9)),
    *(
        Uniform(size, low, high, threshold, dtype)
        for size in (64, 96, 256)
        for low, high in ((4, 8), (3, 5))
        for threshold, dtype in HEADERS
    ),
]


def weights(seed=0, shape=(96, 203), dtype="float32"):
    """Rows of many scales, an outlier, zeros, and equal weights."""
    rng = np.random.default_rng(seed)
    leaf = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    leaf[0, 0], leaf[shape[0] // 2], leaf[-1] = 80, 0, 0.125
    return jnp.asarray(leaf.astype(np.float32), dtype)


def by_xla(q):
    what: Any = parameters(q)
    return jax.jit(lambda *arrays: decoded_by_xla(*arrays, **what))(*operands(q))


def operands(q):
    return (*q.planes, *(q.header[name] for name in sorted(q.header)), q.seal)


def parameters(q, **others):
    names = tuple(sorted(q.header))
    what = {"form": q.format, "shape": q.shape, "dtype": jnp.dtype(q.dtype), "order": q.order, "names": names}
    return what | {"waits": False} | others


def same_bits(a, b):
    return np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_decodes_as_the_reference_to_the_last_bit(codec):
    for dtype in ("float32", "bfloat16"):
        q = quantize_leaf(weights(dtype=dtype), codec)
        assert native.takes(q.format, q.size, q.dtype)
        assert same_bits(q.dequantize(), by_xla(q))
        assert same_bits(jax.jit(lambda q: q.dequantize())(q), by_xla(q))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(CODECS))
def test_leaves_of_all_shapes(first, second, seed, codec):
    leaf = np.random.default_rng(seed).normal(size=(first, second)).astype(np.float32)
    for order in ("output-major", "stored"):
        q = quantize_leaf(leaf, codec, order)
        assert same_bits(q.dequantize(), by_xla(q))


@pytest.mark.parametrize("order", ["output-major", "stored", "output-major-taps", "stored-taps"])
@pytest.mark.parametrize("shape", [(5,), (33, 40), (24, 4, 16), (3, 3, 8, 24)], ids=str)
def test_orders_and_axes(order, shape):
    q = quantize_leaf(weights(shape=(*shape, 1)).reshape(shape), Multilevel(slope=0.01), order)
    tolerance = 1e-5 * float(jnp.abs(by_xla(q)).max()) if order.endswith("taps") else 0
    for found in (q.dequantize(), jax.jit(lambda q: q.dequantize())(q)):
        np.testing.assert_allclose(found, by_xla(q), rtol=0, atol=tolerance)


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_instruction_sets_agree(instructions):
    used = library()
    assert used is not None
    try:
        loaded = load(used.path, instructions)
        if loaded.instructions != instructions:
            pytest.skip(f"this processor has no {instructions}")
        for codec in CODECS[:: 1 if instructions != "portable" else 3]:
            q = quantize_leaf(weights(), codec)
            # Without a fused multiply-add, a multiply-add is rounded twice.
            unit = 0 if instructions != "portable" else 2.0**-23 * np.abs(by_xla(q)).max()
            np.testing.assert_allclose(q.dequantize(), by_xla(q), rtol=0, atol=2 * unit)
    finally:
        load(used.path, used.instructions)


def test_what_kernels_do_not_take():
    assert not native.takes(Multilevel(block_size=48, width=4).formats[0], 100, "float32")
    assert not native.takes(Uniform(block_size=512, threshold=0).formats[0], 100, "float32")
    assert not native.takes(Multilevel(width=4).formats[0], 100, "float16")
    assert not native.takes(Multilevel(width=4).formats[0], 0, "float32")
    for codec, dtype in ((Multilevel(block_size=48, width=4), "float32"), (Multilevel(slope=0.01), "float16")):
        q = quantize_leaf(weights(dtype=dtype), codec)
        np.testing.assert_array_equal(q.dequantize(), by_xla(q))


def test_forged_leaves_stay_in_their_arrays():
    q = quantize_leaf(weights(), Multilevel(slope=0.001))
    wider = jnp.full_like(q.header["header"], 255)  # more rows than exist
    found = jax.jit(lambda *arrays: decode_p.bind(*arrays, **parameters(q)))(
        *q.planes[:5], q.header["centre"], wider, q.header["step"], q.seal
    )
    assert found.shape == q.shape
    broken = jax.jit(lambda *arrays: decode_p.bind(*arrays, **parameters(q)))(*operands(q)[:-1], q.seal + 1)
    assert np.isnan(broken).all()


@pytest.mark.parametrize("codec", CODECS[::5], ids=repr)
@pytest.mark.parametrize("count", [1, 3, 16, 17])
def test_products(codec, count):
    q = quantize_leaf(weights(shape=(120, 70)), codec)
    x = jax.random.normal(jax.random.key(0), (count, 120))
    for dtype in (jnp.float32, jnp.bfloat16):
        params = parameters(q, dtype=jnp.dtype(dtype))
        found = jax.jit(lambda x, *arrays, params=params: multiply(x, arrays, jnp.float32, **params))(x, *operands(q))
        expected = multiplied_by_xla(x, *operands(q), out=jnp.dtype(jnp.float32), precision="highest", **params)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("codec", CODECS[::5], ids=repr)
@pytest.mark.parametrize("columns", [7, 64, 96])
def test_rows(codec, columns):
    q = quantize_leaf(weights(shape=(300, columns)), codec, "stored")
    index = jnp.array([299, 0, 17, 17, 150], jnp.int32)
    params = parameters(q)
    found = jax.jit(lambda index, *arrays: rows(index, arrays, columns, **params))(index, *operands(q))
    by_xla = jax.jit(lambda index, *arrays: looked_up_by_xla(index, *arrays, columns=columns, **params))
    unit = 2.0**-23 * float(jnp.abs(found).max())  # XLA fuses other steps of the arithmetic there
    np.testing.assert_allclose(by_xla(index, *operands(q)), found, rtol=0, atol=unit)
    assert same_bits(found, q.dequantize()[index])


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BTC_JAX_NATIVE", "CC"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, timeout=300
    )


QUANTIZE = """
import numpy as np, btc_jax
q = btc_jax.packing.quantize_leaf(np.linspace(-1, 1, 4096, dtype="f4").reshape(64, 64), btc_jax.Multilevel(width=4))
assert abs(np.asarray(q.dequantize()) - np.linspace(-1, 1, 4096).reshape(64, 64)).max() < 0.1
print(btc_jax.backend())
"""


def test_it_is_whole_without_a_compiler(tmp_path):
    done = run(QUANTIZE, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1
    assert "no C compiler" in lines[0]
    assert "XLA" in done.stdout
    assert not list(tmp_path.glob("**/*.so"))


def test_it_is_left_out_on_request(tmp_path):
    done = run(QUANTIZE, BTC_JAX_NATIVE="0", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "XLA" in done.stdout
    done = run(QUANTIZE, BTC_JAX_NATIVE="fast")
    assert "BTC_JAX_NATIVE is 'fast'" in done.stderr


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'fatal error: no such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run(QUANTIZE, CC=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert f"{broken} failed: fatal error: no such file" in done.stderr
    assert not list(tmp_path.glob("**/*.so"))


def test_it_is_built_once(tmp_path, monkeypatch):
    target = build.build(tmp_path)
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail("built again"))
    assert build.build(tmp_path) == target
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.undo()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build.build(tmp_path / "other")


def test_the_backend_names_itself(monkeypatch, tmp_path):
    used = library()
    assert used is not None
    assert used.instructions in str(backend())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "btc_jax"


SANITIZED = """
import sys, ctypes, pathlib
import numpy as np, jax, jax.numpy as jnp
from btc_jax import Multilevel, Uniform
from btc_jax.packing import quantize_leaf
from btc_jax.native import loading
sanitized = loading.load(pathlib.Path(sys.argv[1]))
loading._loaded = lambda: sanitized
rng = np.random.default_rng(0)
codecs = Multilevel(slope=1e-3), Multilevel(width=3), Multilevel(block_size=96, slope=1e-2), Uniform(threshold=0.5)
for codec in codecs:
    for shape in ((1, 1), (33, 70), (64, 300), (7, 3, 40)):
        for dtype in ("float32", "bfloat16"):
            leaf = jnp.asarray(rng.normal(size=shape).astype("f4"), dtype)
            for order in ("output-major", "stored"):
                q = quantize_leaf(leaf, codec, order)
                np.testing.assert_array_equal(q.dequantize(), jax.jit(lambda q: q.dequantize())(q))
print("clean")
"""


def file_of_gcc(name):
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="its sanitizers are those of gcc")
def test_sanitizers_find_nothing(tmp_path):
    target = build.build(tmp_path, ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"))
    libraries = [file_of_gcc(name) for name in ("libasan.so", "libstdc++.so.6")]
    script = tmp_path / "sanitized.py"
    script.write_text(SANITIZED)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }
    command = [sys.executable, str(script), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip() == "clean", done.stderr[-2000:]
