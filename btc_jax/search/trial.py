"""One configuration tried: packed, measured, evaluated, and held against the limits."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from btc_jax._typing import PyTree
from btc_jax.allocate import sharing_of
from btc_jax.codecs import Codec
from btc_jax.metrics import TreeMetrics, metrics_of
from btc_jax.policy import Policy
from btc_jax.tree import quantized

Evaluate = Callable[[PyTree], float]
"""`evaluate(params) -> accuracy` from 0 to 1, for a dense tree as for a packed one."""
Divergence = Callable[[PyTree], float]
"""`divergence(tree) -> KL` in nats, of the answers of a packed tree from those of the float tree."""

_ROUNDING = 1e-6
"""A divergence of nothing may come out as much below zero, in float32."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        codec: the default codec of the policy, with this trial's block size.
        metrics: bits, bytes and error of the packed tree.
        accuracy: what `evaluate` returned, 0 to 1; `None` if it was not called or failed.
        drop: points (hundredths) of accuracy lost against the float tree; `None` without accuracy.
        seconds: time for packing, measuring and evaluating.
        broke: the limit it broke, in words; empty if it held.
        bits: the budget of effective bits that was given, where bits are searched.
        kl: what `divergence` returned, in nats; `None` if it was not called or failed.
    """

    codec: Codec
    metrics: TreeMetrics
    accuracy: float | None
    drop: float | None
    seconds: float
    broke: str
    bits: float | None = None
    kl: float | None = None

    @property
    def held(self) -> bool:
        return not self.broke

    @property
    def name(self) -> str:
        """What was tried, in words."""
        return f"block size {self.codec.block_size}" if self.bits is None else f"a budget of {self.bits:.6g} bits"

    def to_json(self) -> dict[str, Any]:
        fields = {"codec": self.codec.to_json(), "bits": self.bits, "metrics": self.metrics.to_json()}
        fields |= {"accuracy": self.accuracy, "drop": self.drop, "kl": self.kl}
        return fields | {"seconds": self.seconds, "broke": self.broke}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a configuration must keep to; `None` is no limit."""

    max_rmse: float | None
    max_drop: float | None
    max_kl: float | None = None

    def __post_init__(self):
        for name in ("max_rmse", "max_drop", "max_kl"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more, or None for no limit")

    def broken(self, rmse: float, drop: float | None, kl: float | None) -> str:
        if self.max_rmse is not None and rmse > self.max_rmse:
            return f"rmse {_above(rmse, self.max_rmse, '.3g')}"
        if self.max_drop is not None and drop is not None and drop > self.max_drop:
            return f"accuracy drop {_above(drop, self.max_drop, '.2f')} points"
        if self.max_kl is not None and kl is not None and kl > self.max_kl:
            return f"KL {_above(kl, self.max_kl, '.3g')}"
        return ""


class Tried(NamedTuple):
    """A trial, its tree, and what went wrong in evaluating it, or an empty string."""

    trial: Trial
    tree: PyTree
    trouble: str


@dataclasses.dataclass(frozen=True)
class Judge:
    """Tries configurations on one float tree, of which `baseline` is the accuracy."""

    params: PyTree
    limits: Limits
    evaluate: Evaluate | None
    divergence: Divergence | None
    baseline: float | None

    def try_(self, policy: Policy, bits: float | None = None) -> Tried:
        start = time.perf_counter()
        assert policy.codec, "one_policy comes first"
        tree, errors = quantized(self.params, policy, sharing_of(bits=bits))
        metrics = metrics_of(self.params, tree, policy, errors)
        accuracy, trouble = accuracy_of(self.evaluate, tree)
        kl, more = (None, "") if trouble else _divergence_of(self.divergence, tree)
        trouble = trouble or more
        # Rounded, or 0.92 - 0.90 were more than 2 points.
        drop = None if accuracy is None or self.baseline is None else round(100 * (self.baseline - accuracy), 9)
        broke = trouble or self.limits.broken(metrics.total.rmse, drop, kl)
        trial = Trial(policy.codec, metrics, accuracy, drop, time.perf_counter() - start, broke, bits, kl)
        return Tried(trial, tree, trouble)


def accuracy_of(evaluate: Evaluate | None, tree: PyTree) -> tuple[float | None, str]:
    """The accuracy, or what went wrong. A failure must not lose the trials made, so it is data here."""
    return _answer_of(evaluate, tree, "evaluate", "an accuracy from 0 to 1", lambda x: 0 <= x <= 1)


def _divergence_of(divergence: Divergence | None, tree: PyTree) -> tuple[float | None, str]:
    return _answer_of(divergence, tree, "divergence", "a divergence of 0 or more", lambda x: x >= -_ROUNDING)


def _answer_of(
    function: Callable[[PyTree], Any] | None, tree: PyTree, name: str, wanted: str, fits: Callable[[float], bool]
) -> tuple[float | None, str]:
    if function is None:
        return None, ""
    try:
        answer = jax.block_until_ready(function(tree))
    except Exception as error:
        return None, f"{name} raised {type(error).__name__}: {error}"
    try:
        number = float(answer)
    except (TypeError, ValueError):
        number = math.nan
    if not fits(number):
        return None, f"{name} returned {answer!r:.80}; it must return {wanted}"
    return number, ""


def _above(value: float, limit: float, form: str) -> str:
    """`value > limit`, with as many digits as it takes to see it."""
    form = next((f for f in (form, ".6g", ".9g") if float(format(value, f)) > limit), ".17g")
    return f"{value:{form}} > {limit:g}"
