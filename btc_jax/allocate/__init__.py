"""Bits shared out over the leaves of a tree, so that all of them together meet a target with the least error.

Every block of an adaptive codec takes the width with the least error plus slope times bits, where errors of leaves that
move the answers more count more. With one slope for all, no bit could save more error anywhere else (the condition of
Lagrange); so one number is searched for, whatever the target.
"""

from btc_jax.allocate.sharing import Goal as Goal
from btc_jax.allocate.sharing import Sharing as Sharing
from btc_jax.allocate.sharing import sharing_of as sharing_of
from btc_jax.allocate.slope import allocate as allocate
from btc_jax.allocate.survey import Item as Item
from btc_jax.allocate.target import Target as Target
from btc_jax.allocate.target import default_target as default_target
from btc_jax.allocate.target import nbytes_of as nbytes_of
