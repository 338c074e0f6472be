"""The paper's evaluation: its own figures, the averages, merged layers, exams, and stored rows."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("sklearn")

import btc_jax
from btc_jax import Uniform
from examples.paper import averages, costs, experiments, methods, published, rows
from examples.paper.data import Labelled
from examples.paper.exams import Exam
from examples.paper.merged import LONG, layer_metrics, merge, merged_policy, restore
from examples.paper.mlp import mlp_exam
from examples.paper.networks import NETWORKS
from examples.paper.store import Store, code_version, tree_digest, write_whole
from examples.paper.tabular import bundled
from examples.paper.weights import load_weights

DATA = Path(__file__).parents[1].parent / "shared" / "data"
ISSUE = {  # an independent calculation: payload over weights, over layers, rmse over weights; blocks of 64, 128, 256
    "cifar10_resnet20": ((4.206, 4.211, 4.235), (5.245, 5.354, 5.449), (0.00285, 0.00326, 0.00363)),
    "cifar10_resnet56": ((4.020, 4.016, 4.010), (4.280, 4.267, 4.223), (0.00186, 0.00216, 0.00246)),
    "cifar10_shufflenetv2_x0_5": ((4.821, 4.833, 4.812), (6.965, 7.043, 7.097), (0.00178, 0.00217, 0.00264)),
}


def exam_of(params, apply=lambda params, x: x, **sets) -> Exam:
    return Exam(apply, params, np.zeros((1, 4), np.float32), **sets)


@pytest.fixture(scope="module")
def wine(tmp_path_factory) -> Exam:
    return mlp_exam(bundled("Wine"), Store(tmp_path_factory.mktemp("wine")))


# The paper's figures


def test_published_rows_have_all_columns():
    for number, count in ((1, 3), (2, 7), (3, 7), (4, 5), (5, 8), (6, 3)):
        assert len(published.table(number)) == count
        assert published.title(number).startswith(f"Table {number}. ")
    titles = {network.title for network in NETWORKS.values() if not network.name.startswith("akamaster")}
    for dataset, number in (("cifar10", 2), ("cifar100", 3), ("imagenet", 6)):
        for row in published.table(number):
            assert row["model"] in titles
            assert published.row_of(dataset, row["model"]) == row


def test_the_uniform_column_is_the_mean_of_eight_and_the_btc_column():
    """All but the one row that shows the 8 bits of a uniform quantizer."""
    odd = [row for row in published.uniform_column() if abs(row["uniform"] - row["mean"]) > 0.0051]
    assert [(row["model"], row["uniform"]) for row in odd] == [("MobileNetV2_x0.5", 8.0)]


def test_rows_of_the_paper_beyond_its_own_limit():
    found = [(row["table"], row["model"]) for row in published.beyond_the_limit()]
    assert found[:3] == [(2, "ResNet20"), (2, "ShuffleNetV2_0.5"), (2, "ShuffleNetV2_1.0")]
    assert len(found) == 9


def test_table_5_is_exact():
    for row in costs.storage_breakdown():
        paper = row.pop("published")
        overhead = row.pop("overhead")
        assert row == {name: paper[name] for name in row}
        assert f"{overhead:.2f}" == f"{paper['overhead']:.2f}"


# Averages


SIZES = ("64", "128", "256")
QUICKLY = {"cifar10_shufflenetv2_x0_5": ("64",)}  # many odd layers, and two compiled programs for each


@pytest.mark.parametrize("name", list(ISSUE))
def test_both_averages_agree_with_an_independent_calculation(name):
    """All three sizes of all networks with BTC_JAX_SLOW=1."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}")
    network = NETWORKS[name]
    sizes = SIZES if "BTC_JAX_SLOW" in os.environ else QUICKLY.get(name, SIZES)
    layers = averages.layers_by_block(exam_of(load_weights(network, [DATA])["params"]), tuple(map(int, sizes)))
    for position, size in enumerate(sizes):
        (bits, error), (mean, _) = averages.over_weights(layers[size]), averages.over_layers(layers[size])
        found, expected = (bits, mean, error), [column[position] for column in ISSUE[name]]
        assert [f"{f:.3f}" for f in found[:2]] == [f"{e:.3f}" for e in expected[:2]]
        assert f"{error:.5f}" == f"{expected[2]:.5f}"


def layer(shape, payload, rmse=0.001):
    return {"path": "p", "shape": shape, "weights": int(np.prod(shape)), "payload": payload, "rmse": rmse}


