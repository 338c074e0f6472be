"""The paper's networks: their published sizes, and the answers of real weights."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from examples.paper.models import MLP, RepVGG, repvgg
from examples.paper.models.layers import ConvBN, convolution, global_average
from examples.paper.models.mobilenetv2 import rounded
from examples.paper.models.residual import padded
from examples.paper.models.shufflenetv2 import shuffled
from examples.paper.networks import NETWORKS, traced
from examples.paper.weights import load_weights

DATA = Path(__file__).parents[2] / "shared" / "data"
# Correct answers of PyTorch in float32 on the 932 exact CIFAR-10 test images and on the 10,000 JPEG ones.
CORRECT = {
    "akamaster_resnet20": (854, 8103),
    "akamaster_resnet32": (867, 8256),
    "akamaster_resnet56": (863, 8320),
    "cifar10_resnet20": (861, 8105),
    "cifar10_resnet56": (881, 8367),
    "cifar10_shufflenetv2_x0_5": (844, 8338),
}
SLOW = "BTC_JAX_SLOW" in os.environ


@pytest.mark.parametrize("network", NETWORKS.values(), ids=lambda network: network.name)
def test_size_is_the_published_one(network):
    """chenyaofo and akamaster round to 10,000; torchvision publishes every parameter, and operations to a million."""
    cifar = network.dataset != "imagenet"
    parameters, multiply_adds = network.count_parameters(), network.count_multiply_adds()
    assert (round(parameters, -4) if cifar else parameters) == network.parameters
    assert round(multiply_adds, -4 if cifar else -6) == network.multiply_adds


@pytest.mark.parametrize(
    ("model", "multiply_adds"),
    [
        (ConvBN(8, 3), 32 * 32 * 8 * 27),
        (ConvBN(8, 1, stride=2), 16 * 16 * 8 * 3),
        (ConvBN(6, 3, groups=3), 32 * 32 * 6 * 9),
        (linen.Sequential((global_average, linen.Dense(10))), 30),
        (linen.Sequential((jax.jit(global_average), linen.relu)), 0),
    ],
)
def test_multiply_adds_counted_by_hand(model, multiply_adds):
    assert traced(dataclasses.replace(NETWORKS["cifar10_resnet20"], model=model)).multiply_adds == multiply_adds


def correct_answers(name, file):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} with the weights and images is not here")
    network = NETWORKS[name]
    variables = load_weights(network, [DATA], progress=False)
    images, labels = np.load(DATA / file).values()
    apply = jax.jit(network.apply)
    answers = [
        np.argmax(apply(variables, batch), axis=-1) for batch in np.split(images, 4 if len(images) < 1000 else 40)
    ]
    return (np.concatenate(answers) == labels).sum()


@pytest.mark.parametrize("name", CORRECT)
def test_real_weights_give_the_answers_of_pytorch(name):
    assert correct_answers(name, "cifar10_test_932.npz") == CORRECT[name][0]


@pytest.mark.skipif(not SLOW, reason="minutes; set BTC_JAX_SLOW=1")
@pytest.mark.parametrize("name", CORRECT)
def test_real_weights_give_the_answers_of_pytorch_on_ten_thousand_images(name):
    assert abs(correct_answers(name, "cifar10_test_jpeg.npz") - CORRECT[name][1]) <= 3


def test_names_titles_and_classes():
    for name, network in NETWORKS.items():
        assert name == network.name
        assert network.shapes()["params"]["classifier"]["bias"].shape == (network.classes,)
    # The paper's tables 2, 3 and 6, and akamaster's networks.
    assert len(NETWORKS) == 25
    assert {n.title for n in NETWORKS.values() if n.dataset == "imagenet"} == {"ResNet-18", "ResNet-50", "ResNet-101"}


def test_bytes_and_floats_are_normalized_alike():
    network = NETWORKS["cifar10_resnet20"]
    images = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    from_bytes, from_floats = network.normalized(images), network.normalized(images.astype(np.float32) / 255)
    np.testing.assert_allclose(from_bytes, from_floats, atol=1e-6)
    np.testing.assert_allclose(from_bytes[0, 0, 0], (np.arange(3) / 255 - network.mean) / network.std, rtol=1e-6)
    assert from_bytes.dtype == jnp.float32


def test_strided_convolutions_are_padded_on_all_sides():
    """Flax's `SAME` would pad below and to the right only, and see 4, 3 and 2 neighbours for 2, 3 and 3."""
    model = convolution(1, 3, stride=2)
    image = jnp.ones((1, 4, 4, 1))
    out = model.apply({"params": {"kernel": jnp.ones((3, 3, 1, 1))}}, image)
    np.testing.assert_array_equal(out[0, :, :, 0], [[4, 6], [6, 9]])  # pyright: ignore


