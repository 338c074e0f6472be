import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax.blocks import join, split
from tests import oracle

SHAPES = [(), (1,), (7,), (0,), (0, 4), (4, 6), (5, 3, 2), (3, 3, 4, 8), (2, 3, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_major_is_the_order_of_a_pytorch_kernel(shape):
    leaf = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    full, tail = split(jnp.asarray(leaf), 4, "output-major")
    flat = np.concatenate([np.ravel(full), np.ravel(tail if tail is not None else [])])
    assert np.array_equal(flat, oracle.output_major(leaf))
    if len(shape) == 4:
        assert np.array_equal(flat, leaf.transpose(3, 2, 0, 1).ravel())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["output-major", "stored"])
@pytest.mark.parametrize("block_size", [4, 32])
def test_join_undoes_split(shape, order, block_size):
    leaf = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
    full, tail = split(leaf, block_size, order)
    blocks = [full]
    if tail is not None:
        assert 0 < tail.shape[1] < block_size
        blocks.append(jnp.pad(tail, ((0, 0), (0, block_size - tail.shape[1])), constant_values=-1))
    assert np.array_equal(join(jnp.concatenate(blocks), shape, order), leaf)


def test_stored_order_cuts_as_the_array_lies():
    leaf = np.arange(24, dtype=np.float32).reshape(2, 12)
    full, tail = split(jnp.asarray(leaf), 8, "stored")
    assert tail is None
    assert np.array_equal(full, leaf.reshape(3, 8))
