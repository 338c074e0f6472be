import re

import numpy as np
import pytest

from btc_jax import Multilevel, Policy, Rule, Uniform, btc_metrics, btc_plan, btc_quantize, btc_search
from btc_jax.evaluate import Evaluation
from btc_jax.tables import comparison_table
from tests.tables_support import LONG as LONG
from tests.tables_support import POLICY as POLICY
from tests.tables_support import metrics as metrics
from tests.tables_support import records as records
from tests.tables_support import render as render
from tests.tables_support import rows as rows
from tests.tables_support import tree as tree

MULTILEVEL = Policy(Multilevel(), rules=(Rule("head/*", None),))


WIDTHS = pytest.mark.parametrize("width", [80, 140])


def squeezed(text):
    """The text of a rendered table, without the frame and line breaks in cells: one string per column."""
    lines = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃"]
    return ["".join(cell.strip() for cell in column).replace(" ", "") for column in zip(*lines, strict=True)]


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
