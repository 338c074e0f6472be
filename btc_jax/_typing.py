"""Array annotations, checked in the tests by jaxtyping and free of cost for users.

jaxtyping is a tool of the tests, not a dependency. Where it is absent, `Float[Array, "blocks size"]` is plain `Any`.
"""

from typing import TYPE_CHECKING, Any, Literal

from jax import Array as Array
from jax.typing import ArrayLike as ArrayLike

if TYPE_CHECKING:  # to a type checker, with jaxtyping or without, `Float[Array, "blocks size"]` is an `Array`
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as UInt
    from typing import Annotated as UInt8
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
