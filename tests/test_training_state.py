"""Optimizer states, moving averages and gradients stay dense, in trees of any kind and in files."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training import train_state
from safetensors.numpy import save_file

from btc_jax import Policy, Rule, Uniform, btc_plan, btc_quantize, is_packed, plan_file, quantize_file
from btc_jax.policy import BTCPolicyError

BIG = jax.ShapeDtypeStruct((64, 64), jnp.float32)
PARAMS = {"a": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}, "v": {"kernel": jnp.ones((64, 64))}}
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adamw, clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=32),
    "lion": optax.lion(1e-3),
    "adadelta": optax.adadelta(1e-3),
    "adagrad": optax.adagrad(1e-3),
    "amsgrad": optax.amsgrad(1e-3),
    "lbfgs": optax.lbfgs(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "masked": optax.masked(optax.adam(1e-3), {"a": {"kernel": True, "bias": False}, "v": {"kernel": True}}),
    "by label": optax.multi_transform(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1, 0.9)}, {"a": {"kernel": "adam", "bias": "sgd"}, "v": "sgd"}
    ),
    "accumulating": optax.MultiSteps(optax.adam(1e-3), 4),
    "lookahead": optax.contrib.schedule_free_adamw(1e-3),
}
DENSE = {"optimizer state", "moving average", "gradients"}


def reasons(tree, policy=None):
    return {row.path: row.reason for row in btc_plan(tree, policy=policy).rows}


def of_floats(tree):
    """The reasons for leaves that would be packed except for their role; L-BFGS starts with some that are one array."""
    rows = [row for row in btc_plan(tree).rows if not row.tied_to]
    return {row.path: row.reason for row in rows if row.dtype == "float32" and len(row.shape) > 1}


def paths_to(reason, tree):
    return {path for path, why in of_floats(tree).items() if why == reason}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(64, 64, rngs=rngs)
        self.v = nnx.Linear(64, 64, rngs=rngs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", ["bare", "train state", "state dict", "linen variables"])
def test_states_of_optax(name, form):
    tx = OPTIMIZERS[name]
    if form == "bare":
        tree = {"x": tx.init(PARAMS), "params": PARAMS}  # under an uninformative name
    elif form == "linen variables":
        tree = (
            {"params": PARAMS},
            tx.init({"params": PARAMS}) if name not in ("masked", "by label") else tx.init(PARAMS),
        )
    else:
        tree = train_state.TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
        tree = flax.serialization.to_state_dict(tree) if form == "state dict" else tree
    found = of_floats(tree)
    packed = {path for path, why in found.items() if why == "default"}
    assert {path.split("/", 1)[1].removeprefix("params/") for path in packed} == {"a/kernel", "v/kernel"}
    assert len(packed) == 2
    assert {why for path, why in found.items() if path not in packed} <= DENSE


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"masked", "by label"}))
def test_states_of_nnx(name):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)
    assert set(of_floats(nnx.state(optimizer)).values()) <= {"optimizer state", "gradients"}
    both = of_floats({"model": nnx.state(model), "other": nnx.state(optimizer)["opt_state"]})
    assert {path for path, why in both.items() if why == "default"} == {"model/a/kernel", "model/v/kernel"}


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "lion", "adadelta", "amsgrad", "accumulating", "injected"])
def test_bare_states_in_files_are_known_by_their_fields(name, tmp_path):
    """The containers are lost, and there is no `opt_state` above the fields."""
    state = flax.serialization.to_state_dict(OPTIMIZERS[name].init(PARAMS))
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.to_bytes(state))
    rows = plan_file(tmp_path / "x.msgpack").rows
    assert any(len(row.shape) > 1 for row in rows)
    assert all(row.reason in DENSE for row in rows if len(row.shape) > 1)


def test_a_step_of_orbax(tmp_path):
    state = train_state.TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=OPTIMIZERS["adam"])
    with orbax.checkpoint.PyTreeCheckpointer() as saver:
        saver.save(tmp_path / "step", flax.serialization.to_state_dict(state))
    rows = plan_file(tmp_path / "step", bits=4.5).rows
    assert {row.path for row in rows if row.codec} == {"params/a/kernel", "params/v/kernel"}
    assert {row.reason for row in rows if "/mu/" in row.path or "/nu/" in row.path} == {"optimizer state"}


def test_a_checkpoint_of_pytorch(tmp_path):
    names = ["model.fc.weight", "optimizer.state.0.exp_avg", "optimizer.state.0.exp_avg_sq", "ema_model.fc.weight"]
    names += ["model_ema.fc.weight", "fc.weight.grad", "state.1.momentum_buffer", "ema.fc.weight", "params_ema.weight"]
    rng = np.random.default_rng(0)
    save_file({name: rng.standard_normal((64, 64)).astype(np.float32) for name in names}, tmp_path / "x.safetensors")
    found = {row.path: row.reason for row in plan_file(tmp_path / "x.safetensors").rows}
    assert [found[name] for name in names] == [
        *("default", "optimizer state", "optimizer state", "moving average"),
        *("moving average", "gradients", "optimizer state", "moving average", "moving average"),
    ]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("ema_params/a/kernel", "moving average"),
        ("params_ema/a/kernel", "moving average"),
        ("state_dict_ema/a/kernel", "moving average"),
        ("ema_0.9999/a/kernel", "moving average"),
        ("swa_params/a/kernel", "moving average"),
        ("shadow_params/a/kernel", "moving average"),
        ("grads/a/kernel", "gradients"),
        ("grad/a/kernel", "gradients"),
        ("acc_grads/a/kernel", "gradients"),
        ("opt_states_0/no_prefix/m/params/a/kernel", "optimizer state"),
        ("critic_opt_state/0/mu/a/kernel", "optimizer state"),
        ("optimizer_state_dict/state/0/exp_avg", "optimizer state"),
        ("opt/0/mu/a/kernel", "optimizer state"),
        ("m/a/kernel", "optimizer state"),
        ("momentum/a/kernel", "optimizer state"),
    ],
)
def test_names_next_to_parameters(path, reason):
    leaves = {"params": {"a": {"kernel": BIG}}, path: BIG}
    assert of_floats(leaves) == {"params/a/kernel": "default", path: reason}


def test_what_an_optimizer_accumulates_or_averages_has_its_own_name():
    assert paths_to("gradients", OPTIMIZERS["accumulating"].init(PARAMS)) == {
        "acc_grads/a/kernel",
        "acc_grads/v/kernel",
    }
    assert paths_to("moving average", optax.ema(0.9).init(PARAMS)) == {"ema/a/kernel", "ema/v/kernel"}


class Moments(NamedTuple):
    """The state of a custom optimizer."""

    count: Any
    mu: Any
    nu: Any


def test_an_optimizer_of_ones_own_is_known_by_its_fields():
    state = Moments(jnp.int32(0), PARAMS, PARAMS)
    assert set(of_floats(jax.tree.map(jnp.copy, state)).values()) == {"optimizer state"}


MODELS = {
    "attention": ["attn/q/kernel", "attn/k/kernel", "attn/v/kernel"],
    "values first": ["v/kernel", "params/x/kernel"],
    "vae": ["encoder/mu/kernel", "encoder/logvar/kernel"],
    "normal-inverse-gamma head": ["mu/kernel", "nu/kernel", "alpha/kernel", "beta/kernel"],
    "vae as a list": ["0/mu/kernel", "1/logvar/kernel"],
    "names near those of gradients": ["grad_proj/kernel", "gradient_head/kernel", "layers/grad/kernel"],
    "names near those of averages": ["ema_gate/kernel", "schema/kernel", "encoder_swa/kernel", "layers/cinema/kernel"],
    "names near those of optimizers": ["optical_flow/kernel", "opt/decoder/kernel", "adapter/kernel", "tracer/kernel"],
    "a layer called trace": ["trace/kernel", "head/kernel"],
    "target networks": ["params/a/kernel", "target_params/a/kernel"],
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("separator", ["/", "."])
def test_layers_with_names_like_those_are_weights(name, separator):
    tree = {path.replace("/", separator): BIG for path in MODELS[name]}
    assert set(reasons(tree).values()) == {"default"}


def test_a_model_of_linen_with_such_layers():
    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(4, name="v")
            return nn.Dense(64, name="mu")(x) + nn.Dense(64, name="logvar")(x) + attention(x)

    params = jax.eval_shape(VAE().init, jax.random.key(0), jnp.ones((1, 64)))
    assert {path for path, why in reasons(params).items() if why == "default"} == {
        *("params/mu/kernel", "params/logvar/kernel"),
        *(f"params/v/{name}/kernel" for name in ("query", "key", "value", "out")),
    }


def test_they_take_no_part_in_sharing_out_bits():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)}
    state = train_state.TrainState.create(apply_fn=lambda: None, params=params, tx=OPTIMIZERS["adam"])
    alone, within = btc_quantize(params, bits=4), btc_quantize(state, bits=4)
    assert is_packed(within.params["kernel"])
    assert within.params["kernel"].nbytes == alone["kernel"].nbytes
    assert all(a is b for a, b in zip(jax.tree.leaves(within.opt_state), jax.tree.leaves(state.opt_state), strict=True))


def test_a_rule_can_ask_for_them():
    tree = {"params": {"kernel": BIG}, "ema_params": {"kernel": BIG}, "opt_state": {"mu": {"kernel": BIG}}}
    found = reasons(tree, Policy(rules=(Rule("ema_params/*"), Rule("*/mu/*", Uniform(32)))))
    assert found == {"params/kernel": "default", "ema_params/kernel": "rule 1", "opt_state/mu/kernel": "rule 2"}


def test_given_names_do_not_ask_for_them():
    tree = {"params": {"kernel": BIG}, "ema_params": {"kernel": BIG}}
    found = reasons(tree, Policy(names=("kernel",)))
    assert found == {"params/kernel": "default", "ema_params/kernel": "moving average"}


def test_a_model_of_which_only_an_average_is_there(tmp_path):
    """The error names two remedies; both work."""
    tree = {"params_ema": {"conv": {"weight": np.ones((64, 64), np.float32), "bias": np.ones(64, np.float32)}}}
    with pytest.raises(BTCPolicyError, match="2 x moving average") as caught:
        btc_quantize(tree)
    assert "'params_ema'" in str(caught.value)
    assert "Rule('params_ema*weight')" in str(caught.value)
    assert is_packed(btc_quantize(tree["params_ema"])["conv"]["weight"])
    packed = btc_quantize(tree, policy=Policy(rules=(Rule("params_ema*weight"),)))["params_ema"]["conv"]
    assert (is_packed(packed["weight"]), is_packed(packed["bias"])) == (True, False)
    save_file({"params_ema.conv.weight": tree["params_ema"]["conv"]["weight"]}, tmp_path / "x.safetensors")
    with pytest.raises(BTCPolicyError, match=r"Rule\('params_ema\*weight'\)"):
        quantize_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors")


def test_moments_of_a_train_state_in_training_pass_through():
    model, x = nn.Dense(64), jax.random.normal(jax.random.key(9), (16, 64))
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=optax.adam(1e-3)
    )

    def step(state):
        grads = jax.grad(lambda params: jnp.square(state.apply_fn({"params": params}, x)).mean())(state.params)
        return state.apply_gradients(grads=grads)

    with jax.numpy_dtype_promotion("standard"):
        state = step(step(state))
    before: Any = state.opt_state
    for bits in (4.5, None):
        packed: Any = btc_quantize(state, bits=bits)
        assert is_packed(packed.params["kernel"])
        assert packed.opt_state[0].nu["kernel"] is before[0].nu["kernel"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "optimizer state") for name in ("z", "m1", "accum", "fisher", "hessian", "prev", "delta", "updates")),
        *((name, "moving average") for name in ("polyak", "swa", "shadow", "lookahead", "averaged")),
        *((name, "default") for name in ("teacher", "target", "generator", "second")),
    ],
)
def test_what_mirrors_the_parameters_next_to_them(name, reason):
    leaves = {"encoder": {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32)}}
    rows = btc_plan({"params": leaves, name: leaves}).rows
    assert {row.path.split("/")[0]: row.reason for row in rows} == {"params": "default", name: reason}
    other = {"other": {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32)}}
    assert {row.reason for row in btc_plan({"params": leaves, name: other}).rows} == {"default"}  # a layer of that name
