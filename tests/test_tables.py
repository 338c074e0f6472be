import functools
import io
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import treescope
from rich import box
from rich.console import Console

from btc_jax import Multilevel, Policy, Rule, Uniform, btc_metrics, btc_plan, btc_quantize, btc_search
from btc_jax.evaluate import Evaluation
from btc_jax.tables import as_text, comparison_table

LONG = "encoder/layers_11/self_attention/query/kernel"
POLICY = Policy(Uniform(64), rules=(Rule("head/*", None),))
MULTILEVEL = Policy(Multilevel(), rules=(Rule("head/*", None),))
WIDTHS = pytest.mark.parametrize("width", [80, 140])


@functools.cache
def tree():
    rng = np.random.default_rng(0)
    kernel = (0.1 * rng.standard_normal((64, 64))).astype(np.float32)
    encoder = {"encoder": {"layers_11": {"self_attention": {"query": {"kernel": kernel}}}}}
    return encoder | {"head": {"kernel": -kernel}, "bias": np.zeros(7, np.float32), "steps": np.arange(3)}


@functools.cache
def metrics():
    return btc_metrics(tree(), btc_quantize(tree(), policy=POLICY), policy=POLICY)


def render(table, width=140):
    table.box, table.show_edge = box.HEAVY_HEAD, True  # a frame, to separate cells
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def squeezed(text):
    """The text of a rendered table, without the frame and line breaks in cells: one string per column."""
    lines = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃"]
    return ["".join(cell.strip() for cell in column).replace(" ", "") for column in zip(*lines, strict=True)]


def rows(text):
    """The rows of a table that is wide enough to avoid folding."""
    lines = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line] for line in lines]


def words(text):
    """Captions are wrapped; this undoes it."""
    return " ".join(text.split())


@WIDTHS
def test_metrics_name_every_leaf_its_reason_and_the_totals(width):
    text = render(metrics().table(full=True), width)
    columns = squeezed(text)
    assert max(map(len, text.splitlines())) <= width
    for path in ("bias", LONG, "head/kernel", "steps", "all"):
        assert path in columns[0]
    everything = " ".join(columns)
    for reason in ("bias", "default", "rule1", "integer", "dense"):
        assert reason in everything
    assert "…" not in text
    total = metrics().total
    for figure in (f"{total.effective_bits:.3f}", f"{total.rmse:.3g}", f"{total.sqnr_db:.2f}"):
        assert figure in everything
    for nbytes in (metrics().bytes_before, metrics().bytes_after):
        assert f"{nbytes:,}" in everything


@WIDTHS
def test_a_plan_names_every_leaf_its_reason_and_the_totals(width):
    plan = btc_plan(tree(), policy=POLICY)
    text = render(plan.table(full=True), width)
    columns = squeezed(text)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for path in ("bias", LONG, "head/kernel", "steps", "all"):
        assert path in columns[0]
    everything = " ".join(columns)
    for part in ("bias", "default", "rule1", "integer", "dense", "uniform64", "64x64", "int64"):
        assert part in everything
    assert f"{plan.bytes_before:,}" in everything
    assert f"{plan.bytes_min:,}to{plan.bytes_max:,}" in everything


def test_a_measured_plan_has_one_size_a_leaf():
    plan = btc_plan(tree(), policy=POLICY, measure=True)
    text = render(plan.table(full=True))
    assert f"{plan.bytes_min:,}" in text
    assert " to " not in text


@WIDTHS
def test_a_search_table_has_a_row_a_trial_and_the_message_as_caption(width):
    answers = iter([0.95, 0.945, 0.94, 0.9])
    result = btc_search(tree(), lambda _: next(answers), policy=POLICY, max_rmse=None, progress=False)
    table = result.table()
    text = render(table, width)
    assert str(table.caption) == result.message
    assert words(result.message) in words(text)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert len(result.trials) == 3
    everything = " ".join(squeezed(text))
    for trial in result.trials:
        for part in (f"{trial.accuracy:.2%}", f"{trial.metrics.total.rmse:.5f}", f"{trial.metrics.bytes_after:,}"):
            assert part in everything
    for verdict in ("holds", "best", result.trials[-1].violation.replace(" ", "")):
        assert verdict in squeezed(text)[-1]


def test_a_search_table_without_accuracy_leaves_it_blank():
    result = btc_search(tree(), policy=POLICY, block_sizes=(64,), max_rmse=None, progress=False)
    header, row = rows(render(result.table()))
    assert dict(zip(header, row, strict=True))["accuracy"] == dict(zip(header, row, strict=True))["drop"] == ""
    assert dict(zip(header, row, strict=True))["verdict"] == "best"


def test_a_search_table_shows_budgets_and_divergences_where_there_are_any():
    kls = iter([0.0, 0.00123, 0.5, 0.01])
    result = btc_search(
        tree(),
        lambda _: Evaluation(1, None, None, 1, None, agreement=0.9, kl=next(kls)),
        bits=(2, 6),
        tolerance=2,
        max_kl=0.1,
        policy=MULTILEVEL,
        progress=False,
    )
    header, *body = rows(render(result.table(), 200))
    shown = [dict(zip(header, row, strict=True)) for row in body]
    assert [row["budget"] for row in shown] == ["6.000", "2.000", "4.000"]
    assert [row["KL"] for row in shown] == ["0.00123", "0.50000", "0.01000"]
    assert {row["agreement"] for row in shown} == {"90.00%"}
    assert [row["verdict"] for row in shown] == ["holds", "KL 0.5 > 0.1", "best"]
    sizes = btc_search(tree(), policy=POLICY, block_sizes=(64,), max_rmse=None, progress=False)
    assert not {"budget", "KL"} & set(rows(render(sizes.table()))[0])


