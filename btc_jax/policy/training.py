"""Which leaves of a tree belong to the training of a model, not to the model: optimizer states, moving averages,
gradients. They mirror the names of the parameters, so only their containers tell.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax

from btc_jax._typing import PyTree
from btc_jax.policy.kinds import snake, split_path

REASONS = OPTIMIZER, AVERAGE, GRADIENTS = "optimizer state", "moving average", "gradients"

_PARAMS = r"(params?|parameters|model|weights|variables)"
_MODEL = rf"({_PARAMS}|state(_dict)?|net(work)?|unet|encoder|decoder|transformer)"
_PARAMETERS = frozenset(("params", "param", "parameters", "model"))
_NAMES = {
    OPTIMIZER: re.compile(
        r"(.*_)?opt(im(izer)?)?_states?(_.*)?|optim(izers?)?|optimizer_(variables|vars|weights)|param_states"
        r"|inner_(opt_)?states?|base_optimizer_state|hyperparams(_states)?|(max_)?exp_(avgs?(_sq)?|inf)|momentum_buffer"
        r"|square_avg|acc_delta|diff_(params|updates)_memory|v_row|v_col|sum_of_squares|adam_[mv]|adam(w|ax|_1)?|nadam|sgd|rmsprop|ada(grad|delta|factor)"
    ),
    AVERAGE: re.compile(
        rf"ema(_?\d+)?|ema_{_MODEL}|{_MODEL}_ema|_?ema_(w|dw|cluster_size)|shadow_{_MODEL}|moving_averages?"
        rf"|(avg|averaged?|polyak|swa)_{_PARAMS}|{_PARAMS}_(avg|averaged?|polyak|swa)|exponential_?moving_?average"
    ),
    GRADIENTS: re.compile(
        r"(main_)?(grads|gradients)|((acc(um(ulated)?)?|avg|mean|main)_)(grads?|gradients?)"
        r"|(grads?|gradients?)_(acc(um(ulat(ed|or|ion))?)?|buffer|sum)"
    ),
}
"""Names that no layer has."""

_COUNTERS = frozenset(("count", "step", "steps", "t"))
_MOMENTS = frozenset(("mu", "nu", "nu_max", "m", "m1", "m2", "v", "z", "trace", "momentum", "velocity", "e_g", "e_x"))
"""Fields of optimizers that layers have as well: a VAE has a layer `mu`, attention has a `v`."""
_NEXT_TO_PARAMETERS = {
    **dict.fromkeys(("accum", "accumulator", "delta", "fisher", "g", "grad", "hessian", "noise", "old"), OPTIMIZER),
    **dict.fromkeys(("old_params", "prev", "prev_params", "previous", "second_moment", "updates", "y"), OPTIMIZER),
    **dict.fromkeys(("averaged", "lookahead", "polyak", "shadow", "slow", "swa"), AVERAGE),
    **dict.fromkeys(_MOMENTS, OPTIMIZER),
}
"""What is next to the parameters, with just their names below."""
_FIELDS = _COUNTERS | _MOMENTS | {"v_row", "v_col"}
_WITNESSES = [{"mu", "count"}, {"nu", "count"}, {"mu", "nu"}, {"v", "v_row"}, {"v", "v_col"}, {"e_g", "e_x"}]
_WITNESSES += [{"m", "v", counter} for counter in _COUNTERS] + [{"trace", "count"}, {"momentum", "count"}]
"""Fields that only optimizers have together."""

Parts = tuple[str, ...]


def by_path(paths: Sequence[str]) -> list[str]:
    """The part of the training that each leaf is, by its path and those of the others; empty for a parameter.

    The innermost name decides, so gradients that an optimizer accumulates are gradients. Both `/` and `.` separate the
    parts of a path.

    Examples:
        >>> by_path(["params/v/kernel", "opt_state/0/mu/v/kernel", "ema_params/v/kernel", "grads/v/kernel"])
        ['', 'optimizer state', 'moving average', 'gradients']
    """
    split = [tuple(map(snake, split_path(path))) for path in paths]
    below: dict[Parts, set[str]] = defaultdict(set)
    for parts in split:
        for i, part in enumerate(parts):
            below[parts[:i]].add(part)
    known: dict[Parts, str] = {}
    return [_innermost(parts, below, known) for parts in split]


def _innermost(parts: Parts, below: dict[Parts, set[str]], known: dict[Parts, str]) -> str:
    found = ""
    for end in range(1, len(parts) + 1):
        node = parts[:end]
        if node not in known:
            known[node] = _by_name(node, below) or _by_siblings(node, below)
        found = known[node] or found
    return found


def _by_name(node: Parts, below: dict[Parts, set[str]]) -> str:
    *_, name = node
    if name in ("optimizer", "optim") and below.get(node, set()) & {"target", *_PARAMETERS}:
        return ""  # it holds the parameters as well: what is next to them is its state
    if len(node) > 1 and node[-2] in ("optimizer", "optim"):
        return "" if name in {"target", *_PARAMETERS} else OPTIMIZER
    if name in ("grad", "gradient") and (len(node) == 1 or node not in below):
        return GRADIENTS
    return next((reason for reason, pattern in _NAMES.items() if pattern.fullmatch(name)), "")


def _by_siblings(node: Parts, below: dict[Parts, set[str]]) -> str:
    parent, name = node[:-1], node[-1]
    siblings = below[parent]
    if name == "opt" and siblings & _PARAMETERS:
        return OPTIMIZER
    if node in below and any(_alike(node, (*parent, other), below) for other in siblings & _PARAMETERS - {name}):
        return _NEXT_TO_PARAMETERS.get(name, "")
    if name not in _MOMENTS:
        return ""
    together = siblings - _PARAMETERS <= _FIELDS and any(witness <= siblings for witness in _WITNESSES)
    alone = bool(parent) and all(part.isdigit() for part in parent) and siblings <= {"trace", "nu"}
    return OPTIMIZER if together or alone else ""


def _alike(a: Parts, b: Parts, below: dict[Parts, set[str]]) -> bool:
    """Whether the same names occur below both."""
    names = below.get(a, set())
    return names == below.get(b, set()) and all(_alike((*a, name), (*b, name), below) for name in names)


def by_container(tree: PyTree, is_leaf: Callable[[Any], bool]) -> list[str]:
    """The part of the training that each leaf is, by the types of the containers around it: an optax state, or that of
    an NNX optimizer; empty if they do not tell.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> by_container((jnp.ones(3), optax.TraceState({"w": jnp.ones(3)})), lambda x: False)
        ['', 'optimizer state']
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: is_leaf(node) or bool(_of_type(type(node))))
    counts = [1 if is_leaf(node) else len(jax.tree.leaves(node, is_leaf=is_leaf)) for node in nodes]
    return [_of_type(type(node)) for node, count in zip(nodes, counts, strict=True) for _ in range(count)]


@functools.lru_cache(1024)
def _of_type(kind: type) -> str:
    """By name, so that neither library has to be imported."""
    if kind.__module__.partition(".")[0] == "optax" and kind.__name__ != "LookaheadParams":
        return AVERAGE if kind.__name__ == "EmaState" else OPTIMIZER
    nnx = any(base.__name__ == "OptState" and base.__module__.startswith("flax.nnx") for base in kind.__mro__)
    return OPTIMIZER if nnx else ""
