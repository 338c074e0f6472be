"""Checkpoint files of other systems into compressed ones, and back, leaf by leaf: one in memory at a time.

Only of a Flax msgpack file all is in memory: it has no index.
"""

from btc_jax.stream.compress import Compressed as Compressed
from btc_jax.stream.compress import OnLeaf as OnLeaf
from btc_jax.stream.compress import compress_file as compress_file
from btc_jax.stream.plan import plan_file as plan_file
from btc_jax.stream.plan import read_tree as read_tree
from btc_jax.stream.restore import Restored as Restored
from btc_jax.stream.restore import restore_file as restore_file
