"""Rules: patterns, precedence, and those that match nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btc_jax import (
    Policy,
    Rule,
    Uniform,
    btc_plan,
    btc_quantize,
)
from btc_jax.leafspec import LeafSpec
from btc_jax.policy import BTCPolicyError
from tests.policy_support import BIG as BIG
from tests.policy_support import as_users_run_it as as_users_run_it
from tests.policy_support import reasons as reasons
from tests.policy_support import rows as rows
from tests.policy_support import star_glob as star_glob


def refusal(tree, *rules, **fields):
    with pytest.raises(BTCPolicyError) as caught:
        btc_plan(tree, policy=Policy(rules=rules, **fields))
    return str(caught.value)


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
