import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax.blocks import ORDERS, blocks_of, contiguous, flattened, join, spare_of, unflattened
from btc_jax.tiles import blocks_in
from tests import oracle

SHAPES = [(), (1,), (7,), (0,), (0, 4), (4, 6), (5, 3, 2), (3, 3, 4, 8), (2, 3, 3, 4, 5)]


def counting(shape):
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_major_is_the_order_of_a_pytorch_kernel(shape):
    leaf = counting(shape)
    flat = flattened(leaf, "output-major")
    assert np.array_equal(flat, oracle.output_major(leaf))
    assert np.array_equal(np.ravel(blocks_of(jnp.asarray(leaf), 4, "output-major"))[: leaf.size], flat)
    if len(shape) == 4:
        assert np.array_equal(flat, leaf.transpose(3, 2, 0, 1).ravel())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_size", [4, 32])
def test_join_undoes_blocks_of(shape, order, block_size):
    leaf = counting(shape)
    blocks = blocks_of(jnp.asarray(leaf), block_size, order)
    assert blocks.shape == (-(-leaf.size // block_size), block_size)
    np.testing.assert_allclose(join(blocks, shape, order), leaf, rtol=0, atol=1e-6 * leaf.size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_host_and_a_trace_put_weights_in_the_same_order(shape, order):
    leaf = counting(shape)
    flat = flattened(leaf, order)
    np.testing.assert_allclose(flat, oracle.flattened(leaf, order), rtol=0, atol=1e-6 * leaf.size)
    np.testing.assert_allclose(unflattened(flat, shape, order), leaf, rtol=0, atol=1e-6 * leaf.size)
    traced = np.ravel(jax.jit(blocks_of, static_argnums=(1, 2))(jnp.asarray(leaf), 32, order))[: leaf.size]
    np.testing.assert_allclose(traced, flat, rtol=0, atol=1e-6 * leaf.size)


@pytest.mark.parametrize("shape", [(100, 37), (64, 64), (1, 5), (5, 1), (0, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16])
def test_transposed_copies(shape, dtype):
    leaf = counting(shape).astype(dtype)
    copy = contiguous(leaf.T)
    assert copy.flags.c_contiguous
    assert copy.dtype == leaf.dtype
    assert np.array_equal(copy, leaf.T)


def test_a_short_block_is_filled_up_with_its_last_weight():
    blocks = np.asarray(blocks_of(jnp.arange(10.0), 4, "stored"))
    assert blocks[-1].tolist() == [8, 9, 9, 9]
    assert spare_of(10, 4).tolist() == [0, 0, 2]
    assert spare_of(8, 4).tolist() == [0, 0]
    assert spare_of(0, 4).tolist() == []


def test_some_blocks_of_a_leaf():
    blocks = blocks_in(np.arange(10.0, dtype=np.float32), 4, "stored")
    assert (blocks.count, blocks.size) == (3, 10)
    assert blocks.rows(np.array([2, 0])).tolist() == [[8, 9, 9, 9], [0, 1, 2, 3]]