def test_readings_take_the_layers_and_averages_they_name():
    rows = [layer([3, 3, 2, 4], 8.0, 0.002), layer([1, 1, 4, 4], 6.0), layer([4, 8], 4.0)]
    larger = [r | {"payload": r["payload"] - 1, "rmse": 2 * r["rmse"]} for r in rows]
    by_block = {"32": rows, "64": larger, "128": larger, "256": larger}
    assert averages.read(by_block, "all layers", "over layers", "block 32")[0] == pytest.approx(6.0)
    assert averages.read(by_block, "without the classifier", "over layers", "block 64")[0] == pytest.approx(6.0)
    assert averages.read(by_block, "only 3x3 convolutions", "over weights", "block 32") == pytest.approx((8.0, 0.002))
    weights = (72 * 8 + 16 * 6 + 32 * 4) / 120
    assert averages.read(by_block, "all layers", "over weights", "block 32")[0] == pytest.approx(weights)
    per_layer = averages.read(by_block, "all layers", "over layers", averages.PER_LAYER)[0]
    assert per_layer == pytest.approx((8 + 5 + 3) / 3)  # the first layer breaks the limit at 64
    assert averages.searched_block(by_block) == "32"
    ranked = averages.ranked({"net": by_block}, {"net": {"btc_bits": 6.0}})
    assert ranked[0]["off"] == pytest.approx(0.0)
    assert [row["off"] for row in ranked] == sorted(row["off"] for row in ranked)


# Merged layers


