"""MobileNetV2 (Sandler and others, 2018) for images of 32x32: the first two strides are 1 instead of 2."""

import jax
from flax import linen

from examples.paper.models.layers import ConvBN, classifier, global_average

# For each stage: expansion, channels at width 1, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
BLOCKS = [
    (expansion, channels, stride if block == 0 else 1)
    for expansion, channels, blocks, stride in STAGES
    for block in range(blocks)
]


def rounded(channels: float) -> int:
    """The nearest multiple of 8 (halves rounded up), or the next one if that loses over a tenth."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


class InvertedResidual(linen.Module):
    """Expand, filter each channel, project; added to the input if the shape is unchanged."""

    features: int
    stride: int
    expansion: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x.shape[-1] * self.expansion
        y = x if self.expansion == 1 else ConvBN(hidden, 1, activation=linen.relu6, name="expand")(x)
        y = ConvBN(hidden, 3, self.stride, hidden, activation=linen.relu6, name="depthwise")(y)
        y = ConvBN(self.features, 1, name="project")(y)
        return x + y if y.shape == x.shape else y


class MobileNetV2(linen.Module):
    """As in github.com/chenyaofo/pytorch-cifar-models, without its dropout, which only training uses."""

    width: float
    classes: int = 10

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvBN(rounded(32 * self.width), activation=linen.relu6, name="first")(x)
        for index, (expansion, channels, stride) in enumerate(BLOCKS, start=1):
            x = InvertedResidual(rounded(channels * self.width), stride, expansion, name=f"block{index}")(x)
        x = ConvBN(rounded(1280 * max(1.0, self.width)), 1, activation=linen.relu6, name="last")(x)
        return classifier(self.classes)(global_average(x))
