"""Bit allocation over the leaves of a tree, so that together they meet a target with the least error. Every block of a
rate-controlled codec takes the width with the least `error + slope * bits`, where the error of a leaf is weighted by
how much it moves the answers. The slope is the Lagrange multiplier of the rate-distortion problem: with one slope for
all blocks, no bit could save more error elsewhere. So a single number is searched for, whatever the target.
"""

from btc_jax.allocate.sharing import Goal as Goal
from btc_jax.allocate.sharing import Sharing as Sharing
from btc_jax.allocate.sharing import sharing_of as sharing_of
from btc_jax.allocate.slope import allocate as allocate
from btc_jax.allocate.survey import Item as Item
from btc_jax.allocate.target import Target as Target
from btc_jax.allocate.target import default_target as default_target
from btc_jax.allocate.target import nbytes_of as nbytes_of
