"""`btc_sensitivity` equals the Fisher information by hand, for every head and kind of tree; errors name bad input."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from rich.console import Console

from btc_jax import _progress, btc_quantize, btc_sensitivity, load, save
from btc_jax.metrics import dict_of as by_path
from btc_jax.sensitivity import squares_of
from tests.test_multilevel import unchecked

RNG = np.random.default_rng(0)


class MLP(linen.Module):
    """Two layers, and numbers or logits of 5 classes."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(5)(jnp.tanh(linen.Dense(7)(x)))


MODEL = MLP()
PARAMS = MODEL.init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
INPUTS = RNG.standard_normal((6, 3)).astype(np.float32)


def apply(params, x):
    return MODEL.apply({"params": params}, x)


def fisher(weights):
    """Of logits `x @ weights`, for each input, summed over the labels by hand: `sum p_y (e_y - p)^2 x^2`, in numpy."""
    logits = INPUTS.astype(np.float64) @ weights
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    # d log p_y / d w[i, c] = x_i (1[c = y] - p_c), whose square has the mean x_i^2 p_c (1 - p_c).
    return np.mean(np.square(INPUTS)[:, :, None] * (p * (1 - p))[:, None, :], axis=0)


class TestOracle:
    """Many copies of the inputs, so that sampled labels approach their mean."""

    weights = RNG.standard_normal((3, 4)).astype(np.float32)
    many = np.tile(INPUTS, (400, 1))

    def test_classification(self):
        found = btc_sensitivity(lambda p, x: x @ p["w"], {"w": self.weights}, self.many, batch_size=1)["w"]
        assert found == pytest.approx(fisher(self.weights).mean(), rel=0.05)
        assert (type(found), found.dtype) == (np.float32, np.float32)

    def test_a_batch_has_the_same_mean(self):
        found = btc_sensitivity(lambda p, x: x @ p["w"], {"w": self.weights}, self.many, batch_size=8)["w"]
        assert found == pytest.approx(fisher(self.weights).mean(), rel=0.15)

    def test_next_token_is_for_each_token(self):
        def logits(p, x):
            return x.reshape(x.shape[0] // 1, 1, 3).repeat(4, 1) @ p["w"]

        found = btc_sensitivity(logits, {"w": self.weights}, self.many)["w"]
        assert found == pytest.approx(fisher(self.weights).mean(), rel=0.05)

    def test_regression(self):
        found = btc_sensitivity(lambda p, x: x @ p["w"], {"w": self.weights}, self.many, head="regression")["w"]
        assert found == pytest.approx(np.square(INPUTS).mean(), rel=0.05)  # each output: x_i^2, with a variance of 1

    def test_a_loss_of_ones_own(self):
        labels = RNG.standard_normal((6, 4)).astype(np.float32)

        def loss(p, examples):
            x, y = examples
            return jnp.sum((x @ p["w"] - y) ** 2, axis=1)

        found = btc_sensitivity(loss, {"w": self.weights}, (INPUTS, labels), head="loss", batch_size=4)["w"]
        gradients = 2 * INPUTS[:, :, None] * (INPUTS @ self.weights - labels)[:, None, :]
        assert found == pytest.approx(np.square(gradients).mean(), rel=1e-4)

    def test_it_predicts_the_divergence(self):
        """KL is about half the sum of sensitivity times squared errors."""
        error = 1e-2 * np.random.default_rng(1).standard_normal(self.weights.shape).astype(np.float32)
        log_p, log_q = (jax.nn.log_softmax(INPUTS @ w) for w in (self.weights, self.weights + error))
        kl = float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)))
        predicted = np.sum(np.square(error) * fisher(self.weights)) / 2
        assert 0.3 < predicted / kl < 3


