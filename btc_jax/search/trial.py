"""One trial: a configuration is packed, measured, evaluated, and compared with the limits."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from btc_jax._typing import PyTree
from btc_jax.allocate import Sharing
from btc_jax.codecs import Codec
from btc_jax.evaluate import Evaluation
from btc_jax.metrics import TreeMetrics, metrics_of
from btc_jax.policy import Policy
from btc_jax.tree import quantized

Evaluate = Callable[[PyTree], Any]
"""`evaluate(tree)` of a dense or packed tree returns an accuracy from 0 to 1, or an `Evaluation`."""

_ROUNDING = 1e-6
"""A divergence of zero may come out this far below zero in float32."""
_REMEDY = "return btc_evaluate(apply, tree, inputs, reference=btc_logits(apply, params, inputs))"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration that was tried.

    Attributes:
        codec: the default codec of the policy, with this trial's block size.
        metrics: bits, bytes and error of the packed tree.
        accuracy: what `evaluate` returned, 0 to 1; `None` if it was not called, failed, or returned none.
        drop: points (hundredths) of accuracy lost against the float tree; `None` without accuracy.
        seconds: time for packing, measuring and evaluating.
        violation: the limit it breaks, in words; empty if it is within all limits.
        bits: the budget of effective bits, if bits are searched.
        kl: divergence of the answers from those of the float tree, in nats; `None` if `evaluate` returned none.
        agreement: share of answers that are the same, 0 to 1; `None` likewise.
    """

    codec: Codec
    metrics: TreeMetrics
    accuracy: float | None
    drop: float | None
    seconds: float
    violation: str
    bits: float | None = None
    kl: float | None = None
    agreement: float | None = None

    @property
    def ok(self) -> bool:
        return not self.violation

    @property
    def name(self) -> str:
        """What was tried, in words."""
        return f"block size {self.codec.block_size}" if self.bits is None else f"a budget of {self.bits:.6g} bits"

    def to_json(self) -> dict[str, Any]:
        fields = {"codec": self.codec.to_json(), "bits": self.bits, "metrics": self.metrics.to_json()}
        fields |= {"accuracy": self.accuracy, "drop": self.drop, "kl": self.kl, "agreement": self.agreement}
        return fields | {"seconds": self.seconds, "violation": self.violation}


