"""Containers in files: any nesting is restored, or saving says what is not, and a template restores all of it."""

import collections
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.core import FrozenDict, freeze
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from btc_jax import Policy, Uniform, btc_quantize, is_packed, load, save
from btc_jax.checkpoint import BTCTreeWarning
from btc_jax.packing import quantize_leaf
from tests.checkpoint_support import same

PACKED = [quantize_leaf(jnp.linspace(-1, 1, 8 * n).reshape(n, 8), Uniform(8, threshold=0.1)) for n in (1, 3)]
ARRAYS = [jnp.arange(3.0), jnp.ones((2, 1), jnp.bfloat16), np.zeros((0, 2)), np.arange(2, dtype=np.int64), *PACKED]
"""A pool, so that one object often occurs at several places."""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "m.safetensors"


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.text("ab./é#", max_size=3)
    dicts = st.dictionaries(keys, children, max_size=4)
    return st.one_of(
        *(dicts, dicts, dicts.map(FrozenDict), dicts.map(OrderedDict), dicts.map(nnx.State)),
        *(st.dictionaries(st.integers(-2, 9), children, max_size=3), st.lists(children, max_size=3)),
        st.lists(children, max_size=3).map(tuple),
        st.builds(lambda child, tag: nnx.Param(child, tag=tag), children, st.sampled_from(["t", ("a", None), [1, {}]])),
        st.builds(nn.Partitioned, children, st.just(("x", None))),
    )


LEAVES = st.one_of(st.sampled_from(ARRAYS), st.none(), st.integers(), st.text(max_size=3), st.floats(), st.booleans())
TREES = st.recursive(LEAVES, containers, max_leaves=12)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=TREES, shards=st.sampled_from([None, 1, 100]))
def test_any_tree_comes_back(file, tree, shards):
    try:
        save(file, tree, max_shard_bytes=shards)
    except ValueError as error:
        assume("path" not in str(error))  # '..', '/a', or the same path twice
        raise
    loaded = load(file)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    same(loaded, tree)
    assert identities(loaded) == identities(tree)
    assert jax.tree.structure(load(file, like=tree)) == jax.tree.structure(tree)
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    save(file, loaded, max_shard_bytes=shards)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def identities(tree: Any) -> list[int]:
    """For each array, the first place where the same object occurs."""
    leaves = [
        x for x in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(x) or isinstance(x, jax.Array | np.ndarray)
    ]
    firsts: dict[int, int] = {}
    return [firsts.setdefault(id(leaf), i) for i, leaf in enumerate(leaves)]


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": 1, "c": [2.0, (None, {"d": "x"})]}, "e": {}, "f": ()},
        freeze({"params": {"kernel": np.ones(2), "more": {"bias": np.ones(1)}}}),
        OrderedDict(z=1, a=2),
        nnx.State({"a": nnx.Param(np.ones(2)), "b": {"c": nnx.BatchStat(np.ones(1))}}),
        {"kernel": nn.Partitioned(np.ones((2, 2)), ("a", "b"))},
    ],
    ids=["plain", "frozen", "ordered", "state", "boxes"],
)
def test_common_trees_are_saved_without_a_word(file, tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(file, tree)
    assert jax.tree.structure(load(file)) == jax.tree.structure(tree)


# NNX variables


class MyParam(nnx.Param):
    pass


class Mine(nnx.Variable):
    pass


class Net(nnx.Module):
    def __init__(self):
        self.kernel = MyParam(jax.random.normal(jax.random.key(0), (64, 64)), tag="t")
        self.bias = nnx.Param(jnp.ones(64), out_sharding=("x",), eager_sharding=False)
        self.mine = Mine(jnp.ones(2))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...][None]


