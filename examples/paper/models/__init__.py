"""The networks of the paper in Flax Linen, for inference: `[n, h, w, 3]` normalized images in, logits out."""

from examples.paper.models.cifar_resnet import CifarResNet as CifarResNet
from examples.paper.models.imagenet_resnet import ImageNetResNet as ImageNetResNet
from examples.paper.models.mlp import MLP as MLP
from examples.paper.models.mobilenetv2 import MobileNetV2 as MobileNetV2
from examples.paper.models.repvgg import RepVGG as RepVGG
from examples.paper.models.shufflenetv2 import ShuffleNetV2 as ShuffleNetV2