class TestTrees:
    def test_linen(self):
        found = btc_sensitivity(apply, PARAMS, INPUTS)
        assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
        assert min(jax.tree.leaves(found)) > 0

    def test_nnx(self):
        model = nnx.Linear(3, 50, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)
        found = btc_sensitivity(lambda s, x: nnx.merge(graphdef, s)(x), state, INPUTS)
        assert by_path(found).keys() == by_path(state).keys()
        assert all(value > 0 for value in by_path(found).values())
        assert btc_quantize(state, bits=6, sensitivity=found)

    def test_integers_and_keys_have_none(self):
        params = {"w": np.ones((3, 4), np.float32), "steps": jnp.int32(3), "key": jax.random.key(0), "name": "net"}
        found = btc_sensitivity(lambda p, x: x @ p["w"], params, INPUTS)
        assert found.pop("w") > 0
        assert found == {"steps": 0, "key": 0, "name": 0}

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        params, inputs = jax.tree.map(lambda x: x.astype(dtype), PARAMS), INPUTS.astype(dtype)
        half, whole = (by_path(btc_sensitivity(apply, *pair)) for pair in ((params, inputs), (PARAMS, INPUTS)))
        assert all(half[path] == pytest.approx(whole[path], rel=0.5) for path in whole)

    def test_tied_leaves_count_once_with_the_gradient_of_both(self):
        table = RNG.standard_normal((4, 4)).astype(np.float32)
        inputs = RNG.standard_normal((6, 4)).astype(np.float32)

        def loss(p, x):
            return jnp.sum(x @ p["a"] + x @ p["b"], axis=1)

        tied = btc_sensitivity(loss, {"a": table, "b": table}, inputs, head="loss")
        apart = btc_sensitivity(loss, {"a": table, "b": table.copy()}, inputs, head="loss")
        assert tied["a"] == tied["b"] == pytest.approx(4 * apart["a"])

    def test_random_inputs_need_no_data(self):
        shape = jax.ShapeDtypeStruct((32, 3), jnp.float32)
        found = [by_path(btc_sensitivity(apply, PARAMS, shape, seed=seed)) for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]

    def test_random_tokens(self):
        table = RNG.standard_normal((11, 3)).astype(np.float32)
        shape = jax.ShapeDtypeStruct((16, 5), jnp.int32)
        found = btc_sensitivity(lambda p, ids: jnp.asarray(p["t"])[ids] @ p["t"].T, {"t": table}, shape, vocabulary=11)
        assert found["t"] > 0

    def test_inputs_that_the_leaves_tell(self):
        linear = {"a": {"kernel": np.ones((3, 4), np.float32)}, "b": {"kernel": np.ones((4, 2), np.float32)}}
        seen = []

        def apply(p, x):
            seen.append((x.shape[1:], x.dtype.name))
            return x @ p["a"]["kernel"] @ p["b"]["kernel"]

        assert btc_sensitivity(apply, linear)["a"]["kernel"] >= 0
        assert seen[-1] == ((3,), "float32")
        table = {"embed": {"embedding": RNG.standard_normal((11, 3)).astype(np.float32)}}
        found = btc_sensitivity(
            lambda p, ids: jnp.asarray(p["embed"]["embedding"])[ids] @ p["embed"]["embedding"].T, table
        )
        assert found["embed"]["embedding"] > 0

    def test_arrays_and_shapes_together(self):
        def masked(p, inputs):
            return (inputs["x"] * inputs["mask"]) @ p["w"]

        inputs = {"x": jax.ShapeDtypeStruct((6, 3), jnp.float32), "mask": np.zeros((6, 3), np.float32)}
        assert btc_sensitivity(masked, {"w": np.ones((3, 4), np.float32)}, inputs)["w"] == 0

    def test_one_program_whatever_the_number_of_examples(self):
        calls = []

        def counted(p, x):
            calls.append(x.shape)
            return x @ p["w"]

        btc_sensitivity(counted, {"w": np.ones((3, 4), np.float32)}, INPUTS)
        assert len(calls) <= 3  # its shape, its value, and the gradient's trace


def test_a_file_keeps_them(tmp_path):
    found = btc_sensitivity(apply, PARAMS, INPUTS)
    save(tmp_path / "sensitivity.safetensors", found)
    assert (tmp_path / "sensitivity.safetensors").stat().st_size < 2000
    assert by_path(load(tmp_path / "sensitivity.safetensors")) == by_path(found)


