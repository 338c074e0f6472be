"""Policies in calls: implied codecs, remedies, many rules."""

import re
import time
from typing import Any

import jax
import numpy as np
import pytest
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
from btc_jax.leafspec import LeafSpec
from btc_jax.policy import BTCPolicyError
from btc_jax.policy.rules import first_matches
from tests.policy_support import BIG as BIG
from tests.policy_support import as_users_run_it as as_users_run_it
from tests.policy_support import reasons as reasons
from tests.policy_support import rows as rows
from tests.policy_support import star_glob as star_glob


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
