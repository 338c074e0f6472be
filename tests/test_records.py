"""Records as text, HTML and pictures."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import treescope

from btc_jax import Policy, btc_plan, btc_quantize, btc_search
from btc_jax.tables import as_text
from tests.tables_support import LONG as LONG
from tests.tables_support import POLICY as POLICY
from tests.tables_support import metrics as metrics
from tests.tables_support import records as records
from tests.tables_support import render as render
from tests.tables_support import rows as rows
from tests.tables_support import tree as tree


@pytest.mark.parametrize("name", ["metrics", "plan", "search"])
def test_records_print_as_tables_of_80_columns(name):
    record = records()[name]
    text = str(record)
    assert max(map(len, text.splitlines())) <= 80
    assert text == as_text(record.table())
    assert text.startswith(str(record.table().title))


def test_short_metrics_have_the_figures_that_matter():
    header, *body = rows(render(metrics().table()))
    assert header == ["leaf", "shape", "reason", "bytes", "packed", "effective", "SQNR dB"]
    assert body[-1][-1] == f"{metrics().total.sqnr_db:.2f}"


@pytest.mark.parametrize("name", ["metrics", "plan", "search"])
def test_notebooks_get_an_html_table_of_the_same_cells(name):
    record = records()[name]
    found = ElementTree.fromstring(f"<div>{record._repr_html_()}</div>")
    table = record.table()
    assert [cell.text for cell in found.iter("th")] == [column.header for column in table.columns]
    body = [[cell.text or "" for cell in row.iter("td")] for row in found.iter("tr")][1:]
    assert body == [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_html_is_escaped():
    odd = {"<b>&w": np.zeros((64, 64), np.float32)}
    text = btc_plan(odd, policy=Policy(names=("*",)))._repr_html_()
    assert "&lt;b&gt;&amp;w" in text
    assert "<b>" not in text


def test_control_characters_are_escaped():
    odd = {"\x1b[2Jw": np.zeros((64, 64), np.float32)}
    text = str(btc_plan(odd, policy=Policy(names=("*",))))
    assert "\\x1b[2Jw" in text
    assert "\x1b" not in text


def test_plots_draw_what_the_records_say():
    from matplotlib.figure import Figure

    ax = metrics().plot(Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == [LONG]
    assert [bar.get_width() for bar in ax.patches] == [metrics().total.effective_bits]
    search = records()["search"]
    ax = search.plot(Figure().subplots())
    points = {tuple(point) for marks in ax.collections for point in marks.get_offsets()}
    totals = [trial.metrics.total for trial in search.trials]
    assert points == {(m.effective_bits, m.rmse) for m in totals}


def test_error_against_bits():
    from matplotlib.figure import Figure

    m = metrics()
    ax = m.plot(Figure().subplots(), kind="error")
    (points,) = ax.collections
    packed = [leaf.measures for leaf in m.leaves if leaf.measures]
    assert points.get_offsets().tolist() == [[p.effective_bits, pytest.approx(p.sqnr_db)] for p in packed]
    with pytest.raises(ValueError, match="kind is 'nope'; it can be 'bits', 'error'"):
        m.plot(Figure().subplots(), kind="nope")


@pytest.mark.parametrize(("kind", "drawn"), [("error", True), ("accuracy", True), ("kl", False)])
def test_each_kind_of_search_history(kind, drawn):
    from matplotlib.figure import Figure

    search = btc_search(tree(), lambda _: 0.5, policy=POLICY, block_sizes=(32, 64), max_rmse=None)
    ax = search.plot(Figure().subplots(), kind=kind)
    assert sum(len(points.get_offsets()) for points in ax.collections) == (3 if drawn else 0)


def test_plots_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"btc_jax\[plot\]"):
        metrics().plot()


def test_a_packed_leaf_shows_itself_in_a_notebook():
    leaf = btc_quantize(tree(), policy=POLICY)["encoder"]["layers_11"]["self_attention"]["query"]["kernel"]
    found = ElementTree.fromstring(f"<div>{leaf._repr_html_()}</div>")
    cells = dict(zip([c.text for c in found.iter("th")], [c.text for c in found.iter("td")], strict=True))
    assert cells["shape"] == "64 x 64"
    assert cells["bytes"] == f"{leaf.nbytes:,}"
    assert cells["widths"] == ", ".join(
        f"{count} of {width} bits" for width, count in zip(*np.unique(leaf.widths, return_counts=True), strict=True)
    )
    assert "planes" in treescope.render_to_text(leaf)
