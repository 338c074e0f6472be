"""Layers with PyTorch's conventions, so that weights trained there give the same answers here."""

from collections.abc import Callable

import jax
from flax import linen

# Otherwise an accelerator may multiply float32 at lower precision, and the float baseline would not be float32.
FULL = jax.lax.Precision.HIGHEST


def convolution(
    features: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False, name: str = "conv"
) -> linen.Conv:
    """A square convolution, padded equally on all sides; Flax's `SAME` pads strided ones on one side."""
    padding = ((size // 2, size // 2),) * 2
    return linen.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=bias,
        precision=FULL,
        name=name,
    )


def batch_norm(name: str = "bn") -> linen.BatchNorm:
    """Batch norm with the stored statistics, and PyTorch's epsilon and momentum."""
    return linen.BatchNorm(use_running_average=True, epsilon=1e-5, momentum=0.9, name=name)


def classifier(classes: int) -> linen.Dense:
    return linen.Dense(classes, precision=FULL, name="classifier")


def global_average(x: jax.Array) -> jax.Array:
    return x.mean(axis=(1, 2))


class ConvBN(linen.Module):
    """A convolution without bias, its batch norm, and an optional activation."""

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = convolution(self.features, self.size, self.stride, self.groups)(x)
        x = batch_norm()(x)
        return x if self.activation is None else self.activation(x)
