import contextlib
import dataclasses
import re
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from btc_jax import (
    Multilevel,
    Policy,
    Rule,
    Uniform,
    btc_allocate,
    btc_metrics,
    btc_plan,
    btc_quantize,
    btc_reconstruct,
    btc_search,
    is_packed,
    plan_file,
    quantize_file,
)
from btc_jax.policy import BTCPolicyError, LeafSpec
from btc_jax.policy.rules import first_matches

BIG = jax.ShapeDtypeStruct((64, 64), jnp.float32)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 64)(tokens)
        x = nn.Conv(32, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(8)(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs, dropout):
        self.embed = nnx.Embed(64, 64, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs) if dropout else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Pair(NamedTuple):
    kernel: Any
    scale: Any


def linen_variables():
    return jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros((1, 4, 4), jnp.int32))


def rows(tree, policy=None):
    return {row.path: row for row in btc_plan(tree, policy=policy).rows}


def reasons(tree, policy=None):
    return {path: row.reason for path, row in rows(tree, policy).items()}


def refusal(tree, *rules, **fields):
    with pytest.raises(BTCPolicyError) as caught:
        btc_plan(tree, policy=Policy(rules=rules, **fields))
    return str(caught.value)


@contextlib.contextmanager
def as_users_run_it():
    """Without the test run's type checks, which would precede the package's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_default_takes_the_kernels_and_embeddings_of_linen_params():
    assert reasons(linen_variables()["params"]) == {
        "BatchNorm_0/bias": "bias",
        "BatchNorm_0/scale": "norm",
        "Conv_0/bias": "bias",
        "Conv_0/kernel": "default",
        "Dense_0/bias": "bias",
        "Dense_0/kernel": "default",
        "Embed_0/embedding": "default",
    }


def test_default_leaves_linen_state_dense_whatever_its_names():
    variables = linen_variables() | {"cache": {"kernel": BIG}, "intermediates": {"embedding": BIG}}
    found = reasons(variables)
    assert found["batch_stats/BatchNorm_0/mean"] == found["batch_stats/BatchNorm_0/var"] == "batch_stats"
    assert (found["cache/kernel"], found["intermediates/embedding"]) == ("cache", "intermediates")
    assert found["params/Conv_0/kernel"] == "default"


def test_a_rule_overrides_size_name_and_state():
    tree = {"batch_stats": {"mean": BIG}, "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert reasons(tree, Policy(rules=(Rule("*", Uniform()),))) == {"batch_stats/mean": "rule 1", "bias": "rule 1"}


def test_nnx_paths_end_with_the_layer_and_not_with_value():
    state = nnx.split(NNXNet(nnx.Rngs(0), dropout=False))[1]
    assert reasons(state) == {
        "embed/embedding": "default",
        "layers/0/bias": "bias",
        "layers/0/kernel": "default",
        "layers/1/bias": "bias",
        "layers/1/kernel": "default",
        "norm/bias": "bias",
        "norm/mean": "statistics",
        "norm/scale": "norm",
        "norm/var": "statistics",
    }


def test_nnx_state_with_the_random_keys_of_dropout():
    state = nnx.split(NNXNet(nnx.Rngs(0), dropout=True))[1]
    found = reasons(state)
    assert found["dropout/rngs/count"] == "integer"
    assert "key" in found["dropout/rngs/key"]
    leaves = btc_metrics(state, btc_quantize(state)).leaves
    assert {leaf.path for leaf in leaves if leaf.measures} == {"embed/embedding", "layers/0/kernel", "layers/1/kernel"}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ([{"kernel": BIG}, {"kernel": BIG}], {"0/kernel": "default", "1/kernel": "default"}),
        (({"w": BIG}, [{"embedding": BIG}]), {"0/w": "default", "1/0/embedding": "default"}),
        (Layer(BIG, jnp.zeros(3)), {"kernel": "default", "bias": "bias"}),
        ({"a": Pair(BIG, 1.0)}, {"a/kernel": "default", "a/scale": "not an array"}),
        (BIG, {"": "default"}),
    ],
)
def test_containers_of_any_kind(tree, expected):
    assert reasons(tree) == expected


def test_an_item_of_a_list_has_no_name_and_is_decided_by_its_axes():
    vector = jax.ShapeDtypeStruct((8192,), jnp.float32)
    assert reasons([BIG, vector, {"bias": [BIG]}]) == {"0": "default", "1": "fewer than 2 axes", "2/bias/0": "bias"}


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "reason"),
    [
        ("a/kernel", (64, 64), "float32", "default"),
        ("a/kernel", (64, 64), "bfloat16", "default"),
        ("a/kernel", (64, 64), "float16", "default"),
        ("a/kernel", (4096,), "float32", "fewer than 2 axes"),
        ("a/kernel", (), "float32", "fewer than 2 axes"),
        ("a/kernel", (8, 8), "float32", "default"),
        ("a/kernel", (3, 3), "float32", "would not become smaller"),
        ("a/kernel", (8, 8), "bfloat16", "would not become smaller"),
        ("a/kernel", (0, 64), "float32", "empty"),
        ("a/kernel", (2**20, 2**20), "float32", "default"),
        ("a/bias", (64, 64), "float32", "bias"),
        ("a/bias", (64,), "float32", "bias"),
        ("a/my_kernel", (64, 64), "float32", "default"),
        ("a/kernel", (64, 64), "int8", "integer"),
        ("a/kernel", (64, 64), "uint32", "integer"),
        ("a/kernel", (64, 64), "bool", "bool"),
        ("a/kernel", (64, 64), "complex64", "complex"),
    ],
)
def test_reason_of_a_leaf(path, shape, dtype, reason):
    (decision,) = Policy().decide([LeafSpec(path, shape, jnp.dtype(dtype))])
    assert (decision.reason, decision.codec) == (reason, Uniform() if reason == "default" else None)


def test_packed_leaves_stay_as_they_are_even_under_a_rule():
    packed = btc_quantize({"kernel": np.zeros((64, 64), np.float32)})
    assert reasons(packed) == {"kernel": "already quantized"}
    everything = Policy(rules=(Rule("*", Uniform(32)),))
    assert btc_quantize(packed, policy=everything)["kernel"] is packed["kernel"]


def test_narrower_defaults():
    tree = {"w": BIG, "wide": {"kernel": BIG}, "b": jax.ShapeDtypeStruct((8192,), jnp.float32)}
    policy = Policy(names=("w", "b"), min_axes=1, min_size=5000)
    assert reasons(tree, policy) == {"w": "too small", "wide/kernel": "not in names", "b": "default"}
    assert set(reasons(tree, Policy(names=("*",), min_axes=1)).values()) == {"default"}
    assert reasons(tree, Policy(min_axes=1))["b"] == "bias"


def test_one_name_may_be_a_plain_string():
    with as_users_run_it():
        assert Policy(names="w").names == ("w",)  # pyright: ignore[reportArgumentType]


def test_order_follows_the_name_unless_given():
    tree = {"embedding": BIG, "kernel": BIG, "x": {"embedding": BIG, "kernel": BIG}}
    rules = (Rule("x/embedding", Uniform(32)), Rule("x/kernel", Uniform(32), "stored"))
    orders = {path: row.order for path, row in rows(tree, Policy(rules=rules)).items()}
    assert orders == {
        "embedding": "stored",
        "kernel": "output-major",
        "x/embedding": "stored",
        "x/kernel": "stored",
    }


def test_order_of_the_policy_holds_where_the_rule_does_not_say():
    tree = {"embedding": BIG, "kernel": BIG, "other": BIG}
    policy = Policy(order="output-major", rules=(Rule("other", Uniform()),))
    assert {row.order for row in rows(tree, policy).values()} == {"output-major"}
    policy = Policy(order="stored", rules=(Rule("other", Uniform(), "output-major"),))
    assert [rows(tree, policy)[path].order for path in tree] == ["stored", "stored", "output-major"]


def test_first_match_wins():
    tree = {name: {"kernel": BIG} for name in ("body", "head", "neck")}
    policy = Policy(rules=(Rule("head/*", None), Rule("*e*/kernel", Uniform(32))))
    taken = {path: (row.codec, row.reason) for path, row in rows(tree, policy).items()}
    assert taken == {
        "body/kernel": (Uniform(), "default"),
        "head/kernel": (None, "rule 1"),
        "neck/kernel": (Uniform(32), "rule 2"),
    }


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("*/kernel", {"enc/0/kernel", "enc/10/kernel", "head/kernel"}),
        ("enc/*", {"enc/0/kernel", "enc/0/Kernel", "enc/10/kernel"}),
        ("enc/?/kernel", {"enc/0/kernel"}),
        ("enc/[0-5]/*", {"enc/0/kernel", "enc/0/Kernel"}),
        ("re:enc/[0-9]+/kernel", {"enc/0/kernel", "enc/10/kernel"}),
        ("re:.*/(?i:kernel)", {"enc/0/kernel", "enc/0/Kernel", "enc/10/kernel", "head/kernel"}),
        ("re:head/.*", {"head/kernel"}),
    ],
)
def test_patterns(pattern, paths):
    tree = {"enc": {"0": {"kernel": BIG, "Kernel": BIG}, "10": {"kernel": BIG}}, "head": {"kernel": BIG}}
    found = reasons(tree, Policy(names=(), rules=(Rule(pattern, None),)))
    assert {path for path, reason in found.items() if reason == "rule 1"} == paths


@pytest.mark.parametrize("pattern", ["kernel", "head", "re:kernel", "re:head", "HEAD/KERNEL"])
def test_a_pattern_must_match_the_whole_path(pattern):
    assert "matches no leaf" in refusal({"head": {"kernel": BIG}}, Rule(pattern, None))


def star_glob(pattern, path):
    """Whether a glob that knows only `*` matches."""
    if not pattern:
        return not path
    if pattern[0] == "*":
        return any(star_glob(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return path[:1] == pattern[0] and star_glob(pattern[1:], path[1:])


@given(
    st.lists(st.text("ab/", min_size=1, max_size=4), min_size=1, max_size=5, unique=True),
    st.lists(st.text("ab/*", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None, max_examples=25)
def test_every_leaf_goes_to_its_first_rule_and_every_rule_has_a_leaf(paths, patterns):
    policy = Policy(names=(), rules=tuple(Rule(pattern, None) for pattern in patterns))
    leaves = [LeafSpec(path, (64, 64), np.dtype("float32")) for path in paths]
    first = [next((i for i, p in enumerate(patterns, 1) if star_glob(p, path)), 0) for path in paths]
    if set(range(1, len(patterns) + 1)) <= set(first):
        expected = [f"rule {i}" if i else "not in names" for i in first]
        assert [decision.reason for decision in policy.decide(leaves)] == expected
        assert [decision.path for decision in policy.decide(leaves)] == paths
    else:
        with pytest.raises(BTCPolicyError, match="no leaf"):
            policy.decide(leaves)


def test_rule_that_matches_nothing_names_near_paths():
    tree = {"encoder": {"dense": {"kernel": BIG}}, "zz": jnp.zeros(3), "yy": jnp.zeros(3), "xx": jnp.zeros(3)}
    text = refusal(tree, Rule("zz", None), Rule("encoder/Dense/kernel", Uniform()))
    assert "rule 2" in text
    assert "'encoder/Dense/kernel'" in text
    assert "4 leaves" in text
    assert "encoder/dense/kernel" in text


def test_rule_on_an_empty_tree_says_that_it_is_empty():
    with pytest.raises(ValueError, match="empty"):
        btc_quantize({}, policy=Policy(rules=(Rule("a", None),)))


def test_shadowed_rule_names_the_rules_before_it():
    tree = {"head": {"kernel": BIG}, "body": {"kernel": BIG}}
    rules = (Rule("head/*", None), Rule("body/*", None), Rule("*/kernel", Uniform()))
    text = refusal(tree, *rules)
    assert text.startswith("rule 3 ('*/kernel') decides no leaf")
    assert "rule 1 ('head/*') and rule 2 ('body/*')" in text
    assert "head/kernel" in text or "body/kernel" in text
    assert "narrower rule first" in text
    assert reasons(tree, Policy(rules=rules[:1] + rules[2:])) == {"head/kernel": "rule 1", "body/kernel": "rule 2"}


def test_rule_on_an_integer_leaf_names_a_remedy_that_works():
    tree = {"kernel": BIG, "steps": jnp.arange(3)}
    text = refusal(tree, Rule("*", Uniform()))
    for part in ("rule 1 ('*')", "steps", "int32", "not floating", "Rule('steps', None) before"):
        assert part in text
    fixed = Policy(rules=(Rule("steps", None), Rule("*", Uniform())))
    assert reasons(tree, fixed) == {"kernel": "rule 2", "steps": "integer"}


def test_rule_on_what_is_no_array_says_so():
    text = refusal({"kernel": BIG, "rate": 0.5}, Rule("*", Uniform()))
    for part in ("rule 1 ('*')", "rate", "not an array"):
        assert part in text


@pytest.mark.parametrize("pattern", ["re:[", "re:(a", "re:*"])
def test_bad_regular_expression_is_refused_at_once(pattern):
    with pytest.raises(BTCPolicyError, match="regular expression") as caught:
        Rule(pattern, None)
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Rule("*/head", Uniform), ("'*/head'", "Uniform", "codec")),  # pyright: ignore[reportArgumentType]
        (lambda: Rule("*/head", 4), ("'*/head'", "4", "codec")),  # pyright: ignore[reportArgumentType]
        (lambda: Rule(7, None), ("7", "pattern")),  # pyright: ignore[reportArgumentType]
        (lambda: Rule("a", None, "C"), ("'C'", "output-major", "stored")),  # pyright: ignore[reportArgumentType]
        (lambda: Policy(4), ("4", "codec", "Uniform()")),  # pyright: ignore[reportArgumentType]
        (lambda: Rule("a", "dense"), ("'dense'", "codec", "default")),  # pyright: ignore[reportArgumentType]
        (lambda: Policy(order="F"), ("'F'", "output-major", "stored")),  # pyright: ignore[reportArgumentType]
        (lambda: Policy(rules=("*",)), ("'*'", "Rule(")),  # pyright: ignore[reportArgumentType]
        (lambda: Policy(rules=Rule("*", None)), ("rules",)),  # pyright: ignore[reportArgumentType]
    ],
)
def test_argument_of_the_wrong_kind(make, parts):
    with as_users_run_it(), pytest.raises(BTCPolicyError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts)


def test_codec_and_policy_together_are_refused():
    with pytest.raises(BTCPolicyError, match=r"Policy\(codec"):
        btc_plan({"kernel": BIG}, Uniform(), policy=Policy())


def test_a_policy_that_takes_nothing_lists_the_reasons():
    tree = {"bias": np.zeros(8, np.float32), "kernel": np.zeros((2, 2), np.float32), "steps": np.arange(3)}
    with pytest.raises(BTCPolicyError) as caught:
        btc_quantize(tree)
    for part in ("3", "bias", "would not become smaller", "integer", "Policy(min_size=0)"):
        assert part in str(caught.value)


def test_rules_may_be_a_list_and_policies_are_values():
    with as_users_run_it():
        listed = Policy(rules=[Rule("a", None)])  # pyright: ignore[reportArgumentType]
    assert listed == Policy(rules=(Rule("a", None),))
    assert hash(listed) == hash(Policy(rules=(Rule("a", None),)))


# The codec that a call implies.


@pytest.mark.parametrize("policy", [None, Policy(), Policy(rules=(Rule("head/*", None),), min_size=1)])
def test_without_a_codec_the_call_implies_one(policy):
    tree = {"body": {"kernel": BIG}, "head": {"kernel": BIG}}
    assert {row.codec for row in btc_plan(tree, policy=policy).rows} - {None} == {Uniform()}
    targets: tuple[dict[str, Any], ...] = ({"bits": 4.5}, {"size": 16384 + 4000}, {"rmse": 0.1}, {"sqnr_db": 20})
    for target in targets:
        assert {row.codec for row in btc_plan(tree, policy=policy, **target).rows} - {None} == {Multilevel()}


def test_a_policy_without_a_codec_works_with_every_function(tmp_path):
    rng = np.random.default_rng(0)
    weights = {name: {"kernel": rng.standard_normal((64, 64)).astype(np.float32)} for name in ("body", "head")}
    policy = Policy(rules=(Rule("head/*", None),))
    packed = btc_quantize(weights, policy=policy, bits=4.5)
    assert (packed["body"]["kernel"].format.id, packed["head"]["kernel"] is weights["head"]["kernel"]) == (
        "multilevel",
        True,
    )
    assert btc_metrics(weights, packed, policy=policy).total.effective_bits <= 4.5
    assert [rule.pattern for rule in btc_allocate(weights, policy=policy, bits=4.5).rules] == ["re:body/kernel"]
    assert btc_quantize(weights, policy=policy)["body"]["kernel"].format.id == "uniform"
    decoded = jax.jit(lambda tree: btc_reconstruct(tree, policy=policy))(weights)
    np.testing.assert_array_equal(decoded["head"]["kernel"], weights["head"]["kernel"])
    found = btc_search(weights, policy=policy, bits=(3, 6), max_rmse=0.5, progress=False)
    assert found.best is not None
    assert found.best.codec == Multilevel()
    assert btc_search(weights, policy=policy, max_rmse=9.0, progress=False).trials[0].codec == Uniform(32)
    save_file({f"{name}.kernel": leaf["kernel"] for name, leaf in weights.items()}, tmp_path / "x.safetensors")
    dotted = Policy(rules=(Rule("head.*", None),))
    assert plan_file(tmp_path / "x.safetensors", policy=dotted, bits=4.5).rows[0].codec == Multilevel()
    done = quantize_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", policy=dotted, bits=4.5)
    assert (done.packed, done.effective_bits <= 4.5) == (1, True)


def test_a_rule_without_a_codec_packs_with_that_of_the_policy():
    tree = {"body": {"kernel": BIG}, "head": {"bias": BIG}, "tail": {"kernel": BIG}}
    rules = (Rule("head/*", order="stored", weight=3.0), Rule("tail/*", Uniform(128)))
    leaves = [LeafSpec(path, (64, 64), np.dtype("float32")) for path in ("body/kernel", "head/bias", "tail/kernel")]
    found = Policy(Uniform(32), rules).decide(leaves)
    assert [how.codec for how in found] == [Uniform(32), Uniform(32), Uniform(128)]
    assert (found[1].order, found[1].weight, found[1].reason) == ("stored", 3.0, "rule 1")
    assert {row.codec for row in btc_plan(tree, policy=Policy(rules=rules[:1]), bits=4.5).rows} == {Multilevel()}


# Memory and files.


def test_memory_and_files_decide_alike(tmp_path):
    names = [
        "a.weight",
        "b/kernel",
        "c/bias",
        "wte.weight",
        "pos_embedding",
        "d/embedding",
        "norm.weight",
        "e/0",
        "ema/x",
    ]
    tree = {name: np.ones((64, 64), np.float32) for name in names}
    save_file(tree, tmp_path / "x.safetensors")
    for policy in (None, Policy(names=("weight", "embedding")), Policy(order="stored"), Policy(rules=(Rule("c/*"),))):
        files = {row.path: row for row in plan_file(tmp_path / "x.safetensors", policy=policy).rows}
        assert files == rows(tree, policy)


def test_names_with_dots_are_named_by_what_follows_the_last():
    tree = {"fc.weight": BIG, "fc.other": BIG, "conv/weight": BIG}
    assert reasons(tree, Policy(names=("weight",))) == {
        "conv/weight": "default",
        "fc.other": "not in names",
        "fc.weight": "default",
    }


# Remedies.


@pytest.mark.parametrize(
    ("tree", "policy", "remedy"),
    [
        ({"a": {"kernel": np.ones((3, 3), np.float32)}}, None, Policy(min_size=0)),
        ({"a": {"kernel": np.ones((64, 64), np.float32)}}, Policy(names=("w",)), Policy(names=None)),
        ({"a": {"bias": np.ones((64, 64), np.float32)}}, None, Policy(rules=(Rule("a/bias"),))),
        ({"a": np.ones(5000, np.float32)}, None, Policy(rules=(Rule("a"),))),
        ({"ema": {"kernel": np.ones((64, 64), np.float32)}}, None, Policy(rules=(Rule("ema*kernel"),))),
    ],
)
def test_remedies_for_a_tree_of_which_nothing_is_packed_work(tree, policy, remedy):
    with pytest.raises(BTCPolicyError) as caught:
        btc_quantize(tree, policy=policy)
    named = (
        f"Rule({remedy.rules[0].pattern!r})"
        if remedy.rules
        else "names=None"
        if remedy.min_size is None
        else "min_size=0"
    )
    assert named in str(caught.value)
    assert any(map(is_packed, jax.tree.leaves(btc_quantize(tree, policy=remedy), is_leaf=is_packed)))


@pytest.mark.parametrize("tree", [{"steps": np.arange(9)}, {"x": 1.0}, {"x": np.zeros((0, 3), np.float32)}])
def test_a_tree_without_floating_weights_is_told_so(tree):
    with pytest.raises(BTCPolicyError, match="floating weights"):
        btc_quantize(tree)


def test_leaves_without_elements_stay_dense_by_rule_as_well():
    tree = {"w": np.zeros((0, 64), np.float32), "kernel": np.ones((64, 64), np.float32)}
    packed = btc_quantize(tree, policy=Policy(rules=(Rule("*", Uniform()),)))
    assert (packed["w"] is tree["w"], is_packed(packed["kernel"])) == (True, True)
    assert reasons(tree, Policy(rules=(Rule("*", Uniform()),))) == {"w": "empty", "kernel": "rule 1"}


# Many leaves, and many rules.


def test_thousands_of_rules_are_compared_at_once():
    paths = [f"layers_{i}/experts/{j}/wi (a+b)/kernel" for i in range(40) for j in range(100)]
    leaves = [LeafSpec(path, (64, 64), np.dtype("float32")) for path in paths]
    rules = tuple(Rule(f"re:{re.escape(path)}", Uniform(2 + i % 50)) for i, path in enumerate(paths))
    start = time.perf_counter()
    found = Policy(rules=rules, names=()).decide(leaves)
    assert [how.reason for how in found] == [f"rule {i}" for i in range(1, len(paths) + 1)]
    assert time.perf_counter() - start < 5  # 16 million regular expressions would take a minute


@given(
    st.lists(st.text("ab/.*", min_size=1, max_size=4), min_size=1, max_size=6),
    st.lists(st.text("ab/.*+", min_size=1, max_size=4), min_size=1, max_size=6),
    st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_first_matches_are_those_of_one_rule_after_the_other(paths, patterns, escaped):
    rules = [Rule(f"re:{re.escape(pattern)}" if escaped else pattern) for pattern in patterns]
    matches = [[path == pattern if escaped else star_glob(pattern, path) for pattern in patterns] for path in paths]
    assert first_matches(rules, paths) == [row.index(True) + 1 if any(row) else 0 for row in matches]