class Answers(NamedTuple):
    """What `evaluate` returned for a tree, as far as it goes."""

    accuracy: float | None = None
    kl: float | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that a configuration must keep to; `None` means no limit."""

    max_rmse: float | None
    max_drop: float | None
    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_rmse", "max_drop", "max_kl"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more, or None for no limit")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement is {self.min_agreement}; it must be from 0 to 1, or None for no limit")

    @property
    def predictable(self) -> bool:
        """Whether trials tell how many bits they are from a limit."""
        return any(limit is not None for limit in (self.max_rmse, self.max_kl, self.min_agreement))

    def refuse_without_answers(self, answers: Answers) -> None:
        """Raise if `evaluate` does not return what a limit needs."""
        for limit, name in (("max_kl", "kl"), ("min_agreement", "agreement")):
            if getattr(self, limit) is not None and getattr(answers, name) is None:
                raise ValueError(f"{limit} is {getattr(self, limit)}, and evaluate returns no {name}; {_REMEDY}")

    def broken(self, rmse: float, drop: float | None, answers: Answers) -> str:
        """The limit that is exceeded, in words, or an empty string."""
        if self.max_rmse is not None and rmse > self.max_rmse:
            return f"rmse {_beyond(rmse, self.max_rmse, '.3g')}"
        if self.max_drop is not None and drop is not None and drop > self.max_drop:
            return f"accuracy drop {_beyond(drop, self.max_drop, '.2f')} points"
        if self.max_kl is not None and answers.kl is not None and answers.kl > self.max_kl:
            return f"KL {_beyond(answers.kl, self.max_kl, '.3g')}"
        if self.min_agreement is not None and answers.agreement is not None and answers.agreement < self.min_agreement:
            return f"agreement {answers.agreement:.6g} < {self.min_agreement:g}"
        return ""

    def needed_bits(self, rmse: float, answers: Answers) -> float | None:
        """How many more bits would just suffice; `None` if unknown. One bit roughly halves the error, and with it the
        share of answers that change; the divergence is quadratic in the error.
        """
        changed = None if answers.agreement is None else 1 - answers.agreement
        allowed = None if self.min_agreement is None else 1 - self.min_agreement
        figures = ((rmse, self.max_rmse, 1.0), (answers.kl, self.max_kl, 0.5), (changed, allowed, 1.0))
        needs = [
            bits * math.log2(value / limit) for value, limit, bits in figures if value and limit and value < math.inf
        ]
        return max(needs, default=None)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A trial and its tree.

    Attributes:
        failure: what went wrong in evaluating it, or an empty string.
        needs: how many more bits the limits require; `None` if unknown.
    """

    trial: Trial
    tree: PyTree
    failure: str
    needs: float | None


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Tries configurations on one float tree, whose accuracy is `baseline`."""

    params: PyTree
    limits: Limits
    evaluate: Evaluate | None
    baseline: float | None

    def run(self, policy: Policy, sharing: Sharing) -> Outcome:
        start = time.perf_counter()
        assert policy.codec, "one_policy comes first"
        tree, metrics = self.packed(policy, sharing)
        answers, failure = answers_of(self.evaluate, tree)
        # Rounded: in floating point, 0.92 - 0.90 exceeds 2 points.
        known = answers.accuracy is not None and self.baseline is not None
        drop = round(100 * (self.baseline - answers.accuracy), 9) if known else None  # pyright: ignore
        rmse = metrics.total.rmse
        violation = failure or self.limits.broken(rmse, drop, answers)
        bits = sharing.target.value if sharing.target else None
        trial = Trial(
            policy.codec,
            metrics,
            answers.accuracy,
            drop,
            time.perf_counter() - start,
            violation,
            bits,
            answers.kl,
            answers.agreement,
        )
        return Outcome(trial, tree, failure, self.limits.needed_bits(rmse, answers))

    def packed(self, policy: Policy, sharing: Sharing) -> tuple[PyTree, TreeMetrics]:
        """A tree and its metrics."""
        tree, errors = quantized(self.params, policy, sharing)
        return tree, metrics_of(self.params, tree, policy, errors)


def answers_of(evaluate: Evaluate | None, tree: PyTree) -> tuple[Answers, str]:
    """What `evaluate` returned, or what went wrong: a failure is data here, so that the trials made so far are kept."""
    if evaluate is None:
        return Answers(), ""
    try:
        answer = jax.block_until_ready(evaluate(tree))
    except Exception as error:
        return Answers(), f"evaluate raised {type(error).__name__}: {error}"
    if isinstance(answer, Evaluation):
        found = Answers(answer.top1, answer.kl, answer.agreement)
    else:
        found = Answers(_number(answer))
    if found == Answers() or not _can_be(found):
        what = f"an Evaluation with {found}" if isinstance(answer, Evaluation) else f"{answer!r:.80}"
        return Answers(), f"evaluate returned {what}; it must return an accuracy from 0 to 1, or an Evaluation"
    return found, ""


def _can_be(answers: Answers) -> bool:
    shares = all(share is None or 0 <= share <= 1 for share in (answers.accuracy, answers.agreement))
    return shares and (answers.kl is None or answers.kl >= -_ROUNDING)


def _number(answer: Any) -> float:
    try:
        return float(answer)
    except (TypeError, ValueError):
        return math.nan


def _beyond(value: float, limit: float, form: str) -> str:
    """`value > limit`, with enough digits to see it."""
    form = next((f for f in (form, ".6g", ".9g") if float(format(value, f)) > limit), ".17g")
    return f"{value:{form}} > {limit:g}"
