"""PyTorch's own networks with the same random weights give the same logits; skipped without torch and torchvision."""

import jax
import numpy as np
import pytest

from examples.paper.models import RepVGG, repvgg
from examples.paper.networks import NETWORKS
from examples.paper.weights import convert

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

SHUFFLENET_WIDTHS = {
    "x0_5": (24, 48, 96, 192, 1024),
    "x1_0": (24, 116, 232, 464, 1024),
    "x1_5": (24, 176, 352, 704, 1024),
}
MOBILENET_STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def imagenet_resnet(name, classes):
    return getattr(torchvision.models, name)(num_classes=classes)


def shufflenet(name, classes):
    """torchvision's, without the stride and the pool at its start, for images of 32x32."""
    widths = list(SHUFFLENET_WIDTHS[name.removeprefix("shufflenetv2_")])
    model = torchvision.models.ShuffleNetV2([4, 8, 4], widths, num_classes=classes)
    model.conv1[0].stride = (1, 1)
    model.maxpool = torch.nn.Identity()
    return model


def mobilenet(_, classes):
    """torchvision's, with two strides of 1 instead of 2."""
    model = torchvision.models.MobileNetV2(classes, width_mult=0.5, inverted_residual_setting=MOBILENET_STAGES)
    model.features[0][0].stride = (1, 1)
    return model


class OptionA(torch.nn.Module):
    def forward(self, x):
        fresh = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
        return torch.cat([fresh, x[:, :, ::2, ::2], fresh], dim=1)


def cifar_resnet(name, classes, option_a=False):
    """torchvision's basic blocks in three stages."""
    block, modules, channels = torchvision.models.resnet.BasicBlock, torch.nn.Sequential(), 16
    modules.add_module("conv1", torch.nn.Conv2d(3, 16, 3, padding=1, bias=False))
    modules.add_module("bn1", torch.nn.BatchNorm2d(16))
    modules.add_module("relu", torch.nn.ReLU())
    for stage, width in enumerate((16, 32, 64), start=1):
        stride = 1 if stage == 1 else 2
        projection = torch.nn.Conv2d(channels, width, 1, stride, bias=False)
        shortcut = OptionA() if option_a else torch.nn.Sequential(projection, torch.nn.BatchNorm2d(width))
        blocks = [block(channels, width, stride, shortcut if stride == 2 else None)]
        blocks += [block(width, width) for _ in range((int(name.removeprefix("resnet")) - 2) // 6 - 1)]
        modules.add_module(f"layer{stage}", torch.nn.Sequential(*blocks))
        channels = width
    modules.add_module("pool", torch.nn.AdaptiveAvgPool2d(1))
    modules.add_module("flat", torch.nn.Flatten())
    modules.add_module("linear" if option_a else "fc", torch.nn.Linear(64, classes))
    return modules


def option_a_resnet(name, classes):
    return cifar_resnet(name, classes, option_a=True)


CASES = [
    ("akamaster_resnet20", option_a_resnet),
    ("cifar10_resnet20", cifar_resnet),
    ("cifar100_resnet44", cifar_resnet),
    ("cifar10_shufflenetv2_x0_5", shufflenet),
    ("cifar10_shufflenetv2_x1_0", shufflenet),
    ("cifar100_shufflenetv2_x1_5", shufflenet),
    ("cifar10_mobilenetv2_x0_5", mobilenet),
    ("imagenet_resnet18", imagenet_resnet),
    ("imagenet_resnet50", imagenet_resnet),
]


def randomize(model, images):
    """Random batch norms, then statistics as training would find them, so that no layer fades or explodes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
        model.train()(images)
    return model.eval()


def states(model):
    return {name: array.numpy() for name, array in model.state_dict().items()}


def logits(model, images):
    """Theirs, at a scale at which a difference shows."""
    with torch.no_grad():
        theirs = model(images).numpy()
    assert theirs.std() > 0.1
    return theirs


def assert_equal_logits(flax_model, variables, images, theirs, atol=1e-4):
    ours = jax.jit(flax_model.apply)(variables, images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "build"), CASES, ids=[name for name, _ in CASES])
def test_logits_equal_those_of_torchvision(name, build):
    torch.manual_seed(0)
    network = NETWORKS[name]
    size = 32 if network.size == 32 else 96  # large enough for every stride
    calibration, images = torch.randn(16, 3, size, size), torch.randn(4, 3, size, size)
    model = randomize(build(name.partition("_")[2], network.classes), calibration)
    variables = convert(states(model), network, "random weights")
    assert_equal_logits(network.model, variables, images, logits(model, images))


def test_logits_equal_those_of_resnet101_in_float64():
    """In float32 the rounding of a hundred layers of random weights alone is 3e-4; in float64 it is far below 1e-8."""
    torch.manual_seed(0)
    network, images = NETWORKS["imagenet_resnet101"], torch.randn(2, 3, 64, 64)
    model = randomize(torchvision.models.resnet101(), torch.randn(8, 3, 64, 64))
    variables = convert(states(model), network, "random weights")
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        assert_equal_logits(network.model, variables, images.double(), logits(model.double(), images.double()), 1e-8)


def test_logits_equal_those_of_repvgg_in_timm():
    """timm's blocks, with the strides for images of 32x32."""
    byobnet = pytest.importorskip("timm.models.byobnet")
    stages = [(2, 48, 1), (4, 96, 2), (14, 192, 2), (1, 1280, 2)]
    blocks = tuple(
        byobnet.ByoBlockCfg("rep", d=depth, c=width, s=stride, gs=0, br=0.0) for depth, width, stride in stages
    )
    torch.manual_seed(0)
    model = byobnet.ByobNet(byobnet.ByoModelCfg(blocks, stem_chs=48, stem_type="rep"), num_classes=10)
    for branch in (model.stem.conv_kxk, model.stem.conv_1x1):
        branch.conv.stride = (1, 1)
    network = NETWORKS["cifar10_repvgg_a0"]
    model = randomize(model, torch.randn(16, 3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    variables = convert({_chenyaofo_name(name): array for name, array in states(model).items()}, network, "timm")
    assert_equal_logits(network.model, variables, images, logits(model, images))
    assert_equal_logits(RepVGG(fused=True), repvgg.fuse(variables), images, logits(model, images))


def _chenyaofo_name(name: str) -> str:
    renamed = {"stem.": "stage0.", "head.fc.": "linear.", "conv_kxk.": "rbr_dense.", "conv_1x1.": "rbr_1x1."}
    renamed |= {"identity.": "rbr_identity."} | {f"stages.{i}.": f"stage{i + 1}." for i in range(4)}
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name
