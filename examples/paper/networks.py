"""Every network of the paper's tables by name, with its published size."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from examples.paper.models import CifarResNet, ImageNetResNet, MobileNetV2, RepVGG, ShuffleNetV2

PyTree = Any
Colour = tuple[float, float, float]

SIZES = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The mean and deviation that each network was trained with; for chenyaofo's networks, as in its training logs.
COLOURS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
    "imagenet": IMAGENET_COLOURS,
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, the images it expects, and its published size: `parameters`, and `multiply_adds` for one image."""

    name: str
    title: str
    dataset: str
    model: linen.Module
    mean: Colour
    std: Colour
    classes: int
    parameters: int
    multiply_adds: int

    def apply(self, variables: PyTree, images: Any) -> jax.Array:
        """Logits of images `[n, h, w, 3]`: bytes, or floats from 0 to 1."""
        return self.model.apply(variables, self.normalized(images))  # pyright: ignore[reportReturnType]

    def normalized(self, images: Any) -> jax.Array:
        scale = 255.0 if images.dtype == np.uint8 else 1.0
        mean, std = (jnp.asarray(colour, jnp.float32)[None, None, None] for colour in (self.mean, self.std))
        return (jnp.asarray(images).astype(jnp.float32) / scale - mean) / std

    @property
    def size(self) -> int:
        """Height and width of its images."""
        return SIZES[self.dataset]

    def shapes(self) -> PyTree:
        """The shapes of its variables."""
        return traced(self).shapes

    def count_parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes()["params"]))

    def count_multiply_adds(self) -> int:
        """Multiply-adds of the convolutions and dense layers for one image."""
        return traced(self).multiply_adds


class Trace(NamedTuple):
    shapes: PyTree
    multiply_adds: int


@functools.cache
def traced(network: Network) -> Trace:
    """Shapes and multiply-adds of the model on one image, from tracing alone."""
    image = jax.ShapeDtypeStruct((1, network.size, network.size, 3), jnp.float32)
    run = jax.make_jaxpr(network.model.init_with_output, return_shape=True)
    closed, (_, variables) = run(jax.random.key(0), image)
    return Trace(variables, sum(_multiply_adds(equation) for equation in equations(closed.jaxpr)))


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced function, including those of nested functions."""
    for equation in jaxpr.eqns:
        inner = [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        if not inner:
            yield equation
        for nested in inner:
            yield from equations(nested)


def _multiply_adds(equation: Any) -> int:
    """Each output is a sum over the inputs of one output channel: all axes of the kernel but its last."""
    if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
        return 0
    kernel, (out,) = equation.invars[1].aval.shape, equation.outvars
    return math.prod(out.aval.shape) * math.prod(kernel[:-1])


# The published figures: parameters and multiply-adds in millions, for 10 and for 100 classes.
# github.com/chenyaofo/pytorch-cifar-models, README at d1c8e99; RepVGG in its training form.
CHENYAOFO = {
    "resnet20": ("ResNet20", CifarResNet(3), (0.27, 40.81), (0.28, 40.82)),
    "resnet32": ("ResNet32", CifarResNet(5), (0.47, 69.12), (0.47, 69.13)),
    "resnet44": ("ResNet44", CifarResNet(7), (0.66, 97.44), (0.67, 97.44)),
    "resnet56": ("ResNet56", CifarResNet(9), (0.86, 125.75), (0.86, 125.75)),
    "shufflenetv2_x0_5": ("ShuffleNetV2_0.5", ShuffleNetV2(0.5), (0.35, 10.90), (0.44, 10.99)),
    "shufflenetv2_x1_0": ("ShuffleNetV2_1.0", ShuffleNetV2(1.0), (1.26, 45.00), (1.36, 45.09)),
    "shufflenetv2_x1_5": ("ShuffleNetV2_1.5", ShuffleNetV2(1.5), (2.49, 94.26), (2.58, 94.35)),
    "mobilenetv2_x0_5": ("MobileNetV2_x0.5", MobileNetV2(0.5), (0.70, 27.97), (0.82, 28.08)),
    "repvgg_a0": ("RepVGG-A0", RepVGG(), (7.84, 489.08), (7.96, 489.19)),
}
# Parameters: github.com/akamaster/pytorch_resnet_cifar10, README. It gives no multiply-adds: these are those of the
# networks above, minus the two 1x1 convolutions of 131,072 that option A omits.
AKAMASTER = {20: (3, 0.27, 40.55), 32: (5, 0.46, 68.86), 44: (7, 0.66, 97.17), 56: (9, 0.85, 125.49)}
# torchvision's `ResNet*_Weights.IMAGENET1K_V1.meta`: `num_params`, and `_ops` in billions.
TORCHVISION = {
    18: ((2, 2, 2, 2), False, 11_689_512, 1.814),
    50: ((3, 4, 6, 3), True, 25_557_032, 4.089),
    101: ((3, 4, 23, 3), True, 44_549_160, 7.801),
}


def _network(
    name: str, title: str, dataset: str, model: linen.Module, parameters: float, multiply_adds: float
) -> Network:
    sizes = {"parameters": round(parameters), "multiply_adds": round(multiply_adds)}
    mean, std = COLOURS[dataset]
    return Network(name, title, dataset, model, mean, std, CLASSES[dataset], **sizes)


def _chenyaofo() -> Iterator[Network]:
    for position, dataset in enumerate(("cifar10", "cifar100")):
        for name, (title, model, *published) in CHENYAOFO.items():
            parameters, multiply_adds = (1e6 * figure for figure in published[position])
            model = model.clone(classes=CLASSES[dataset])
            yield _network(f"{dataset}_{name}", title, dataset, model, parameters, multiply_adds)


def _akamaster() -> Iterator[Network]:
    mean, std = IMAGENET_COLOURS
    for depth, (blocks, parameters, multiply_adds) in AKAMASTER.items():
        model, title = CifarResNet(blocks, projection=False), f"ResNet{depth}, option A"
        network = _network(f"akamaster_resnet{depth}", title, "cifar10", model, 1e6 * parameters, 1e6 * multiply_adds)
        yield dataclasses.replace(network, mean=mean, std=std)


def _torchvision() -> Iterator[Network]:
    for depth, (blocks, bottleneck, parameters, multiply_adds) in TORCHVISION.items():
        model, title = ImageNetResNet(blocks, bottleneck), f"ResNet-{depth}"
        yield _network(f"imagenet_resnet{depth}", title, "imagenet", model, parameters, 1e9 * multiply_adds)


NETWORKS = {network.name: network for source in (_chenyaofo, _akamaster, _torchvision) for network in source()}
