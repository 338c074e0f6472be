"""`python -m examples.paper` from end to end on a small table, its interrupts, its errors, its tables and figures."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("sklearn")

import examples.paper.__main__ as command
from btc_jax import Uniform
from examples.paper import costs, experiments, methods, mlp, published, subjects
from examples.paper.networks import NETWORKS
from examples.paper.show import figures, report
from examples.paper.store import Store
from examples.paper.torch_names import torch_names
from examples.paper.weights import TO_TORCH

ROWS = "".join(f"{i},{i * i % 17},{'ab'[i % 3 == 0]}\n" for i in range(60))


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Ignore local weights and data files."""
    monkeypatch.setattr(subjects, "default_folders", list)
    monkeypatch.setattr(subjects, "load_weights", functools.partial(subjects.load_weights, cache=tmp_path / "cache"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Shorten sweeps and training, and provide a CSV file."""
    monkeypatch.setattr(subjects, "BUNDLED", {})
    monkeypatch.setattr(experiments, "THRESHOLDS", (0.03, 0.1))
    monkeypatch.setattr(experiments, "SMALL_BLOCKS", (2, 64))
    monkeypatch.setattr(experiments, "CONFIGURATIONS", (Uniform(64, threshold=0.03), Uniform(64, threshold=0.1)))
    monkeypatch.setattr(costs, "SIDE", 64)
    monkeypatch.setattr(mlp, "HIDDEN", (16,))
    monkeypatch.setattr(mlp, "STEPS", 4)
    monkeypatch.setattr(methods, "BLOCK_SIZES", (32, 64))
    (tmp_path / "rows.csv").write_text("x,y,class\n" + ROWS)
    return ["--output", str(tmp_path / "out"), "--csv", str(tmp_path / "rows.csv"), "--target", "class"]


def run(options: list[str]):
    return CliRunner().invoke(command.app, options, env={"COLUMNS": "200"}, catch_exceptions=False)


def test_the_whole_command_and_going_on_after_an_interrupt(small, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, "uniform8", interrupted)
        stopped = run(small)
    assert stopped.exit_code == 130
    assert "resumes where it stopped" in stopped.output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rows").iterdir()}
    assert sum(path.suffix == ".json" for path in before) == 2  # float32 and BTC

    calls = []
    for name, method in list(methods.METHODS.items()):
        counted = lambda *a, name=name, method=method: calls.append(name) or method(*a)  # noqa: E731
        monkeypatch.setitem(methods.METHODS, name, counted)
    finished = run(small)
    assert finished.exit_code == 0, finished.output
    assert "9 rows computed, 2 kept from before" in finished.output
    assert calls == [
        "uniform8",
        "percentile8",
        "Multilevel",
        "float32",
        "uniform8",
    ]  # the last two for the configurations
    assert {path: path.stat().st_mtime_ns for path in before} == before

    again = run(small)
    assert "0 rows computed, 11 kept from before" in again.output
    assert len(calls) == 5
    check_output(tmp_path / "out", finished.output)


def check_output(folder: Path, printed: str) -> None:
    document = json.loads((folder / "paper.json").read_text())
    assert [row["method"] for row in document["results"]["rows"]] == list(methods.METHODS)
    assert document["published"] == published.published()
    text = (folder / "paper.md").read_text()
    for number in range(1, 7):
        assert f"Table {number}. " in text
        assert f"Table {number}. " in printed
    for name in ("all CIFAR-10 test images", "ResNet-101 (imagenet)", "MLP, Letter", "RepVGG-A0 (cifar100)"):
        assert f"- {name}: " in text
        assert f"- {name}: " in printed
    names = ("figure2_noise", "figure3_loss", "figure4_cifar10", "figure5_cifar100", "figure6_block_sizes")
    for name in (*names, "figure8_threshold"):
        assert_drawn(folder / name)
        assert f"![{name}]({name}.svg)" in text


def assert_drawn(path: Path) -> None:
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".png").stat().st_size > 5_000
    assert path.with_suffix(".svg").read_text().rstrip().endswith("</svg>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cifar10", "none"], "none does not exist; give the folder or file of cifar10's test images"),
        (["--cifar100", "."], "has no test images of cifar100"),
        (["--imagenet", "none"], "none does not exist; give the folder of ImageNet's validation images"),
        (["--csv", "none.csv", "--target", "y"], "none.csv does not exist; give a CSV file with a header"),
        (["--csv", "rows.csv"], "--csv and --target go together"),
    ],
)
def test_errors_are_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(["--output", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_damaged_weights_file_is_named(tmp_path):
    (tmp_path / "cifar10_chenyaofo_resnet20.safetensors").write_bytes(b"12345")
    result = run(["--output", str(tmp_path / "out"), "--weights", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("paper: ")
    assert "cifar10_chenyaofo_resnet20.safetensors" in result.output
    assert len(result.output.splitlines()) == 1


# Tables and figures of networks, from made-up results


def made_up() -> dict:
    """Results for two networks with the paper's weights, one with others, and an MLP."""
    networks = [("cifar10_resnet20", "ResNet20", "cifar10", True), ("cifar10_resnet56", "ResNet56", "cifar10", True)]
    networks += [("akamaster_resnet20", "ResNet20, option A", "cifar10", False), ("mlp_T", "MLP, T", "tabular", False)]
    what = {n: {"name": n, "title": t, "dataset": d, "own_weights": own} for n, t, d, own in networks}
    costs = {"rmse": 0.003, "payload": 4.1, "payload_layers": 5.0, "header": 0.5, "effective": 4.6}
    answers = {"accuracy": 0.92, "standard_error": 0.01, "known": "ten images", "compared": "ten images"}
    answers |= {"agreement": 0.98, "kl": 0.01, "loss": 0.3}
    rows = [w | costs | answers | {"method": m, "note": ""} for w in what.values() for m in (*methods.METHODS, "New")]
    layers = [
        {"path": "a", "shape": [3, 3, 3, 16], "weights": 432, "payload": 8.0, "rmse": 0.001},
        {"path": "b", "shape": [64, 10], "weights": 640, "payload": 4.0, "rmse": 0.002},
    ]
    wide = [{"layer": "abcd"[i], "weights": 9, "wide": i / 4, "payload": 4 + i} for i in range(4)]
    sweep = [{"threshold": t, "block_size": 64} | costs | answers for t in (0.03, 0.05, 0.1)]
    counts = {name: {"counts": [1, 2], "distinct": 2, "rmse": 0.0} for name in ("float32", "BTC", "uniform8")}
    histogram = {"layer": "a", "edges": [0.0, 0.5, 1.0], "counts": counts}
    return {
        "missing": [{"what": "rows", "how": "get | them"}],
        "rows": rows,
        "networks": what,
        "averages": {name: dict.fromkeys(("32", "64", "128", "256"), layers) for name in list(what)[:3]},
        "wide": dict.fromkeys(what, wide),
        "histogram": {"cifar10_resnet20": histogram},
        "thresholds": dict.fromkeys(what, sweep),
        "block_sizes": {"mlp_T": sweep},
        "configurations": {
            "mlp_T": {"steps": sweep, "fixed": [sweep[0] | {"method": m} for m in ("float32", "uniform8")]}
        },
        "complexity": {
            "all": [{"method": "BTC 64", "calibration": "none", "ms": 1.0, "copies": 2.0, "peak": None, "header": 0.5}]
        },
        "storage": {"all": [published.table(5)[0] | {"published": published.table(5)[0]}]},
    }


def test_every_table_has_its_rows(tmp_path):
    shown = {table.title.split(".")[0]: table for table in report.tables(made_up())}
    assert len(shown) == 13
    for table in shown.values():
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
    second = shown["Table 2"]
    assert [row[:2] for row in second.rows[:7]] == [["ResNet20", m] for m in (*methods.METHODS, "New")] + [
        ["ResNet32", "float32"]
    ]
    assert second.rows[1] == [
        *("ResNet20", "BTC", "92.00", "1.00", "91.99", "98.00", "0.01000", "0.00300", "0.00315"),
        *("4.100", "5.000", "5.01", "4.600", ""),
    ]
    assert sum(row[-1].startswith("not run") for row in second.rows) == 15
    assert shown["Table 5"].rows[0][-1] == "yes"
    best = shown["What the paper's column of bits may be"].rows[0]
    assert best[0] in ("all layers", "without the classifier", "only 3x3 convolutions")


def test_every_figure_is_drawn_in_both_formats(tmp_path):
    names = figures.draw_all(tmp_path, made_up())
    assert names == sorted(figures.FIGURES)
    assert len(names) == 8
    for name in names:
        assert_drawn(tmp_path / name)


def test_markdown_keeps_its_columns(tmp_path):
    report.write_all(tmp_path, made_up(), [])
    for line in (tmp_path / "paper.md").read_text().splitlines():
        assert "\x1b" not in line
    assert "- rows: get | them" in (tmp_path / "paper.md").read_text()
    assert json.loads((tmp_path / "paper.json").read_text())["results"]["rows"][0]["accuracy"] == 0.92


def test_figures_of_nothing_but_the_paper(tmp_path):
    results = {"rows": [], "missing": [], "networks": {}}
    assert figures.draw_all(tmp_path, results) == ["figure4_cifar10", "figure5_cifar100"]
    assert np.isfinite((tmp_path / "figure5_cifar100.png").stat().st_size)


def test_weights_and_images_in_a_folder_make_a_subject(tmp_path, monkeypatch):
    """A ResNet-20 with random weights under PyTorch's names, and four images."""
    monkeypatch.setattr(subjects, "BUNDLED", {"Wine": subjects.BUNDLED["Wine"]})
    network, random = NETWORKS["cifar10_resnet20"], np.random.default_rng(0)
    leaves, names = jax.tree.leaves(network.shapes()), torch_names(network.model, network.shapes())
    state = {
        name: random.uniform(0.01, 0.1, [leaf.shape[axis] for axis in TO_TORCH[leaf.ndim]]).astype(np.float32)
        for name, leaf in zip(names, leaves, strict=True)
    }
    save_file(state, tmp_path / "cifar10_chenyaofo_resnet20.safetensors")
    images, labels = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.arange(4)
    np.savez(tmp_path / "cifar10_test_932.npz", images=images, labels=labels)

    found, missing = subjects.subjects(subjects.Options(tmp_path, weights=(tmp_path,)), Store(tmp_path / "rows"))
    assert [subject.what["name"] for subject in found] == ["cifar10_resnet20", "mlp_Wine"]
    assert not any(line["what"].startswith("ResNet20 (cifar10)") for line in missing)
    exam = found[0].exam()
    answers = exam.figures(exam.params)
    assert (answers["known"], answers["agreement"]) == ("first 4 CIFAR-10 test images", 1.0)
    before = exam.digests()
    np.savez(tmp_path / "cifar10_test_932.npz", images=255 - images, labels=labels)
    (again, _), _ = subjects.subjects(subjects.Options(tmp_path, weights=(tmp_path,)), Store(tmp_path / "rows"))
    after = again.exam().digests()
    assert {name for name in before if before[name] != after[name]} == {"known", "compared"}
