"""The default policy on trees of shapes with the parameter names of real models: which leaves it packs, and why."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

from btc_jax import Policy, btc_plan
from tests.families import (
    BERT,
    BIG_VISION,
    BONSAI,
    GEMMA,
    HUGGING_FACE,
    KERAS,
    MAXTEXT,
    MAXTEXT_SCANNED,
    OTHERS,
    PACKED,
    PENZAI,
    RESNET,
    STORED,
    T5X,
    T5X_BEFORE,
    TORCH_RESNET,
    UNET,
    WHISPER,
    D,
    F,
    H,
    K,
    L,
    V,
)

FAMILIES = {
    "Gemma": GEMMA,
    "Qwen in bonsai": BONSAI,
    "Llama and Qwen in Hugging Face": HUGGING_FACE,
    "T5X": T5X,
    "T5X, older": T5X_BEFORE,
    "MaxText": MAXTEXT,
    "MaxText, scanned": MAXTEXT_SCANNED,
    "big_vision": BIG_VISION,
    "ResNet": RESNET,
    "ResNet in PyTorch": TORCH_RESNET,
    "Whisper": WHISPER,
    "Stable Diffusion": UNET,
    "Keras 3": KERAS,
    "Penzai": PENZAI,
    "BERT": BERT,
    "others": OTHERS,
}


def verdicts(tree):
    """The decision on each leaf: its reason, with the layout if it is packed as stored."""
    stored = {True: STORED, False: PACKED}
    return {
        row.path: stored[row.order == "stored"] if row.codec and row.reason == "default" else row.reason
        for row in btc_plan(tree).rows
    }


def shapes(family, separator=None):
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, (shape, _) in family.items()}
    return leaves if separator is None else unflatten_dict(leaves, separator)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_packed_and_why_the_rest_is_not(name):
    expected = {path: verdict for path, (_, verdict) in FAMILIES[name].items()}
    assert verdicts(shapes(FAMILIES[name], "/")) == expected


@pytest.mark.parametrize("name", ["Llama and Qwen in Hugging Face", "BERT"])
def test_names_with_dots_are_decided_as_nested_dicts_are(name):
    expected = {path.replace(".", "/"): verdict for path, (_, verdict) in FAMILIES[name].items()}
    assert verdicts(shapes(FAMILIES[name], ".")) == expected


def test_haiku():
    def forward(tokens):
        x = hk.Embed(V, D)(tokens)
        x = x + hk.get_parameter("pos_embs", (V, D), init=jnp.zeros)[None, : x.shape[1]]
        x = hk.MultiHeadAttention(H, K, w_init=hk.initializers.Constant(1))(x, x, x)
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.nets.MLP((F, V))(x)

    params = jax.eval_shape(hk.transform(forward).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    found = verdicts(params)
    assert {path for path, why in found.items() if why in (PACKED, STORED)} == {
        "embed/embeddings",
        "mlp/~/linear_0/w",
        "mlp/~/linear_1/w",
        *(f"multi_head_attention/{name}/w" for name in ("query", "key", "value", "linear")),
    }
    assert (found["embed/embeddings"], found["mlp/~/linear_0/w"], found["~/pos_embs"]) == (
        STORED,
        PACKED,
        "position table",
    )
    assert {found["mlp/~/linear_0/b"], found["layer_norm/scale"], found["layer_norm/offset"]} == {"bias", "norm"}


def test_haiku_stacked():
    """hk.experimental.layer_stack: a bias and the parameters of a norm have two axes."""
    tree = {"__layer_stack_no_per_layer/linear": {"w": (L, D, F), "b": (64, F)}}
    tree |= {"__layer_stack_no_per_layer/layer_norm": {"scale": (64, D), "offset": (64, D)}}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: type(x) is tuple
    )
    assert list(verdicts(params).values()) == ["norm", "norm", "bias", PACKED]


def test_equinox():
    model = eqx.filter_eval_shape(eqx.nn.MLP, 64, 64, 64, 1, key=jax.random.key(0))
    found = verdicts(eqx.filter(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)))
    weights = {path for path, why in found.items() if why == STORED}
    assert weights == {"layers/0/weight", "layers/1/weight"}
    assert {why for path, why in found.items() if path not in weights} == {"bias"}


def test_nnx_scanned():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(D, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(H, D, rngs=rngs, decode=False)

    state = jax.eval_shape(lambda: nnx.state(nnx.vmap(Block, in_axes=0, out_axes=0)(nnx.Rngs(0).split(128)), nnx.Param))
    found = verdicts(state)
    assert {path for path, why in found.items() if why == PACKED} == {
        f"attention/{name}/kernel" for name in ("query", "key", "value", "out")
    }
    assert {found[path] for path in ("attention/query/bias", "attention/out/bias", "norm/bias")} == {"bias"}
    assert found["norm/scale"] == "norm"


def test_small_leaves_of_a_family_are_packed_if_asked():
    tree = shapes(BERT)
    rows = {row.path: row.reason for row in btc_plan(tree, policy=Policy(min_size=0)).rows}
    assert rows["embeddings.token_type_embeddings.weight"] == "default"
    assert rows["embeddings.LayerNorm.weight"] == "norm"
