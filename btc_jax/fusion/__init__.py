"""Functions of packed trees that hold no more than one dense leaf at a time."""

from btc_jax.fusion.fused import fused as fused
