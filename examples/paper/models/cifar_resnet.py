"""ResNet for images of 32x32 (He and others, 2016, section 4.2): three stages of 16, 32 and 64 channels."""

import jax
from flax import linen

from examples.paper.models.layers import ConvBN, classifier, global_average
from examples.paper.models.residual import BasicBlock


class CifarResNet(linen.Module):
    """ResNet-20, 32, 44, 56 with 3, 5, 7, 9 blocks per stage.

    Shortcuts are 1x1 convolutions (`projection=True`, github.com/chenyaofo/pytorch-cifar-models) or have no parameters
    (github.com/akamaster/pytorch_resnet_cifar10, and the original).
    """

    blocks: int
    classes: int = 10
    projection: bool = True

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvBN(16, activation=linen.relu, name="conv1")(x)
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(16 << stage, stride, self.projection, name=f"layer{stage + 1}_{block}")(x)
        return classifier(self.classes)(global_average(x))
