"""ResNet for images of 224x224 (He and others, 2016), in torchvision's version."""

import jax
from flax import linen

from examples.paper.models.layers import ConvBN, classifier, global_average
from examples.paper.models.residual import BasicBlock, Bottleneck


class ImageNetResNet(linen.Module):
    """ResNet-18 (basic blocks), ResNet-50 and ResNet-101 (bottlenecks)."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    classes: int = 1000

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = Bottleneck if self.bottleneck else BasicBlock
        x = ConvBN(64, 7, 2, activation=linen.relu, name="conv1")(x)
        x = linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = kind(64 << stage, stride, name=f"layer{stage + 1}_{block}")(x)
        return classifier(self.classes)(global_average(x))
