"""Fully connected networks, for tabular data."""

import jax
from flax import linen

from examples.paper.models.layers import FULL, classifier


class MLP(linen.Module):
    """Dense layers with ReLU between them."""

    hidden: tuple[int, ...]
    classes: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index, width in enumerate(self.hidden):
            x = linen.relu(linen.Dense(width, precision=FULL, name=f"hidden{index}")(x))
        return classifier(self.classes)(x)
