"""The benchmark of answers: all sides quantize the same weights in the same draws, and its tables show who is ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks import sides
from benchmarks.answers_figure import draw
from benchmarks.answers_tables import markdown, summaries
from benchmarks.exams import Answers, Exam
from benchmarks.peers import Peer
from benchmarks.sides import OURS, Kept, Permuted, of_peer, ours, quantized_paths
from btc_jax.tree import flatten

RNG = np.random.default_rng(0)


def kernel(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32) / 8


def tiny():
    params = {"first": {"kernel": kernel(16, 64), "bias": kernel(64)}, "out.weight": kernel(10, 64)}

    def apply(params, x):
        hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
        return hidden @ params["out.weight"].T

    inputs = RNG.standard_normal((70, 16)).astype(np.float32)
    labels = np.asarray(apply(params, inputs).argmax(1))
    return Exam("tiny", params, apply, inputs, labels, draws=2)


EXAM = tiny()


def coarse(seen):
    def reconstruct(leaf):
        seen.append(leaf.shape)
        return np.round(leaf * 64) / 64, 5 * leaf.size

    return Peer("coarse", "coarse", reconstruct, "1.0")


def test_answers_of_the_network_itself():
    assert EXAM.answers(EXAM.params) == Answers(kl=0, worst=0, agreement=1, score=1)


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_permutations_come_back_exactly(draw):
    permuted = Permuted(EXAM.params, quantized_paths(EXAM), draw)
    before, after, back = (flatten(tree) for tree in (EXAM.params, permuted.tree, permuted.back(permuted.tree)))
    for path, a, b, c in zip(before[0], before[1], after[1], back[1], strict=True):
        assert np.array_equal(a, c)
        assert np.array_equal(a, b) == (draw == 0 or path not in quantized_paths(EXAM))


def test_all_sides_quantize_the_same_weights_and_count_them():
    seen = []
    theirs, mine = of_peer(EXAM, coarse(seen)), ours(EXAM, "by shape", 5.0)
    assert quantized_paths(EXAM) == {"first/kernel", "out.weight"}
    assert set(seen) == {(64, 16), (10, 64)}  # both in PyTorch's layout
    assert theirs["effective"] == 5.0
    assert 4.9 < mine["effective"] <= 5.0
    for row in (theirs, mine):
        assert row["KL"] > 0
        assert row["KL"] < row["worst KL"]
        assert 20 < row["SQNR dB"] < 40


def test_rows_are_kept(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"name": "x", "KL": 1.0}

    for folder, exam in ((tmp_path, EXAM), (tmp_path, EXAM), (tmp_path, dataclasses.replace(EXAM, draws=1))):
        Kept(folder).row(exam, "key", compute)
    assert len(calls) == 2
    Kept(tmp_path, refresh=True).row(EXAM, "key", compute)
    assert len(calls) == 3


def rows(factor):
    """Rows as measured: `equal` has a KL of 1, those by shape `factor`, and llama.cpp 0.5."""
    kl = dict(zip(OURS, (1.0, factor, factor / 2, factor / 4), strict=True))
    figures = {"worst KL": 1.0, "agreement": 1.0, "score": 1.0, "SQNR dB": 20.0}
    for bits, name in ((3.4375, "Q3_K"), (4.5, "Q4_K"), (5.5, "Q5_K")):
        yield {"name": f"llama.cpp {name}", "effective": bits, "KL": 0.5, **figures}
        for side, value in kl.items():
            yield {"name": f"btc_jax, {side}", "budget": bits, "effective": bits, "KL": value, **figures}


def test_tables_and_figure(tmp_path):
    results = {"minilm": list(rows(0.4)), "resnet20-paper": list(rows(0.9)), "babyllama": list(rows(0.1))}
    ratios, against = summaries(results).values()
    row = next(row for row in ratios if row["name"] == "btc_jax, by shape")
    assert row["all"] == pytest.approx((0.4 * 0.9 * 0.1) ** (1 / 3))
    assert row["transformers"] == pytest.approx(0.2)
    assert (row["worst"], row["worst of"]) == (0.9, "resnet20-paper")
    row = next(row for row in against if row["bits"] == "4.5")
    assert row["resnet20-paper"] == pytest.approx(1.8)
    head, line, *body = markdown(results).splitlines()
    assert {text.count("|") for text in (head, line, *body)} == {head.count("|")}
    assert len(body) == 9
    draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_every_exam_names_what_is_missing(tmp_path):
    from benchmarks.exams import available

    told = []
    found = list(available(["resnet20", "mlp-letter", "babyllama"], told.append, tmp_path))
    assert not found
    assert all("left out" in line for line in told)
    assert len(told) == 3
    with pytest.raises(ValueError, match="there is no network resnet21"):
        list(available(["resnet21"]))


def test_every_way_of_sharing_is_one():
    for name in OURS:
        sensitivity = OURS[name](EXAM)
        assert isinstance(sensitivity, str) or jax.tree.structure(sensitivity) == jax.tree.structure(EXAM.params)
    assert sides.sensitivities(EXAM, real=True) is sides.sensitivities(EXAM, real=True)