def test_progress_is_shown_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(_progress, "Console", lambda **_: Console(file=screen, force_terminal=True))
    btc_sensitivity(apply, PARAMS, INPUTS, progress=True)
    assert "measuring sensitivities" in screen.getvalue()


def test_memory_is_that_of_one_gradient():
    size = 2**20
    params = {"a": np.ones((1024, 1024), np.float32), "b": np.ones((1024, 1024), np.float32)}

    def deep(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    step = jax.jit(squares_of(deep, "classification"))
    memory = step.lower(params, np.ones((1, 1024), np.float32), jax.random.key(0)).compile().memory_analysis()
    assert memory
    assert memory.temp_size_in_bytes < 2.1 * 4 * size


class TestErrors:
    PARAMS = {"layer": {"w": np.ones((3, 4), np.float32)}}  # noqa: RUF012

    def refused(self, message, apply=lambda p, x: x @ p["layer"]["w"], inputs: Any = INPUTS, params=None, **options):
        with pytest.raises(ValueError, match=message):
            btc_sensitivity(apply, params or self.PARAMS, inputs, **options)

    def test_outputs_that_fit_no_head(self):
        images = r"apply returns float32 of shape \(1, 2, 2, 3\) for one example; .*for head='regression'"
        self.refused(images, lambda p, x: jnp.broadcast_to(x, (1, 2, 2, 3)))
        self.refused(r"returns float32 of shape \(4,\).*'classification'", lambda p, x: (x @ p["layer"]["w"])[0])
        self.refused(r"returns float32 of shape \(1, 1\)", lambda p, x: x @ p["layer"]["w"][:, :1])
        self.refused(r"returns int32 of shape \(1, 4\)", lambda p, x: (x @ p["layer"]["w"]).astype(jnp.int32))
        self.refused("returns tuple for one example", lambda p, x: (x, x))
        self.refused(r"shape \(1, 4\).*\[batch\] for head='loss'", head="loss")
        with pytest.raises(ValueError, match="head is 'softmax'; it can be 'classification', "):
            unchecked(btc_sensitivity)(lambda p, x: x @ p["layer"]["w"], self.PARAMS, INPUTS, head="softmax")

    def test_inputs_of_another_shape(self):
        self.refused(r"apply does not take inputs of float32\[1, 5\]: .*3", inputs=np.ones((2, 5), np.float32))

    def test_integers_without_a_vocabulary(self):
        self.refused("vocabulary is None; give the number of tokens", inputs=jax.ShapeDtypeStruct((2, 5), jnp.int32))
        shape = jax.ShapeDtypeStruct((2, 5), jnp.bool_)
        self.refused("inputs hold bool of shape .* which cannot be; give an array", inputs=shape)

    def test_inputs_that_the_leaves_do_not_tell(self):
        several = {"a": np.ones((3, 4), np.float32), "b": np.ones((4, 3), np.float32)}
        with pytest.raises(ValueError, match=r"examples of shapes \[3\] and \[4\] both fit .*inputs=jax.ShapeDtypeStr"):
            btc_sensitivity(lambda p, x: x + p["a"].sum(), several)
        with pytest.raises(ValueError, match="no shape that was tried fits the model; give its shape"):
            btc_sensitivity(lambda p, x: x["mask"] @ p["a"], several)

    def test_no_inputs(self):
        self.refused("inputs hold no array", inputs={})
        self.refused("0 examples", inputs=np.ones((0, 3), np.float32))
        self.refused("in batches of 0", batch_size=0)

    def test_gradients_that_are_not_finite(self):
        params = {"layer": {"w": np.full((3, 4), np.nan, np.float32)}}
        self.refused("layer/w: the gradient holds NaN or infinity", params=params)

    def test_trees_without_weights(self):
        self.refused("no floating leaf", params={"a": np.arange(3)})
        packed = btc_quantize({"layer": {"w": np.ones((64, 64), np.float32)}})
        self.refused(r"layer/w is packed.*btc_dequantize\(tree\)", params=packed)
