"""RepVGG-A0 (Ding and others, 2021) for images of 32x32: the first two strides are 1 instead of 2.

It is trained with three branches per block. They are linear, so one 3x3 convolution can replace them: `fused`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from examples.paper.models.layers import ConvBN, batch_norm, classifier, convolution, global_average

PyTree = Any

# For each stage: blocks, channels, stride of the first block.
STAGES = ((1, 48, 1), (2, 48, 1), (4, 96, 2), (14, 192, 2), (1, 1280, 2))
EPSILON = batch_norm().epsilon


class RepVGGBlock(linen.Module):
    """The sum of a 3x3 and a 1x1 convolution and, if the shape is unchanged, the input, each with its batch norm."""

    features: int
    stride: int
    fused: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.fused:
            return linen.relu(convolution(self.features, 3, self.stride, bias=True, name="fused")(x))
        y = ConvBN(self.features, 3, self.stride, name="dense")(x) + ConvBN(
            self.features, 1, self.stride, name="pointwise"
        )(x)
        if self.stride == 1 and x.shape[-1] == self.features:
            y = y + batch_norm(name="identity")(x)
        return linen.relu(y)


class RepVGG(linen.Module):
    """The training form, or with `fused` the one for the variables that `fuse` returns."""

    classes: int = 10
    fused: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, (blocks, features, first) in enumerate(STAGES):
            for block in range(blocks):
                x = RepVGGBlock(features, first if block == 0 else 1, self.fused, name=f"stage{stage}_{block}")(x)
        return classifier(self.classes)(global_average(x))


def fuse(variables: PyTree) -> PyTree:
    """Convert variables of the training form to the fused form, which has the same logits."""
    params, stats = variables["params"], variables["batch_stats"]
    blocks = {name: {"fused": _fused_block(params[name], stats[name])} for name in stats}
    return {"params": params | blocks}


def _fused_block(params: PyTree, stats: PyTree) -> PyTree:
    dense, pointwise = (params[name]["conv"]["kernel"] for name in ("dense", "pointwise"))
    branches = [
        _with_norm(dense, params["dense"]["bn"], stats["dense"]["bn"]),
        _with_norm(_centred(pointwise), params["pointwise"]["bn"], stats["pointwise"]["bn"]),
    ]
    if "identity" in params:
        unit = jnp.eye(dense.shape[-1], dtype=dense.dtype)[None, None]
        branches.append(_with_norm(_centred(unit), params["identity"], stats["identity"]))
    kernels, biases = zip(*branches, strict=True)
    return {"kernel": sum(kernels[1:], kernels[0]), "bias": sum(biases[1:], biases[0])}


def _centred(kernel: jax.Array) -> jax.Array:
    """A 1x1 kernel at the centre of a 3x3 one."""
    return jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))


def _with_norm(kernel: jax.Array, norm: PyTree, stats: PyTree) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a convolution fused with the batch norm after it."""
    scale = norm["scale"] / jnp.sqrt(stats["var"] + EPSILON)
    return kernel * scale[None, None, None], norm["bias"] - stats["mean"] * scale