@pytest.mark.parametrize("pack", [False, True])
def test_variables_of_ones_own(file, pack):
    graphdef, state = nnx.split(Net())
    tree = btc_quantize(state, policy=Policy(Uniform(), names=("kernel",))) if pack else state
    with pytest.warns(BTCTreeWarning, match=r"kernel.*MyParam.*nnx\.Param.*mine.*Mine.*nnx\.Variable"):
        save(file, tree)
    loaded = load(file)
    assert (type(loaded["kernel"]), type(loaded["mine"])) == (nnx.Param, nnx.Variable)
    net, expected = nnx.merge(graphdef, loaded), nnx.merge(graphdef, tree)
    assert len(jax.tree.leaves(nnx.state(net, nnx.Param), is_leaf=is_packed)) == 2
    x = jnp.ones((1, 64))
    assert jnp.array_equal(net(x), expected(x))
    assert loaded["kernel"].get_metadata() == state["kernel"].get_metadata()  # pyright: ignore
    assert loaded["bias"].get_metadata() == state["bias"].get_metadata()  # pyright: ignore
    again = load(file, like=tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert type(again["kernel"]) is MyParam


def test_metadata_that_json_does_not_have(file):
    spec = PartitionSpec("a", None, ("b", "c"))
    metadata = {"spec": spec, "tuple": (1, (2.5, None)), "list": [True, "x"], "dict": {"a": [()]}}
    save(file, nnx.State({"a": nnx.Param(np.ones(2), **metadata)}))
    assert {name: load(file)["a"].get_metadata(name) for name in metadata} == metadata
    tree = nnx.State({"a": nnx.Param(np.ones(2), function=len, infinite=float("inf"), tag="t")})
    with pytest.warns(BTCTreeWarning, match=r"a.*'function'.*'infinite'"):
        save(file, tree)
    assert load(file)["a"].get_metadata("tag") == "t"
    assert load(file, like=tree)["a"].get_metadata("function") is len


# Linen boxes


class Boxed(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, x):
        wrap = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        return nn.Dense(64, kernel_init=wrap(nn.initializers.lecun_normal(), ("a", "b")))(x)


@pytest.mark.parametrize("logical", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_boxes_come_back_and_run(file, pack, logical):
    net, x = Boxed(logical), jnp.ones((2, 64))
    variables = net.init(jax.random.key(0), x)
    tree = btc_quantize(variables, Uniform()) if pack else variables
    save(file, tree)
    loaded = load(file)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    kernel = loaded["params"]["Dense_0"]["kernel"]
    assert type(kernel) is (nn.LogicallyPartitioned if logical else nn.Partitioned)
    assert (kernel.names, is_packed(kernel.value)) == (("a", "b"), pack)
    apply: Any = net.apply
    assert jnp.array_equal(apply(loaded, x), apply(tree, x))
    assert jnp.array_equal(apply(load(file, like=tree), x), apply(tree, x))


def test_a_mesh_in_a_box_is_not_kept(file):
    box = nn.LogicallyPartitioned(np.ones(2), ("a",), mesh=jax.make_mesh((8,), ("x",)), rules=(("a", "x"),))
    with pytest.warns(BTCTreeWarning, match=r"kernel.*mesh.*rules"):
        save(file, {"kernel": box})
    assert load(file)["kernel"].mesh is None
    again = load(file, like={"kernel": box})["kernel"]
    assert (again.mesh, again.rules) == (box.mesh, box.rules)


# What needs a template


@struct.dataclass
class Layer:
    kernel: Any
    name: str = struct.field(pytree_node=False, default="a")


Point = namedtuple("Point", ["x", "y"])

OTHERS = {
    "dataclass": (lambda: {"a": Layer(np.ones(2), "b")}, r"a.*Layer.*dict"),
    "named tuple": (lambda: [Point(np.ones(2), 1)], "Point.*named tuple"),
    "optax": (lambda: optax.adam(0.1).init({"w": jnp.ones(2)}), "ScaleByAdamState"),
    "defaultdict": (lambda: collections.defaultdict(list, a=np.ones(2)), "defaultdict.*dict"),
    "module": (lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "Linear.*dict"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_needs_a_template_is_said_and_comes_back_with_one(name, file):
    make, message = OTHERS[name]
    tree = make()
    with pytest.warns(BTCTreeWarning, match=rf"(?s)like=.*{message}"):
        save(file, tree)
    load(file)
    again = load(file, like=tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    same(again, tree)


def test_many_of_a_kind_are_one_warning(file):
    with pytest.warns(BTCTreeWarning, match=r"0/kernel and 99 more") as caught:
        save(file, [Layer(np.ones(1)) for _ in range(100)])
    assert len(caught) == 1