@pytest.mark.parametrize(
    ("codec", "order", "cell"),
    [
        (Uniform(128), "stored", "uniform 128"),
        (Multilevel(), "output-major", "multilevel 32"),
        (Multilevel(64, width=4), "output-major-taps", "multilevel 64, 4 bits, taps"),
        (Multilevel(width="leaf"), "stored-taps", "multilevel 32, one width, taps"),
    ],
)
def test_a_codec_in_few_words(codec, order, cell):
    policy = Policy(codec, names=("kernel",), order=order)
    kernel = {"kernel": np.zeros((3, 3, 32, 32), np.float32)}
    header, row, *_ = rows(render(btc_plan(kernel, policy=policy).table(), 200))
    assert dict(zip(header, row, strict=True))["codec"] == cell


def test_figures_stand_in_the_column_of_their_name():
    header, *body, total = rows(render(metrics().table(full=True), 200))
    found = {row[0]: dict(zip(header, row, strict=True)) for row in [*body, total]}
    packed = next(leaf for leaf in metrics().leaves if leaf.path == LONG)
    m = packed.measures
    assert m is not None
    assert found[LONG] == {
        "leaf": LONG,
        "shape": "64 x 64",
        "reason": "default",
        "bytes": "16,384",
        "packed": f"{packed.bytes_after:,}",
        "wide": f"{100 * m.wide_share:.1f}%",
        "payload": f"{m.payload_bits:.3f}",
        "header": f"{m.header_bits:.3f}",
        "effective": f"{m.effective_bits:.3f}",
        "rmse": f"{m.rmse:.3g}",
        "rel. rmse": f"{100 * m.relative_rmse:.2f}%",
        "SQNR dB": f"{m.sqnr_db:.2f}",
        "largest": f"{m.largest_error:.3g}",
    }
    assert [found["head/kernel"][name] for name in ("reason", "bytes", "packed", "rmse")] == [
        "rule 1",
        "16,384",
        "dense",
        "",
    ]
    assert found["all"]["bytes"] == f"{2 * 16384 + 28 + 24:,}"
    assert found["all"]["shape"] == "4,096 weights"


def test_exact_weights_are_shown_as_infinite():
    exact = {"kernel": np.ones((64, 64), np.float32)}
    text = render(btc_metrics(exact, btc_quantize(exact)).table(full=True))
    assert re.search(r"│ *inf│", text)


@pytest.mark.parametrize("name", ["w[bold]", "w[/]", "[red]w", ":smile:"])
def test_paths_are_shown_as_they_are(name):
    odd = {name: np.zeros((64, 64), np.float32)}
    policy = Policy(names=("*",))
    for table in (
        btc_metrics(odd, btc_quantize(odd, policy=policy), policy=policy).table(),
        btc_plan(odd, policy=policy).table(),
    ):
        assert name in render(table)


def test_an_error_with_brackets_is_shown_as_it_is():
    def evaluate(tree):
        raise ValueError("no file [/data/x] for [bold] labels")

    result = btc_search(tree(), evaluate, policy=POLICY, progress=False)
    assert "no file [/data/x] for [bold] labels" in words(render(result.table()))


@WIDTHS
def test_titles_are_shown(width):
    tables = (
        metrics().table("My metrics"),
        btc_plan(tree()).table("My plan"),
        comparison_table([{"method": "a"}], "My comparison"),
    )
    for table, title in zip(tables, ("My metrics", "My plan", "My comparison"), strict=True):
        assert title in words(render(table, width))


@WIDTHS
def test_comparison_formats_by_column_and_leaves_gaps_blank(width):
    records = [
        {"method": "float", "accuracy": 0.9163, "bytes": 1084392, "note": None},
        {"method": "BTC 64", "accuracy": 0.9131, "bits": 8.04817, "rmse": 0.0011323, "agreement": 0.987, "KL": 0.00123},
    ]
    text = render(comparison_table(records, "CIFAR-10"), width)
    header, first, second = rows(text)
    assert header == ["method", "accuracy", "bytes", "note", "bits", "rmse", "agreement", "KL"]
    assert first == ["float", "91.63%", "1,084,392", "", "", "", "", ""]
    assert second == ["BTC 64", "91.31%", "", "", "8.048", "0.00113", "98.70%", "0.00123"]


def test_comparison_shows_whole_numbers_whole():
    header, row = rows(render(comparison_table([{"method": "BTC", "block size": 64}], "t")))
    assert dict(zip(header, row, strict=True)) == {"method": "BTC", "block size": "64"}


def records():
    search = btc_search(tree(), policy=POLICY, block_sizes=(32, 64), max_rmse=None, progress=False)
    return {"metrics": metrics(), "plan": btc_plan(tree(), policy=POLICY), "search": search}


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
