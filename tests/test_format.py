"""Files follow docs/format.md: a reader written from it alone decodes them."""

import numpy as np
import pytest

import btc_jax
from btc_jax import is_packed
from tests.golden import make
from tests.golden.reader import read_packed


@pytest.mark.parametrize("name", ["codecs", "multilevel"])
def test_a_reader_of_the_specification_decodes_the_golden_files(name):
    path = make.FOLDER / name / f"{name}.safetensors"
    ours = {leaf: tensor for leaf, tensor in btc_jax.load(path).items() if is_packed(tensor)}
    theirs = read_packed(path)
    assert ours.keys() == theirs.keys()
    for leaf, packed in ours.items():
        found, expected = theirs[leaf], np.asarray(packed.dequantize())
        assert (found.shape, found.dtype) == (packed.shape, packed.dtype), leaf
        rounding = 4 * 2.0**-24 if found.dtype == np.float32 else 2.0**-8
        apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        assert (apart <= rounding * magnitude(packed, expected)).all(), (leaf, apart.max())


def magnitude(packed, decoded):
    """The largest weight of each block, or of the leaf where blocks are mixed: the magnitude of the float32 terms."""
    largest = np.abs(decoded.astype(np.float64)).reshape(-1)
    if packed.order == "stored":
        filled = np.pad(largest, (0, packed.num_blocks * packed.format.block_size - largest.size))
        blocks = filled.reshape(packed.num_blocks, packed.format.block_size).max(1)
        return blocks.repeat(packed.format.block_size)[: largest.size].reshape(packed.shape)
    return largest.max(initial=0)


def test_a_reader_of_the_specification_decodes_what_is_encoded(tmp_path):
    rng = np.random.default_rng(0)
    params = {"conv": rng.standard_normal((3, 3, 12, 8)), "dense": rng.standard_normal((40, 31))}
    params = {path: array.astype(np.float32) for path, array in params.items()}
    for codec in (btc_jax.Multilevel(), btc_jax.Multilevel(64, width=5)):
        policy = btc_jax.Policy(codec, names=("*",), min_size=0)
        btc_jax.save(tmp_path / "m.safetensors", btc_jax.btc_quantize(params, policy=policy))
        for path, found in read_packed(tmp_path / "m.safetensors").items():
            error = np.sqrt(np.mean((found - params[path]) ** 2) / np.mean(params[path] ** 2))
            assert error < 0.1, (codec, path)
