"""The blocks of residual networks (He and others, 2016), and the two shortcuts for blocks that change shape."""

import jax
import jax.numpy as jnp
from flax import linen

from examples.paper.models.layers import ConvBN


def padded(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Option A, without parameters: every `stride`-th pixel, zero-padded channels on both sides."""
    x = x[:, ::stride, ::stride]
    missing = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class Shortcut(linen.Module):
    """The identity if the shape is unchanged; else option A, or a 1x1 convolution (option B)."""

    features: int
    stride: int
    projection: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.stride == 1 and x.shape[-1] == self.features:
            return x
        if self.projection:
            return ConvBN(self.features, 1, self.stride, name="projection")(x)
        return padded(x, self.features, self.stride)


class BasicBlock(linen.Module):
    """Two 3x3 convolutions."""

    width: int
    stride: int = 1
    projection: bool = True

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ConvBN(self.width, 3, self.stride, activation=linen.relu, name="conv1")(x)
        y = ConvBN(self.width, 3, name="conv2")(y)
        return linen.relu(y + Shortcut(self.width, self.stride, self.projection, name="shortcut")(x))


class Bottleneck(linen.Module):
    """A 3x3 convolution between two of 1x1; the stride is in the 3x3, as in torchvision."""

    width: int
    stride: int = 1

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = ConvBN(self.width, 1, activation=linen.relu, name="conv1")(x)
        y = ConvBN(self.width, 3, self.stride, activation=linen.relu, name="conv2")(y)
        y = ConvBN(4 * self.width, 1, name="conv3")(y)
        return linen.relu(y + Shortcut(4 * self.width, self.stride, projection=True, name="shortcut")(x))