def test_batch_norm_has_the_epsilon_of_pytorch():
    model, image = ConvBN(1, 1), jnp.ones((1, 2, 2, 1))
    variables = model.init(jax.random.key(0), image)
    variables["params"]["conv"]["kernel"] = jnp.full((1, 1, 1, 1), 2.0)
    variables["batch_stats"]["bn"] = {"mean": jnp.ones(1), "var": jnp.zeros(1)}
    np.testing.assert_allclose(model.apply(variables, image), (2 - 1) / 1e-5**0.5, rtol=1e-5)  # pyright: ignore


def test_option_a_takes_every_other_pixel_and_pads_channels_on_both_sides():
    x = jnp.arange(1.0, 33).reshape(1, 4, 4, 2)
    out = padded(x, 4, 2)
    np.testing.assert_array_equal(out[0, ..., 1:3], x[0, ::2, ::2])
    np.testing.assert_array_equal(out[0, ..., [0, 3]], 0)


def test_shuffling_deals_two_halves_in_turn():
    x = jnp.asarray([0, 1, 2, 10, 11, 12]).reshape(1, 1, 1, 6)
    np.testing.assert_array_equal(shuffled(x).ravel(), [0, 10, 1, 11, 2, 12])


def test_mobilenet_rounds_channels():
    assert [rounded(channels / 2) for channels in (16, 24, 32, 64, 96, 160, 320)] == [8, 16, 16, 32, 48, 80, 160]
    assert rounded(44) == 48
    assert rounded(19) == 24  # 16 would lose over a tenth


def test_mlp_has_relu_between_its_layers():
    model = MLP((3,), 2)
    variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
    first, last = (variables["params"][name]["kernel"] for name in ("hidden0", "classifier"))
    x = jnp.asarray([[1.0, -2, 3, -4]])
    np.testing.assert_allclose(model.apply(variables, x), np.maximum(x @ first, 0) @ last, rtol=1e-5)  # pyright: ignore


def test_fused_repvgg_gives_the_same_logits(monkeypatch):
    monkeypatch.setattr(repvgg, "STAGES", ((1, 8, 1), (2, 8, 1), (3, 16, 2), (1, 32, 2)))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((2, 8, 8, 3)), jnp.float32)
    model, fused = RepVGG(classes=7), RepVGG(classes=7, fused=True)
    shapes, fused_shapes = (jax.eval_shape(m.init, jax.random.key(0), images) for m in (model, fused))

    def random(leaf):
        """Batch norms that are not the identity, and kernels that preserve the scale of activations."""
        kernel = rng.standard_normal(leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5
        return jnp.asarray(kernel if len(leaf.shape) > 1 else rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)

    variables = jax.tree.map(random, shapes)
    one_branch = repvgg.fuse(variables)
    assert jax.tree.map(jnp.shape, one_branch) == jax.tree.map(lambda leaf: leaf.shape, fused_shapes)
    before, after = jax.jit(model.apply)(variables, images), jax.jit(fused.apply)(one_branch, images)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
