"""Checkpoint files of other systems into compressed ones, and back, leaf by leaf: one in memory at a time.

Only of a Flax msgpack file all is in memory: it has no index.
"""

from btc_jax.stream.compress import OnLeaf as OnLeaf
from btc_jax.stream.compress import QuantizedFile as QuantizedFile
from btc_jax.stream.compress import quantize_file as quantize_file
from btc_jax.stream.plan import plan_file as plan_file
from btc_jax.stream.plan import read_tree as read_tree
from btc_jax.stream.restore import DequantizedFile as DequantizedFile
from btc_jax.stream.restore import dequantize_file as dequantize_file
