import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax.planes import (
    expand,
    fitted,
    pack_planes,
    pack_rows,
    plane_specs,
    row_layout,
    trimmed,
    unpack_planes,
    unpack_rows,
)


def packed_by_hand(codes, bits):
    """One row: words in runs of J, with code `j + i * J` of a run in bits `i * bits` of its word `j`."""
    nbytes = -(-len(codes) * bits // 8)
    word = next(size for size in (4, 2, 1) if nbytes % size == 0)
    words, lanes = nbytes // word, 8 * word // bits
    run = next(j for j in (8, 4, 2, 1) if words % j == 0)
    codes = list(codes) + [0] * (words * lanes - len(codes))
    runs = [codes[i : i + run * lanes] for i in range(0, len(codes), run * lanes)]
    return [sum(int(c) << (bits * i) for i, c in enumerate(r[j::run])) for r in runs for j in range(run)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 32, 64, 100, 256])
def test_rows_are_laid_out_as_documented(bits, size):
    codes = np.random.default_rng(size).integers(0, 2**bits, (2, 5, size), dtype=np.uint8)
    for one, packed in zip(codes, pack_rows(list(jnp.asarray(codes)), bits), strict=True):
        assert packed[0].nbytes == row_layout(size, bits).nbytes == -(-size * bits // 8)
        assert np.asarray(packed).tolist() == [packed_by_hand(row, bits) for row in one]
        assert np.array_equal(np.reshape(unpack_rows(packed, bits, size), (5, -1))[:, :size], one)


@pytest.mark.parametrize(
    "widths", [(4, 8), (1,), (3,), (8,), (3, 5), (1, 8), (2, 7), tuple(range(1, 9)), tuple(range(9))]
)
def test_planes_hold_every_bit_of_every_width_once(widths):
    specs = plane_specs(widths)
    assert [spec.end for spec in specs] == np.cumsum([spec.bits for spec in specs]).tolist()
    assert all(spec.bits in (1, 2, 4, 8) for spec in specs)
    assert {0, *(spec.end for spec in specs)} >= set(widths)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    possible=st.sampled_from([(4, 8), (3, 5), tuple(range(9))]),
    block_size=st.sampled_from([7, 32]),
)
def test_every_mix_of_widths_comes_back(seed, possible, block_size):
    rng = np.random.default_rng(seed)
    chosen = rng.choice(possible, rng.integers(1, len(possible) + 1))  # some widths may be absent
    widths = rng.choice(chosen, 20).astype(np.uint8)
    codes = (rng.random((20, block_size)) * 2.0 ** widths[:, None]).astype(np.uint8)
    specs = plane_specs(possible)
    present = [widths >= spec.end for spec in specs]
    rows = pack_planes(jnp.asarray(codes), jnp.asarray(widths), specs)
    planes = [np.asarray(plane)[here] for plane, here in zip(rows, present, strict=True)]
    stored = sum(plane.nbytes for plane in planes)
    assert stored == sum(row_layout(block_size, s.bits).nbytes for s in specs for width in widths if width >= s.end)
    used = [i for i, plane in enumerate(planes) if len(plane)]
    with_room = [fitted(planes[i], present[i], int(rng.integers(present[i].sum(), 21))) for i in used]
    for stored in ([planes[i] for i in used], with_room):
        expanded = [
            expand(jnp.asarray(plane), jnp.asarray(widths), specs[i].end) for i, plane in zip(used, stored, strict=True)
        ]
        decoded = unpack_planes(expanded, [specs[i] for i in used], jnp.asarray(widths), block_size)
        assert np.array_equal(np.reshape(decoded, (20, -1))[:, :block_size], codes)
    for i, plane in zip(used, with_room, strict=True):
        assert np.array_equal(trimmed(plane, present[i]), planes[i])


def test_the_first_plane_is_a_4_bit_preview():
    codes, widths = jnp.asarray([[0x12, 0xFE], [0x3, 0x4]], jnp.uint8), jnp.asarray([8, 4], jnp.uint8)
    first, second = pack_planes(codes, widths, plane_specs((4, 8)))
    assert np.asarray(first).tolist() == [[0xF1], [0x43]]
    assert np.asarray(second)[np.asarray(widths) == 8].tolist() == [[0xE2]]