def test_merged_layers_are_coded_in_the_same_blocks():
    codec = Uniform(128)
    params = {
        "a": {"kernel": 0.05 * np.random.default_rng(0).standard_normal((3, 3, 5, 7), np.float32), "bias": np.ones(7)},
        "b": {"kernel": 0.1 * np.random.default_rng(1).standard_normal((40, 24), np.float32)},
        "d": {"kernel": np.random.default_rng(3).standard_normal((1, 1, 1, 3), np.float32)},
    }
    whole = methods.quantized(params, codec)
    merged = merge(params)
    assert sorted(merged.tree) == ["a/kernel", "b/kernel", "d/kernel", LONG]
    packed = btc_jax.btc_quantize(merged.tree, policy=merged_policy(codec))
    for ours, theirs in zip(
        *map(jax.tree.leaves, (restore(merged, packed), btc_jax.btc_dequantize(whole.tree))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = layer_metrics(merged, packed, codec), whole.metrics
    assert theirs is not None
    assert (ours.bytes_before, ours.bytes_after) == (theirs.bytes_before, theirs.bytes_after)
    for one, other in zip(ours.leaves, theirs.leaves, strict=True):
        assert (one.path, one.reason, one.bytes_after) == (other.path, other.reason, other.bytes_after)
        if other.measures:
            assert vars(one.measures) == pytest.approx(vars(other.measures), rel=1e-5)


def test_blocks_that_would_cross_layers_are_refused():
    with pytest.raises(ValueError, match="block size 96 does not divide 256"):
        merged_policy(Uniform(96))


# Exams and experiments


def test_an_exam_counts_right_answers_and_compares_with_the_float_ones():
    inputs, labels = np.eye(4, dtype=np.float32), np.array([0, 1, 2, 0])
    known = Labelled("four", inputs, labels, 4)
    exam = exam_of({"kernel": 4 * jnp.eye(4)}, lambda p, x: x @ p["kernel"], known=known, compared=known)
    found = exam.figures({"kernel": 4 * jnp.eye(4)[:, np.array([1, 0, 2, 3])]})
    assert (found["accuracy"], found["agreement"], found["right"], found["known"]) == (0.25, 0.5, 1, "four")
    assert found["standard_error"] == pytest.approx(np.sqrt(0.25 * 0.75 / 4))
    assert found["kl"] > 0
    assert exam.figures(exam.params)["kl"] == pytest.approx(0.0, abs=1e-9)


def test_an_exam_without_images_measures_bits_only():
    found = rows.measure("BTC", exam_of({"kernel": 0.05 * jax.random.normal(jax.random.key(0), (32, 32))}))
    assert "accuracy" not in found
    assert "; " in found["note"]
    assert found["effective"] > found["payload"] >= 4


def test_the_search_says_what_broke(wine, monkeypatch):
    found = methods.METHODS["BTC"](wine.params, wine)
    size, _, why = found.note.partition("; ")
    assert why == "all hold" or " > 0.003" in why
    assert tree_digest(found.tree) == tree_digest(methods.swept(wine, Uniform(int(size))).tree)
    coarse = exam_of({"kernel": 0.049 * jax.random.normal(jax.random.key(0), (32, 32))})
    monkeypatch.setattr(methods, "MAX_RMSE", 1e-4)
    assert methods.METHODS["BTC"](coarse.params, coarse).note.startswith("32, and none holds: rmse 0.00")


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_quantizer_makes_a_row(wine, name):
    found = rows.measure(name, wine)
    assert found["method"] == name
    assert 0.8 < found["accuracy"] <= 1
    assert found["effective"] >= found["payload"]
    assert (found["rmse"] == 0) == (name == "float32")


def test_another_quantizer_is_one_entry(wine, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "BTC 64", lambda params, exam: methods.quantized(params, Uniform(64)))
    metrics = methods.swept(wine, Uniform(64)).metrics
    assert metrics is not None
    assert rows.measure("BTC 64", wine)["payload"] == pytest.approx(metrics.total.payload_bits)


def test_layers_come_in_the_order_of_use():
    network = NETWORKS["cifar10_shufflenetv2_x0_5"]
    shapes = network.shapes()
    statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["batch_stats"])
    exam = exam_of(shapes["params"], lambda params, x: network.apply({"params": params, "batch_stats": statistics}, x))
    exam.example = np.zeros((1, 32, 32, 3), np.uint8)
    order = experiments.layer_order(exam)
    assert order[0] == "first/conv/kernel"
    assert order[-1] == "classifier/kernel"
    assert len(order) == 57
    assert experiments.layer_order(exam) == order  # even if it was traced before
    layers = [{"wide": share} for share in (1.0, 0.5, 0.3, 0.1, 0.6)]
    expected = {"first": 1.0, "first three": 0.6, "middle": 0.3, "last": 0.6}
    assert experiments.shares(layers) == pytest.approx(expected)


def test_sweeps(wine, monkeypatch):
    monkeypatch.setattr(experiments, "THRESHOLDS", (0.02, 0.05))
    found = experiments.thresholds(wine)
    assert [row["threshold"] for row in found] == [0.02, 0.05]
    payload, error = ([row[name] for row in found] for name in ("payload", "rmse"))
    assert payload == sorted(payload, reverse=True)
    assert error == sorted(error)
    assert "accuracy" not in experiments.thresholds(wine, answers=False)[0]


# Training and the store


def test_the_mlp_learns_and_is_not_trained_twice(tmp_path, monkeypatch):
    table = bundled("Wine")
    exam = mlp_exam(table, Store(tmp_path))
    assert exam.accuracy(exam.params) > 0.95
    monkeypatch.setattr("examples.paper.mlp.train", lambda *_: pytest.fail("trained again"))
    again = mlp_exam(table, Store(tmp_path))
    assert tree_digest(again.params) == tree_digest(exam.params)


def test_rows_are_kept_until_what_they_depend_on_changes(tmp_path):
    made = []

    def compute():
        made.append(1)
        return {"value": float("inf"), "list": (1, 2)}

    for depends in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert Store(tmp_path).row("one/row", depends, compute) == {"value": None, "list": [1, 2]}
    assert len(made) == 2
    file = sorted(tmp_path.glob("one-row-*.json"))[0]
    assert json.loads(file.read_text())["name"] == "one/row"
    for broken in (b"", b"{", b"[]"):
        for path in tmp_path.glob("one-row-*.json"):
            path.write_bytes(broken)
        Store(tmp_path).row("one/row", {"a": 1}, compute)
    assert len(made) == 5


def test_an_interrupted_write_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    write_whole(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["row.json"]


def test_the_code_version_is_of_what_makes_rows(monkeypatch):
    before = code_version()
    code_version.cache_clear()
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, *a: read(p, *a) + ("#" if p.parent.name == "show" else ""))
    assert code_version() == before
    code_version.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda p, *a: read(p, *a) + ("#" if p.name == "uniform.py" else ""))
    assert code_version() != before
    code_version.cache_clear()


def test_digests_see_every_value():
    one = {"a": np.zeros(3, np.float32), "b": np.zeros(2)}
    assert tree_digest(one) == tree_digest({"b": one["b"].copy(), "a": one["a"].copy()})
    assert tree_digest(one) != tree_digest({"a": one["a"], "b": np.array([0.0, 1e-30])})
    assert tree_digest(one) != tree_digest({"a": one["a"].reshape(3, 1), "b": one["b"]})
