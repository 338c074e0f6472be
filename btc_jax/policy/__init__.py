"""Which leaves are quantized, with which codec and in which layout, and why not the others. Values are never read.

what a path says (kinds), what belongs to the training (training) and what the user says (rules) -> a decision (decide)
"""

from btc_jax.policy.decide import Decision as Decision
from btc_jax.policy.decide import Policy as Policy
from btc_jax.policy.decide import implied_codec as implied_codec
from btc_jax.policy.files import load_rules as load_rules
from btc_jax.policy.rules import BTCPolicyError as BTCPolicyError
from btc_jax.policy.rules import NotFloatingError as NotFloatingError
from btc_jax.policy.rules import NothingPackedError as NothingPackedError
from btc_jax.policy.rules import Rule as Rule
