"""ShuffleNetV2 (Ma and others, 2018) for images of 32x32: a first stride of 1, and no max pool."""

import jax
import jax.numpy as jnp
from flax import linen

from examples.paper.models.layers import ConvBN, classifier, global_average

STAGES = (4, 8, 4)
# Channels of the three stages.
WIDTHS = {0.5: (48, 96, 192), 1.0: (116, 232, 464), 1.5: (176, 352, 704)}


def shuffled(x: jax.Array) -> jax.Array:
    """The channels of the two halves, interleaved."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return halves.swapaxes(-1, -2).reshape(x.shape)


class Unit(linen.Module):
    """Half of the channels pass through three convolutions, the others bypass them; with stride 2, all take both
    paths."""

    features: int
    stride: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        half = self.features // 2
        if self.stride == 1:
            past, through = jnp.split(x, 2, axis=-1)
        else:
            past, through = ConvBN(x.shape[-1], 3, self.stride, x.shape[-1], name="past_depthwise")(x), x
            past = ConvBN(half, 1, activation=linen.relu, name="past_pointwise")(past)
        through = ConvBN(half, 1, activation=linen.relu, name="first_pointwise")(through)
        through = ConvBN(half, 3, self.stride, half, name="depthwise")(through)
        through = ConvBN(half, 1, activation=linen.relu, name="last_pointwise")(through)
        return shuffled(jnp.concatenate([past, through], axis=-1))


class ShuffleNetV2(linen.Module):
    """Width 0.5, 1.0 or 1.5, as in github.com/chenyaofo/pytorch-cifar-models."""

    width: float
    classes: int = 10

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvBN(24, activation=linen.relu, name="first")(x)
        for stage, (units, features) in enumerate(zip(STAGES, WIDTHS[self.width], strict=True), start=2):
            for unit in range(units):
                x = Unit(features, 2 if unit == 0 else 1, name=f"stage{stage}_{unit}")(x)
        x = ConvBN(1024, 1, activation=linen.relu, name="last")(x)
        return classifier(self.classes)(global_average(x))
