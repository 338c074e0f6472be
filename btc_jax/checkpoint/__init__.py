"""Packed trees in files. The format, version 1, is specified in docs/format.md.

tree -> structure (containers as JSON) -> leaves (records and arrays) -> manifest -> header (and index) -> write, read
"""

from btc_jax.checkpoint.errors import BTCFormatError as BTCFormatError
from btc_jax.checkpoint.errors import BTCIntegrityError as BTCIntegrityError
from btc_jax.checkpoint.errors import BTCNotCompressedError as BTCNotCompressedError
from btc_jax.checkpoint.errors import BTCTreeWarning as BTCTreeWarning
from btc_jax.checkpoint.errors import BTCUnknownFormatError as BTCUnknownFormatError
from btc_jax.checkpoint.read import Checkpoint as Checkpoint
from btc_jax.checkpoint.read import Verification as Verification
from btc_jax.checkpoint.read import load as load
from btc_jax.checkpoint.read import open_checkpoint as open_checkpoint
from btc_jax.checkpoint.read import verify as verify
from btc_jax.checkpoint.record import LeafRecord as LeafRecord
from btc_jax.checkpoint.write import save as save
