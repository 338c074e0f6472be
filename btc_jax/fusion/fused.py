"""`fused`: functions of packed trees that hold one dense leaf at a time.

`jax.jit` of a model on packed parameters decodes each leaf by an equation of its own, which depends on the parameters
only. So XLA may decode all of them before the first layer begins, and on CPU it does. `fused` interprets the function
equation by equation, as `jax.grad` does, and defers decoding until a leaf meets the other operand of its use; it then
makes decoding depend on that operand, and on the layer before.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from btc_jax._typing import Array
from btc_jax.fusion.late import VIEWS, Late, bind, can_wait_for, first
from btc_jax.fusion.uses import looked_up, product
from btc_jax.primitives import decode_p

_P = ParamSpec("_P")
_R = TypeVar("_R")

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Primitives that call a jaxpr, and the name of its parameter. With packed leaves inside, it is inlined."""


def fused(f: Callable[_P, _R]) -> Callable[_P, _R]:
    """Transform a function into one that computes the same, but decodes each packed leaf only when it is used.

    Under `jax.jit` the memory for decoded weights is that of one leaf, at most two, instead of all of them. Packed
    leaves may be arguments of the function, anywhere in a tree, or closed over. `jit`, `scan`, `while_loop`, `cond`,
    `checkpoint` and functions with custom derivatives are traced through.

    Args:
        f: a function of arrays, packed leaves and trees of them that `jax.jit` could trace, such as the `apply` of a
            Flax model. Arguments, and leaves of arguments, that are not arrays are passed on as they are, and so are
            static.

    Returns:
        The function to call, or to pass to `jax.jit`, instead. It can be differentiated with respect to anything that
        is not packed. A function inside with a custom derivative loses it if packed leaves pass through it.

    Raises:
        TypeError: if `f` raises one, or returns anything but arrays.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, btc_jax
        >>> model, x = nn.Dense(512), jnp.ones((1, 512))
        >>> packed = btc_jax.btc_quantize(model.init(jax.random.key(0), x), bits=4.5)
        >>> jax.jit(fused(model.apply))(packed, x).shape
        (1, 512)
    """

    @functools.wraps(f)
    def late(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | np.generic)]

        def of_arrays(arrays: Sequence[Any]) -> Any:
            given = dict(zip(places, arrays, strict=True))
            rebuilt: Any = structure.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
            function: Any = f
            return function(*rebuilt[0], **rebuilt[1])

        arrays = [leaves[i] for i in places]
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        results = _Evaluation().run(closed.jaxpr, closed.consts, arrays)
        return jax.tree.structure(shapes).unflatten(results)

    return late


class _Evaluation:
    """Evaluates a jaxpr, and keeps track of what was last computed from a packed leaf."""

    def __init__(self):
        self.last: Any = None

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results, decoded."""
        return [self.decoded(value) for value in self._values(jaxpr, consts, args)]

    def _values(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(
            zip(jaxpr.invars, args, strict=True)
        )

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [value(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        name, late = eqn.primitive.name, [value for value in values if isinstance(value, Late)]
        if eqn.primitive is decode_p and not late:
            return [Late(values, (eqn,))]
        if name in VIEWS and len(values) == len(late) == 1:
            return [late[0]._replace(steps=(*late[0].steps, eqn))]
        if late or _decodes(eqn):
            if name in _CALLS:
                closed = eqn.params[_CALLS[name]]
                return self._values(closed.jaxpr, closed.consts, values)
            if name in _CONTROL:
                return self._followed(_CONTROL[name](eqn.params, values))
        if len(late) == 1 and name in _USES:
            result = _USES[name](eqn, values, self._waited([value for value in values if not isinstance(value, Late)]))
            if result is not None:
                return self._followed([result])
        return self._bound(eqn, values, late)

    def _bound(self, eqn: JaxprEqn, values: list[Any], late: list[Late]) -> Sequence[Any]:
        others = [value for value in values if not isinstance(value, Late)]
        results = bind(eqn, [self.decoded(value, others) for value in values])
        return self._followed(results) if late else results

    def _followed(self, results: Sequence[Any]) -> Sequence[Any]:
        self.last = next((value for value in results if can_wait_for(value)), self.last)
        return results

    def decoded(self, value: Any, others: Sequence[Any] = ()) -> Any:
        """A value that may be late: decoded after the others, and after what was last computed."""
        if not isinstance(value, Late):
            return value
        return value.decoded(self._waited(others))

    def _waited(self, others: Sequence[Any]) -> Array | None:
        waited = [x for x in (*others, self.last) if x is not None and can_wait_for(x)]
        return jnp.stack([first(x) for x in waited]) if waited else None


_USES = {"dot_general": product, "gather": looked_up, "dynamic_slice": looked_up}
"""Primitives that need not decode a leaf."""


def _decodes(eqn: JaxprEqn) -> bool:
    """Whether there is a packed leaf in the functions of an equation."""
    return any(map(_holds_decode, jaxprs_in_params(eqn.params)))


def _holds_decode(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive is decode_p or _decodes(eqn) for eqn in jaxpr.eqns)


def _function(closed: ClosedJaxpr, before: Sequence[Any] = ()) -> Callable[..., list[Any]]:
    """The function of a jaxpr, evaluated by itself: loops and branches have their own order."""
    return lambda *args: _Evaluation().run(closed.jaxpr, closed.consts, [*before, *args])


def _now(values: Sequence[Any]) -> list[Any]:
    return [_Evaluation().decoded(value) for value in values]


def _scan(params: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
    consts, carry = params["num_consts"], params["num_carry"]
    step = _function(params["jaxpr"], values[:consts])
    first, slices = _now(values[consts : consts + carry]), _now(values[consts + carry :])

    def body(carried: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        results = step(*carried, *sliced)
        return results[:carry], results[carry:]

    last, stacked = lax.scan(
        body, first, slices, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*last, *stacked]


def _while(params: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition = _function(params["cond_jaxpr"], values[:first])
    body = _function(params["body_jaxpr"], values[first:second])
    return lax.while_loop(lambda carry: condition(*carry)[0], lambda carry: body(*carry), _now(values[second:]))


def _cond(params: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
    index, *operands = values
    # Late values are closed over, so that only the branch that runs decodes them.
    return lax.switch(index, [functools.partial(_function(branch), *operands) for branch in params["branches"]])


def _checkpoint(params: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
    function = _function(ClosedJaxpr(params["jaxpr"], ()))
    places = [i for i, value in enumerate(values) if not isinstance(value, Late)]

    def of_arrays(*arrays: Any) -> list[Any]:
        given = dict(zip(places, arrays, strict=True))
        return function(*(given.get(i, value) for i, value in enumerate(values)))

    again = jax.checkpoint(of_arrays, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return again(*(values[i] for i in places))


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "remat2": _checkpoint, "checkpoint": _checkpoint}
"""Primitives whose functions are interpreted separately."""
