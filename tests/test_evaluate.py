import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import Policy, Uniform, btc_dequantize, btc_evaluate, btc_logits, btc_quantize

EXAMPLES, FEATURES, CLASSES = 10, 6, 7


def identity(params, x):
    """A model whose logits are its inputs."""
    return x


def linear(params, x):
    return x @ params["kernel"]


def problem(seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((EXAMPLES, CLASSES)).astype(np.float32)
    return logits, rng.integers(0, CLASSES, EXAMPLES)


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]


def rank_of_label(logits, labels):
    """How many classes have a larger logit than the label."""
    return np.array([np.sum(row > row[label]) for row, label in zip(logits, labels, strict=True)])


def assert_figures(evaluation, logits, labels, k, reference=None):
    rows = range(len(labels))
    assert evaluation.examples == len(labels)
    assert evaluation.k == k
    assert evaluation.top1 == np.mean(rank_of_label(logits, labels) < 1)
    assert evaluation.topk == np.mean(rank_of_label(logits, labels) < k)
    expected = -np.mean(log_probabilities(logits)[rows, labels])
    assert evaluation.cross_entropy == pytest.approx(expected, rel=1e-6)
    if reference is None:
        assert evaluation.agreement is evaluation.kl is None
        return
    p, q = np.exp(log_probabilities(reference)), np.exp(log_probabilities(logits))
    kl = np.mean([sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)])
    assert evaluation.kl == pytest.approx(kl, rel=1e-6, abs=1e-12)
    assert evaluation.agreement == np.mean(
        [np.argmax(a) == np.argmax(b) for a, b in zip(reference, logits, strict=True)]
    )


@given(st.integers(0, 10**6), st.sampled_from([0.1, 2.0, 30.0]), st.sampled_from([1, 2, 5, 7]))
@settings(deadline=None, max_examples=20)
def test_figures_are_those_of_numpy(seed, spread, k):
    logits, labels = problem(seed, spread)
    reference = logits + problem(seed + 1, 0.5)[0]
    found = btc_evaluate(identity, {}, logits, labels, reference=reference, top_k=k)
    assert_figures(found, logits, labels, k, reference)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 11, 256])
def test_batches_of_any_size_give_the_same_answers(batch_size):
    logits, labels = problem()
    assert_figures(btc_evaluate(identity, {}, logits, labels, batch_size=batch_size), logits, labels, 5)
    np.testing.assert_array_equal(btc_logits(identity, {}, logits, batch_size=batch_size), logits)


@pytest.mark.parametrize(("batch_size", "expected"), [(4, 4), (256, EXAMPLES)])
def test_a_model_is_compiled_for_one_batch_size(batch_size, expected):
    traced = []

    def watched(params, x):
        traced.append(x.shape[0])
        return x

    btc_logits(watched, {}, problem()[0], batch_size=batch_size)
    assert traced == [expected]


def test_inputs_may_be_a_pytree():
    logits, labels = problem()
    inputs = {"image": logits[:, :3], "rest": [jnp.asarray(logits[:, 3:]), np.arange(EXAMPLES)]}

    def join(params, x):
        return jnp.concatenate([x["image"], x["rest"][0]], axis=1) + params["bias"]

    found = btc_evaluate(join, {"bias": jnp.float32(1)}, inputs, labels, batch_size=4)
    assert_figures(found, logits + 1, labels, 5)


@pytest.mark.parametrize("kind", [list, jnp.asarray, np.uint8, np.int64])
def test_labels_of_any_integer_kind(kind):
    logits, labels = problem()
    assert_figures(btc_evaluate(identity, {}, logits, kind(labels)), logits, labels, 5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logits_of_half_precision_are_returned_in_float32(dtype):
    logits, labels = problem()
    rounded = np.asarray(logits.astype(dtype), np.float32)
    found = btc_logits(lambda params, x: x.astype(dtype), {}, logits)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rounded)
    assert_figures(btc_evaluate(identity, {}, rounded, labels), rounded, labels, 5)


def test_k_is_at_most_the_number_of_classes():
    logits, labels = problem()
    found = btc_evaluate(identity, {}, logits, labels, top_k=100)
    assert (found.k, found.topk) == (CLASSES, 1.0)


@given(st.integers(0, 10**6), st.integers(1, 7))
@settings(deadline=None, max_examples=25)
def test_ties_never_make_topk_less_than_top1(seed, k):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 2, (EXAMPLES, CLASSES)).astype(np.float32)
    labels = logits.argmax(1)
    found = btc_evaluate(identity, {}, logits, labels, top_k=k)
    assert found.top1 == 1
    assert found.topk == 1


