"""Leaves of a file that are read in panels, with small panels: as if they were too large for memory."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from btc_jax import Multilevel, Policy, Rule, Uniform, large, quantize_file
from btc_jax.large import LargeLeaf, Panels
from btc_jax.sources import open_source
from btc_jax.sources.safetensors import SafetensorsSource
from btc_jax.stream import plan as stream_plan

PANEL = 9000  # bytes, so that panels end inside of blocks


class InMemory(LargeLeaf):
    def __init__(self, values: np.ndarray):
        self.values, self.shape, self.dtype, self.nbytes = values, values.shape, values.dtype, values.nbytes

    def __getitem__(self, box):
        return self.values[box]


@pytest.fixture
def small_panels(monkeypatch):
    monkeypatch.setattr(stream_plan, "LARGE", 20_000)
    monkeypatch.setattr(large, "PANEL", PANEL)


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a.kernel": (150, 130), "b.embedding": (111, 70), "c.experts.kernel": (3, 60, 70), "d.weight": (96, 80)}
    tensors = {
        name: rng.standard_normal(shape).astype(jnp.bfloat16 if name[0] in "cd" else np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


STACKED = (Rule("c.*", stack=0),)
WAYS = {
    "paper": {"policy": Policy(rules=STACKED)},
    "bits": {"policy": Policy(rules=STACKED), "bits": 4.5},
    "one width": {"policy": Policy(Multilevel(width=4), rules=(Rule("c.*", stack=1), Rule("d.*", None)))},
    "cut": {"policy": Policy(Uniform(block_size=32), rules=(Rule("a.*", pieces=(3, 2)), *STACKED))},
    "transformed": {"policy": Policy(Multilevel(), rules=(Rule("c.*", order="output-major-taps"),)), "bits": 4.5},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_file_is_that_of_leaves_read_whole(model, tmp_path, way, monkeypatch):
    quantize_file(model, tmp_path / "whole.safetensors", **way)
    monkeypatch.setattr(stream_plan, "LARGE", 20_000)
    monkeypatch.setattr(large, "PANEL", PANEL)
    quantize_file(model, tmp_path / "panels.safetensors", **way)
    assert (tmp_path / "panels.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_no_more_than_a_panel_or_a_piece_is_read_at_once(small_panels, model, tmp_path, monkeypatch):
    most, read = 0, SafetensorsSource.read

    def watched(self, path, *box):
        nonlocal most
        values = read(self, path, *box)
        most = max(most, values.nbytes if path[0] in "abc" else 0)
        return values

    monkeypatch.setattr(SafetensorsSource, "read", watched)
    quantize_file(model, tmp_path / "q.safetensors", policy=Policy(rules=STACKED), bits=4.5)
    assert PANEL / 2 < most <= PANEL


def test_a_weight_that_is_not_finite_is_found(small_panels, tmp_path):
    kernel = np.ones((150, 130), np.float32)
    kernel[140, 120] = np.nan
    save_file({"kernel": kernel}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="kernel: 1 of 19500 weights are NaN or infinite"):
        quantize_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_panels_are_the_numbers_of_the_leaf(data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple))
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    axes = {"stored": range(leaf.ndim), "output-major": [*range(leaf.ndim)[::-1][:2], *range(leaf.ndim - 2)]}
    order = data.draw(st.sampled_from(sorted(axes)))
    expected = leaf.transpose(list(axes[order])).reshape(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "PANEL", data.draw(st.integers(1, 200)))
        panels = Panels(InMemory(leaf), order)
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, leaf.size)] * 2)))
        np.testing.assert_array_equal(panels[start:stop], expected[start:stop])
        places = data.draw(st.lists(st.integers(0, leaf.size - 1), min_size=2, max_size=9))
        np.testing.assert_array_equal(panels[np.array([places, places])], expected[[places, places]])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_part_of_a_leaf_is_read_alone(data, tmp_path_factory):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
    leaf = np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)
    ranges = [st.slices(n).filter(lambda part: part.step in (None, 1)) for n in shape]
    parts = [st.one_of(one, st.integers(0, n - 1)) if n else one for one, n in zip(ranges, shape, strict=True)]
    box = data.draw(st.tuples(*parts))[: data.draw(st.integers(0, leaf.ndim))]
    folder = tmp_path_factory.mktemp("part")
    save_file({"before": np.ones(3, np.float32), "leaf": leaf}, folder / "m.safetensors")
    np.savez(folder / "m.npz", leaf=leaf)
    for name in ("m.safetensors", "m.npz"):
        with open_source(folder / name) as source:
            part = source.read("leaf", box)
        assert isinstance(part, np.ndarray)
        np.testing.assert_array_equal(part, leaf[*box, ...], strict=True)


@pytest.mark.parametrize("box", [(slice(0, 9, 2),), (150,), (-1,), (0, 0, 0)], ids=str)
def test_a_part_that_a_leaf_does_not_have_is_refused(model, box):
    with open_source(model) as source, pytest.raises(ValueError, match=r"'a.kernel' of shape \[150, 130\] has no part"):
        source.read("a.kernel", box)


def test_panels_are_released_with_their_blocks():
    panels = Panels(InMemory(np.ones((4, 4), np.float32)), "output-major")
    panel = weakref.ref(panels._panel(0))
    gc.disable()
    try:
        del panels
        assert panel() is None
    finally:
        gc.enable()
