"""Programs for tiles: one for all leaves, whatever their shapes; leaves of several tiles, or of part of one."""

import contextlib
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btc_jax
from btc_jax import Multilevel, Policy, Rule, Uniform, btc_quantize
from btc_jax.backends.xla import tile_rows
from btc_jax.blocks import ORDERS, axes, put
from btc_jax.packing import quantize_leaf
from tests import oracle

PACK_ALL = Policy(min_size=0)


@contextlib.contextmanager
def compilations():
    """The events of JAX's compiler while it is open."""
    found = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def tree_of(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {str(i): {"kernel": (0.1 * rng.standard_normal(shape)).astype(np.float32)} for i, shape in enumerate(shapes)}


FEW = [(40, 48), (3, 3, 8, 16)]
MANY = [(40 + i, 64 + 3 * i) for i in range(12)] + [(3, 3, 8 + i, 16) for i in range(4)] + [(5, 7, 9), (2, 3, 3, 8, 8)]


def everything(tree, folder):
    """Every function that packs, measures or decodes, for each kind of target."""
    goals: list[Any] = [{}, {"bits": 4.5}, {"rmse": 0.01}]
    for goal in goals:
        packed = btc_quantize(tree, policy=PACK_ALL, **goal)
        btc_jax.btc_dequantize(packed)
        btc_jax.btc_metrics(tree, packed, policy=PACK_ALL)
        btc_jax.btc_plan(tree, policy=PACK_ALL, measure=True, **goal)
        btc_jax.save(folder / "m", packed)
        btc_jax.load(folder / "m", dense=True)
    btc_jax.btc_search(tree, policy=PACK_ALL, max_rmse=1.0, block_sizes=(32, 64), progress=False)


def compiled_by_each(folder):
    """How many programs are compiled by the first call, by all calls, and by the same calls for other shapes."""
    counts = []
    for work in (
        lambda: btc_quantize(tree_of(FEW), policy=PACK_ALL, bits=4.5),
        lambda: everything(tree_of(FEW), folder),
        lambda: everything(tree_of(MANY, seed=1), folder),
    ):
        with compilations() as compiled:
            work()
        counts.append(len(compiled))
    return counts


def test_no_shape_asks_for_another_program(tmp_path):
    program = f"""
import json, pathlib
from tests.test_tiles import compiled_by_each
print(json.dumps(compiled_by_each(pathlib.Path({str(tmp_path)!r}))))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, all_calls, other_shapes = json.loads(run.stdout)
    assert 0 < first <= 4
    assert all_calls <= 14
    assert other_shapes == 0


def test_numbers_of_codecs_ask_for_no_other_program():
    tree = tree_of([(64, 64)])
    for codec in (Uniform(32, threshold=0.1), Multilevel(slope=0.01)):
        btc_quantize(tree, codec)
    with compilations() as compiled:
        for codec in (Uniform(32, threshold=0.07), Uniform(32, threshold=0.2), Multilevel(slope=0.3)):
            btc_quantize(tree, codec)
    assert len(compiled) == 0


def test_how_a_leaf_was_made_is_not_in_its_structure():
    leaf = tree_of([(64, 64)])["0"]["kernel"]
    made = [
        [quantize_leaf(leaf, Uniform(32, threshold=threshold)) for threshold in (0.05, 0.099, 0.1)],
        [quantize_leaf(leaf, Uniform(32, threshold="auto"), slope=slope) for slope in (2.0**-8, 2.0**-9)],
        [quantize_leaf(leaf, Multilevel(width=4, effort=effort)) for effort in ("fast", "exhaustive")],
        [quantize_leaf(leaf, Multilevel(slope=0.01)), quantize_leaf(leaf, Multilevel(), slope=0.02)],
    ]
    for alike in made:
        assert len({one.format for one in alike}) == 1
    fixed = [jax.tree.structure(one) for one in made[2]]
    assert fixed[0] == fixed[1]
    traces = []

    @jax.jit
    def decode(leaf):
        traces.append(leaf)
        return leaf.dequantize()

    for one in made[2]:
        decode(one)
    assert len(traces) == 1


LARGE = (3, 100_003)
"""Two tiles of blocks of 32 weights and part of a third, with a short last block."""


@pytest.mark.parametrize("order", ["output-major", "stored"])
def test_a_leaf_of_several_tiles_equals_the_oracle(order):
    assert 2 * tile_rows(32) < np.prod(LARGE) / 32 < 3 * tile_rows(32)
    rng = np.random.default_rng(0)
    leaf = (rng.standard_normal(LARGE) * rng.choice([0.02, 0.2], LARGE[1])).astype(np.float32)
    tensor = quantize_leaf(leaf, Uniform(32), order)
    blocks = oracle.quantize(oracle.flattened(leaf, order).astype(np.float32), 32)
    assert np.asarray(tensor.widths).tolist() == [block[0] for block in blocks]
    assert np.array_equal(tensor.header["minimum"], [block[2] for block in blocks])
    expected = oracle.unflattened(np.concatenate([block[4] for block in blocks]), LARGE, order)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "codec", [Uniform(48), Multilevel(slope=2.0**-8), Multilevel(width=3), Multilevel(64, slope=0.1)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tiles_decode_as_a_traced_leaf(codec, dtype):
    leaf = jnp.asarray(tree_of([(700, 401)])["0"]["kernel"], dtype)
    tensor = quantize_leaf(leaf, codec)
    assert tensor.num_blocks > tile_rows(codec.block_size)
    decoded = tensor.dequantize()
    assert decoded.dtype == dtype
    assert np.array_equal(decoded, jax.jit(lambda tensor: tensor.dequantize())(tensor))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(13,), (1, 9), (9, 1), (20, 30), (3, 3, 4, 5)])
@pytest.mark.parametrize("lot", [1, 7, 64, 10**4])
def test_weights_are_put_where_they_belong(order, shape, lot):
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    run = axes(len(shape), order)
    flat, found = leaf.transpose(run).reshape(-1), np.full(shape, np.nan, np.float32)
    for start in range(0, flat.size, lot):
        put(found.transpose(run), start, flat[start : start + lot])
    assert np.array_equal(found, leaf)


def test_leaves_share_tiles_and_not_their_numbers():
    """The blocks of all leaves are measured in one matrix, with the same results as for each leaf alone."""
    tree = tree_of([(40, 48), (64, 65), (33, 7)])
    together = btc_jax.btc_allocate(tree, policy=PACK_ALL, bits=4.5)
    packed = btc_quantize(tree, policy=PACK_ALL, bits=4.5)
    for path, leaf in packed.items():
        (rule,) = (rule for rule in together.rules if rule.matches(f"{path}/kernel"))
        assert isinstance(rule.codec, Multilevel)
        assert rule.order is not None
        alone = quantize_leaf(tree[path]["kernel"], rule.codec, rule.order)
        for a, b in zip(jax.tree.leaves(leaf["kernel"]), jax.tree.leaves(alone), strict=True):
            assert np.array_equal(a, b)


def bits_of(packed):
    leaves = [leaf for leaf in jax.tree.leaves(packed, is_leaf=btc_jax.is_packed) if btc_jax.is_packed(leaf)]
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(("draw", "sqnr_db"), [("standard_normal", 20.0), ("standard_cauchy", 42.0)])
def test_a_target_is_met_where_not_all_blocks_are_looked_at(draw, sqnr_db):
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": getattr(rng, draw)((2048, 1500)).astype(np.float32)}, "b": tree_of([(640, 640)])["0"]}
    packed = btc_quantize(tree, bits=3.0)
    assert 3 * (1 - 0.006) < bits_of(packed) <= 3
    packed = btc_quantize(tree, sqnr_db=sqnr_db)
    found = btc_jax.btc_metrics(tree, packed).total.sqnr_db
    assert sqnr_db <= found < sqnr_db + 0.2


SOME = [(64, 96), (64, 96), (48, 32, 3, 3)]
"""The last one a convolution, whose taps may be transformed."""


def test_each_leaf_is_read_twice_at_most(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    from btc_jax.sources.safetensors import SafetensorsSource

    save_file({f"{i}.weight": leaf["kernel"] for i, leaf in tree_of(SOME).items()}, tmp_path / "m.safetensors")
    read, reads = SafetensorsSource.read, []
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, path, *box: (reads.append(path), read(self, path, *box))[1]
    )
    btc_jax.quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=4.5)
    assert sorted(reads) == sorted(2 * [f"{i}.weight" for i in range(3)])
    reads.clear()
    rules = (Rule("*", Multilevel(width=4)),)
    btc_jax.quantize_file(tmp_path / "m.safetensors", tmp_path / "w.safetensors", policy=Policy(rules=rules))
    assert sorted(reads) == [f"{i}.weight" for i in range(3)]
