"""Array annotations, checked in the tests by jaxtyping and free of cost for users.

jaxtyping is a tool of the tests, not a dependency. Where it is absent, `Float[Array, "blocks size"]` is plain `Any`.
"""

from typing import TYPE_CHECKING, Any, Literal

from jax import Array as Array
from jax.typing import ArrayLike as ArrayLike

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
    from jaxtyping import UInt as UInt
    from jaxtyping import UInt8 as UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt, UInt8
    except ImportError:

        class _Anything:
            def __class_getitem__(cls, item):
                return Any

        Bool = Float = Int = UInt = UInt8 = _Anything

Order = Literal["output-major", "stored", "output-major-taps", "stored-taps"]
"""The order in which the weights of a leaf run through its blocks: see `btc_jax.blocks`."""

PyTree = Any
"""Any JAX pytree: nested dicts, lists, tuples, dataclasses, Linen variables, NNX states and modules."""