def test_large_logits_do_not_overflow():
    logits, labels = problem(spread=1e30)
    found = btc_evaluate(identity, {}, logits, labels, reference=logits)
    assert found.cross_entropy is not None
    assert math.isfinite(found.cross_entropy)
    assert (found.agreement, found.kl) == (1, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_makes_every_figure_nan(bad):
    logits, labels = problem()
    broken = logits.copy()
    broken[4, 3] = bad
    found = btc_evaluate(identity, {}, broken, labels, reference=logits)
    assert found.examples == EXAMPLES
    figures = (found.top1, found.topk, found.cross_entropy, found.agreement, found.kl)
    assert all(figure is not None and math.isnan(figure) for figure in figures)
    found = btc_evaluate(identity, {}, broken, labels)
    assert found.agreement is found.kl is None
    assert found.top1 is not None
    assert math.isnan(found.top1)


def test_a_nan_in_the_reference_is_no_agreement():
    logits, labels = problem()
    reference = np.full_like(logits, np.nan)
    found = btc_evaluate(identity, {}, logits, labels, reference=reference)
    assert found.agreement is not None
    assert math.isnan(found.agreement)
    assert found.top1 == np.mean(rank_of_label(logits, labels) < 1)


def test_a_class_masked_by_minus_infinity_counts_for_nothing():
    logits, labels = problem()
    reference = logits + problem(1)[0]
    plain = btc_evaluate(identity, {}, logits, labels, reference=reference)
    mask = np.full((EXAMPLES, 1), -np.inf, np.float32)
    masked = btc_evaluate(identity, {}, np.hstack([logits, mask]), labels, reference=np.hstack([reference, mask]))
    assert masked.cross_entropy == pytest.approx(plain.cross_entropy)
    assert masked.kl == pytest.approx(plain.kl)
    assert (masked.top1, masked.agreement) == (plain.top1, plain.agreement)


def test_packed_parameters_answer_like_their_decoded_ones():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((FEATURES, CLASSES)).astype(np.float32)}
    inputs = rng.standard_normal((EXAMPLES, FEATURES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, EXAMPLES)
    packed = btc_quantize(params, policy=Policy(Uniform(32), names=("*",), min_size=0))
    reference = btc_logits(linear, params, inputs)
    np.testing.assert_allclose(reference, inputs @ params["kernel"], atol=1e-5)
    expected = inputs.astype(np.float64) @ np.asarray(btc_dequantize(packed)["kernel"], np.float64)
    found = btc_evaluate(linear, packed, inputs, labels, reference=reference, top_k=2)
    assert found.kl is not None
    assert found.kl > 0
    np.testing.assert_allclose(btc_logits(linear, packed, inputs), expected, atol=1e-5)
    assert_figures(found, btc_logits(linear, packed, inputs), labels, 2, reference)


def test_dense_parameters_agree_with_themselves():
    logits, labels = problem()
    found = btc_evaluate(identity, {}, logits, labels, reference=btc_logits(identity, {}, logits))
    assert (found.agreement, found.kl) == (1, 0)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (np.zeros(9, int), ("labels", "(9,)", "(10,)")),
        (np.zeros((10, 1), int), ("labels", "(10, 1)", "(10,)")),
        (np.zeros((10, 7), int), ("labels", "(10, 7)", "(10,)")),
        (np.zeros(10), ("labels", "float64", "integers in 0..6")),
        (np.full(10, 7), ("labels", "7..7", "0..6")),
        (np.full(10, -1), ("labels", "-1..-1", "0..6")),
    ],
)
def test_labels_that_do_not_fit(labels, parts):
    with pytest.raises(ValueError, match="labels") as caught:
        btc_evaluate(identity, {}, problem()[0], labels)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("shape", [(9, 7), (10, 6), (10,)])
def test_reference_that_does_not_fit(shape):
    logits, labels = problem()
    with pytest.raises(ValueError, match="reference has shape") as caught:
        btc_evaluate(identity, {}, logits, labels, reference=np.zeros(shape))
    assert str(shape) in str(caught.value)
    assert "(10, 7)" in str(caught.value)


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_below_1(k):
    logits, labels = problem()
    with pytest.raises(ValueError, match="top_k"):
        btc_evaluate(identity, {}, logits, labels, top_k=k)


@pytest.mark.parametrize(
    ("inputs", "batch_size", "match"),
    [
        (np.zeros((0, 3), np.float32), 4, "0 examples"),
        (np.zeros((5, 3), np.float32), 0, "batches of 0"),
        (np.zeros((5, 3), np.float32), -2, "batches of -2"),
        ({"a": np.zeros((5, 3)), "b": np.zeros((4, 3))}, 4, r"4, 5.*same first axis"),
        ([], 4, "no array|no example|0 examples|empty"),
        (np.float32(1), 4, "first axis"),
    ],
)
def test_inputs_that_do_not_fit(inputs, batch_size, match):
    with pytest.raises(ValueError, match=match):
        btc_logits(identity, {}, inputs, batch_size=batch_size)


@pytest.mark.parametrize(
    "apply",
    [
        lambda params, x: x[:, 0],
        lambda params, x: x.sum(),
        lambda params, x: x[:2],
        lambda params, x: (x, {"batch_stats": x}),
        lambda params, x: {"logits": x},
    ],
)
def test_apply_that_returns_something_else(apply):
    with pytest.raises(ValueError, match=r"apply returned.*\[batch, ..., classes\]"):
        btc_logits(apply, {}, problem()[0])


def test_without_labels_only_the_reference_is_compared_with():
    logits, labels = problem()
    reference = logits[::-1]
    whole, found = btc_evaluate(identity, {}, logits, labels, reference=reference), None
    found = btc_evaluate(identity, {}, logits, reference=reference)
    assert (found.kl, found.agreement, found.examples) == (whole.kl, whole.agreement, EXAMPLES)
    assert found.top1 is found.topk is found.cross_entropy is None
    with pytest.raises(ValueError, match=r"neither labels nor a reference.*reference=btc_logits"):
        btc_evaluate(identity, {}, logits)


def test_each_position_of_a_text_is_an_answer():
    logits, labels = problem()
    reference = logits[::-1]
    flat = btc_evaluate(identity, {}, logits, labels, reference=reference)
    texts = [array.reshape(EXAMPLES // 2, 2, *array.shape[1:]) for array in (logits, labels, reference)]
    assert btc_evaluate(identity, {}, texts[0], texts[1], reference=texts[2]) == flat
    assert btc_logits(identity, {}, texts[0]).shape == texts[0].shape
    with pytest.raises(ValueError, match=r"labels have shape .* examples need \("):
        btc_evaluate(identity, {}, texts[0], labels)


def test_progress_is_silent_where_there_is_no_terminal(capfd):
    btc_logits(identity, {}, problem()[0], batch_size=2, progress=True)
    assert capfd.readouterr() == ("", "")
