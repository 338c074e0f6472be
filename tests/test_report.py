"""The page of a report: its numbers are those of the metrics, in its source and in a browser."""

import functools
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import btc_jax
from btc_jax import Multilevel, Policy, Rule, Uniform, btc_quantize
from btc_jax.checkpoint import Checkpoint
from btc_jax.metrics import btc_metrics
from btc_jax.report import btc_report, report_files
from btc_jax.report.histogram import EDGES, histogram

POLICY = Policy(rules=(Rule("head/*", None),))


def tree():
    rng = np.random.default_rng(0)
    layers = {
        f"layer_{i}": {
            "kernel": (0.1 / (i + 1) * rng.standard_normal((64, 64))).astype(np.float32),
            "bias": np.zeros(64, np.float32),
        }
        for i in (1, 2, 10)
    }
    return layers | {"head": {"kernel": rng.standard_normal((64, 64)).astype(np.float32)}, "steps": np.arange(3)}


@functools.cache
def report():
    return btc_report(tree(), packed(), policy=POLICY)


@functools.cache
def packed():
    return btc_quantize(tree(), bits=4.5, policy=POLICY)


class Page(HTMLParser):
    """The rows of each table by the id of its section, and the text of each element with an id."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.texts, self.links, self._section, self._cell, self._ids = {}, {}, [], "", None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("src", "href") if name in found]
        if tag == "section":
            self._section = found["id"]
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self._cell = ""
        if tag == "strong":
            self._ids.append(found["id"])

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._section][-1].append(self._cell.strip())
            self._cell = None
        if tag == "strong":
            self._ids.pop()

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data
        for name in self._ids:
            self.texts[name] = self.texts.get(name, "") + data


def assert_numbers(text, found):
    """All numbers of the page, against the metrics of the trees."""
    metrics, page = btc_metrics(tree(), packed(), policy=POLICY), Page(text)
    m = metrics.total
    assert page.texts == {
        "ratio": f"{metrics.bytes_before / metrics.bytes_after:.2f}",
        "bytes-after": f"{metrics.bytes_after:,}",
        "bits": f"{m.effective_bits:.3f}",
        "sqnr": f"{m.sqnr_db:.2f}",
        "packed": "3",
    }
    by_path = {leaf.path: leaf.measures for leaf in metrics.leaves if leaf.measures}
    rows = {row[0]: row[1:] for row in page.tables["leaves"][1:]}
    assert list(rows) == ["layer_1/kernel", "layer_2/kernel", "layer_10/kernel"]
    for path, (bits, _, sqnr, nbytes, shape, codec) in rows.items():
        measures = by_path[path]
        assert (bits, sqnr) == (f"{measures.effective_bits:.3f}", f"{measures.sqnr_db:.2f}")
        assert int(nbytes.replace(",", "")) == round(measures.effective_bits * 64 * 64 / 8)
        assert (shape, codec) == ("64 x 64", "multilevel 32")
    worst = [(row[0], float(row[1])) for row in page.tables["worst"][1:]]
    assert worst == sorted(worst, key=lambda row: row[1])
    assert sum(float(row[5].rstrip("%")) for row in page.tables["worst"][1:]) == pytest.approx(100, abs=0.2)
    blocks = {int(row[0]): int(row[1].replace(",", "")) for row in page.tables["widths"][1:]}
    assert sum(blocks.values()) == 3 * 64 * 64 / 32
    assert blocks == found.widths


def test_the_page_says_what_the_metrics_say():
    assert_numbers(report().html(), report())


def test_widths_are_counted():
    leaf = packed()["layer_1"]["kernel"]
    widths, counts = np.unique(np.asarray(leaf.widths), return_counts=True)
    assert report().details["layer_1/kernel"].widths == dict(zip(widths, counts, strict=True))


def test_other_quantizers_are_measured_on_the_same_leaves():
    rows = {row[0]: row[1:] for row in Page(report().html()).tables["quantizers"][1:]}
    _, found = btc_jax.baselines.apply_baseline(tree(), btc_jax.baselines.absmax4(), policy=POLICY)
    bits, nbytes, sqnr, *_ = rows["absmax4 (groups of 32)"]
    assert bits == f"{found.total.effective_bits:.3f}"
    assert (nbytes, sqnr) == (f"{found.bytes_after:,}", f"{found.total.sqnr_db:.2f}")
    assert not btc_report(tree(), packed(), policy=POLICY, baselines=False).baselines


def test_dense_leaves_have_reasons():
    text = report().html()
    for line in ("rule 1: 1 leaf, 16,384 bytes", "bias: 3 leaves, 768 bytes", "integer: 1 leaf"):
        assert line in text, line


def test_nothing_is_loaded_and_nothing_runs():
    text = report().html()
    assert all(link.startswith("#") for link in Page(text).links)
    assert not re.search(r"<script|url\(|@import|https?:|javascript:|\son\w+=", text)


def test_names_cannot_write_html():
    name = "<script>alert(1)</script>\x1b[2J"
    tree = {name: {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}}
    text = btc_report(tree, btc_quantize(tree), names=("<b>a", '"><i>b')).html()
    assert "<script" not in text
    assert "\x1b" not in text
    assert html.escape("<script>alert(1)</script>\\x1b[2J/kernel") in text
    assert "<b>a" not in text
    assert "<i>b" not in text


def test_from_files_it_is_the_same(tmp_path):
    flat = {f"{name}.{key}": leaf for name, layer in tree().items() if name != "steps" for key, leaf in layer.items()}
    save_file(flat, tmp_path / "a.safetensors")
    btc_jax.quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bits=4.5)
    seen = []
    found = report_files(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", on_leaf=lambda *leaf: seen.append(leaf)
    )
    loaded = btc_jax.load(tmp_path / "b.safetensors")
    expected = btc_report(flat, loaded, names=("a.safetensors", "b.safetensors"))
    assert found.to_json() == expected.to_json()
    assert dict(seen) == {path: leaf.nbytes for path, leaf in flat.items()}
    save_file({**flat, "head.bias": np.ones(3, np.float32)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors and .*'head\.bias' is in only one"):
        report_files(tmp_path / "c.safetensors", tmp_path / "b.safetensors")


def test_tied_stacked_and_low_precision_leaves(tmp_path):
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
    params = {"embedding": table, "layers": {"kernel": jnp.asarray(rng.standard_normal((3, 32, 32)), jnp.float16)}}
    params["out"] = {"kernel": table}
    policy = Policy(Multilevel(), rules=(Rule("layers/*", stack=0), Rule("*", order="stored")))
    small = btc_quantize(params, bits=5, policy=policy)
    found = btc_report(params, small, policy=policy)
    assert [leaf.path for leaf in found.packed] == ["embedding", "layers/kernel"]
    assert "tied to another leaf: 1 leaf, 0 bytes" in found.html()
    btc_jax.save(tmp_path / "a", params)
    btc_jax.save(tmp_path / "b", small)
    of_files = report_files(tmp_path / "a", tmp_path / "b")
    assert of_files.metrics.total == found.metrics.total
    assert [leaf.path for leaf in of_files.dense] == ["out/kernel"]


@pytest.mark.parametrize("leaf", [np.zeros((64, 64)), np.full((64, 64), 0.25), np.ones((2, 2049))])
def test_flat_weights_make_a_page(leaf):
    tree = {"kernel": leaf.astype(np.float32)}
    found = btc_report(tree, btc_quantize(tree, Uniform()))
    assert sum(found.histograms[0]) == sum(found.histograms[1]) == leaf.size
    assert "exact" in found.html()


def test_histograms_count_every_weight():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((300, 77))
    weights[0, :3] = 100, -100, 4
    inner = np.histogram(weights, EDGES)[0]
    found = np.array(histogram(weights, 1.0))
    np.testing.assert_array_equal(found[1:-1], inner[1:-1])
    assert found.sum() == weights.size


def test_the_record():
    found = report()
    assert json.loads(json.dumps(found.to_json()))["metrics"]["total"]["weights"] == 3 * 64 * 64
    assert "layer_10/kernel" in str(found)
    assert found._repr_html_().startswith("<table>")
    ax = found.plot()
    assert [patch.get_label() for patch in ax.patches] == ["before", "after"]


def test_an_existing_page_survives_a_failed_write(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="could not be written"):
        report().save(target)
    assert target.is_dir()
    assert report().save(tmp_path / "page.html").read_text() == report().html()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html"]


def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(ValueError, match="no leaf of the second tree is packed"):
        btc_report(tree(), tree())
    btc_jax.save(tmp_path / "a", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="holds no packed leaf"):
        report_files(tmp_path / "a", tmp_path / "a")


def test_one_leaf_is_in_memory_at_a_time(tmp_path, monkeypatch):
    leaves = {f"{i}.weight": np.full((64, 64), 0.1 * i, np.float32) for i in range(4)}
    save_file(leaves, tmp_path / "a.safetensors")
    btc_jax.quantize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    read, before = [], Checkpoint.read_numpy
    monkeypatch.setattr(Checkpoint, "read_numpy", lambda self, path: read.append(path) or before(self, path))
    done = []
    report_files(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        baselines=False,
        on_leaf=lambda path, _: done.append((path, len(read))),
    )
    assert done == [(path, i + 1) for i, path in enumerate(leaves)]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("width", [375, 1200])
def test_in_a_browser(tmp_path, width):
    """The document after layout has the same numbers, and is no wider than its window."""
    measure = "<script>document.body.dataset.wide=document.documentElement.scrollWidth-innerWidth</script></body>"
    (tmp_path / "page.html").write_text(report().html().replace("</body>", measure))
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--window-size={width},800"]
    done = subprocess.run([*line, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (wide,) = re.findall(r'data-wide="(-?\d+)"', done.stdout)
    assert int(wide) <= 0
    assert_numbers(done.stdout, report())


def test_several_devices():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"kernel": jax.device_put(tree()["layer_1"]["kernel"], sharding)}
    found = btc_report(params, btc_quantize(params, bits=4.5))
    assert len(found.packed) == 1
