"""PyTorch's name of each array of these models: an explicit rule for every module of every architecture."""

import re
from typing import Any

import jax
from flax import linen

from examples.paper.models import CifarResNet, ImageNetResNet, MobileNetV2, RepVGG, ShuffleNetV2

PyTree = Any
Rules = tuple[tuple[str, str], ...]

# Per architecture: the Flax module's path as a pattern, and PyTorch's name. The first full match counts.
RESIDUAL: Rules = (
    (r"conv1/conv", r"conv1"),
    (r"conv1/bn", r"bn1"),
    (r"layer(\d)_(\d+)/conv(\d)/conv", r"layer\1.\2.conv\3"),
    (r"layer(\d)_(\d+)/conv(\d)/bn", r"layer\1.\2.bn\3"),
    (r"layer(\d)_(\d+)/shortcut/projection/conv", r"layer\1.\2.downsample.0"),
    (r"layer(\d)_(\d+)/shortcut/projection/bn", r"layer\1.\2.downsample.1"),
)
RULES: dict[type[linen.Module], Rules] = {
    CifarResNet: (*RESIDUAL, (r"classifier", r"fc")),
    ImageNetResNet: (*RESIDUAL, (r"classifier", r"fc")),
    ShuffleNetV2: (
        (r"first/conv", r"conv1.0"),
        (r"first/bn", r"conv1.1"),
        (r"stage(\d)_(\d+)/past_depthwise/conv", r"stage\1.\2.branch1.0"),
        (r"stage(\d)_(\d+)/past_depthwise/bn", r"stage\1.\2.branch1.1"),
        (r"stage(\d)_(\d+)/past_pointwise/conv", r"stage\1.\2.branch1.2"),
        (r"stage(\d)_(\d+)/past_pointwise/bn", r"stage\1.\2.branch1.3"),
        (r"stage(\d)_(\d+)/first_pointwise/conv", r"stage\1.\2.branch2.0"),
        (r"stage(\d)_(\d+)/first_pointwise/bn", r"stage\1.\2.branch2.1"),
        (r"stage(\d)_(\d+)/depthwise/conv", r"stage\1.\2.branch2.3"),
        (r"stage(\d)_(\d+)/depthwise/bn", r"stage\1.\2.branch2.4"),
        (r"stage(\d)_(\d+)/last_pointwise/conv", r"stage\1.\2.branch2.5"),
        (r"stage(\d)_(\d+)/last_pointwise/bn", r"stage\1.\2.branch2.6"),
        (r"last/conv", r"conv5.0"),
        (r"last/bn", r"conv5.1"),
        (r"classifier", r"fc"),
    ),
    MobileNetV2: (
        (r"first/conv", r"features.0.0"),
        (r"first/bn", r"features.0.1"),
        # The first block has no `expand`, so its other modules have lower numbers.
        (r"block1/depthwise/conv", r"features.1.conv.0.0"),
        (r"block1/depthwise/bn", r"features.1.conv.0.1"),
        (r"block1/project/conv", r"features.1.conv.1"),
        (r"block1/project/bn", r"features.1.conv.2"),
        (r"block(\d+)/expand/conv", r"features.\1.conv.0.0"),
        (r"block(\d+)/expand/bn", r"features.\1.conv.0.1"),
        (r"block(\d+)/depthwise/conv", r"features.\1.conv.1.0"),
        (r"block(\d+)/depthwise/bn", r"features.\1.conv.1.1"),
        (r"block(\d+)/project/conv", r"features.\1.conv.2"),
        (r"block(\d+)/project/bn", r"features.\1.conv.3"),
        (r"last/conv", r"features.18.0"),
        (r"last/bn", r"features.18.1"),
        (r"classifier", r"classifier.1"),
    ),
    RepVGG: (
        # The first stage is a block, not a list of one block.
        (r"stage0_0/dense/(conv|bn)", r"stage0.rbr_dense.\1"),
        (r"stage0_0/pointwise/(conv|bn)", r"stage0.rbr_1x1.\1"),
        (r"stage(\d)_(\d+)/dense/(conv|bn)", r"stage\1.\2.rbr_dense.\3"),
        (r"stage(\d)_(\d+)/pointwise/(conv|bn)", r"stage\1.\2.rbr_1x1.\3"),
        (r"stage(\d)_(\d+)/identity", r"stage\1.\2.rbr_identity"),
        (r"classifier", r"linear"),
    ),
}
# akamaster's networks, those without projections, have another name for the last layer.
OPTION_A: Rules = (*RESIDUAL, (r"classifier", r"linear"))

ARRAYS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_names(model: linen.Module, variables: PyTree) -> list[str]:
    """PyTorch's name of each leaf, in the order of `jax.tree.leaves(variables)`.

    Raises:
        ValueError: if no rule names a leaf.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
    return [_torch_name(_rules(model), [key.key for key in path]) for path in paths]


def _rules(model: linen.Module) -> Rules:
    if isinstance(model, CifarResNet) and not model.projection:
        return OPTION_A
    return RULES.get(type(model), ())


def _torch_name(rules: Rules, keys: list[str]) -> str:
    _, *modules, array = keys  # "params" or "batch_stats" before
    module = "/".join(modules)
    for pattern, name in rules:
        if match := re.fullmatch(pattern, module):
            return f"{match.expand(name)}.{ARRAYS[array]}"
    raise ValueError(
        f"no rule gives PyTorch's name of {module}/{array}; add one to RULES in examples/paper/torch_names.py"
    )
