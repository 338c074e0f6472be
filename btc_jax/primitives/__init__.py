"""Operations on packed leaves as JAX primitives, one file each, with implementations by platform.

In a jaxpr a packed leaf is decoded by one equation, whatever its format. So function transformations can find it (see
`btc_jax.fusion`), and the implementation is chosen when the function is compiled. XLA's own operations are the
reference, and work everywhere; on CPUs there are native kernels.
"""

from btc_jax.primitives.lookup import rows as rows
from btc_jax.primitives.product import multiply as multiply
from btc_jax.primitives.whole import decode as decode
from btc_jax.primitives.whole import decode_p as decode_p
