"""The result of a search, also in words, with what to do next."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text

from btc_jax._typing import PyTree
from btc_jax.search.trial import Trial
from btc_jax.tables import Drawn, add_row, new_table


class SearchStatus(enum.StrEnum):
    """How a search ended."""

    COMPLETE = "complete"
    """Every block size kept to the limits, or the smallest budget did."""
    STOPPED = "stopped"
    """A block size or a budget exceeded a limit; the best one found keeps to all of them."""
    NONE_WITHIN_LIMITS = "none within limits"
    """Even the smallest blocks, or the largest budget, exceeded a limit."""
    EVALUATE_FAILED = "evaluate failed"
    """The evaluate function raised, or returned an impossible value."""


@dataclasses.dataclass(frozen=True)
class SearchResult(Drawn):
    """The result of a search. `print` shows it as a table of its trials.

    Attributes:
        status: how it ended.
        message: the same in words, with what to do next.
        best: the best trial within the limits, with the largest blocks or the fewest bits; or `None`.
        tree: the packed tree of `best`, or `None`.
        trials: all trials, in the order they were made.
        accuracy: the float tree's accuracy, or `None`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("error", "accuracy", "kl")

    status: SearchStatus
    message: str
    best: Trial | None
    tree: PyTree | None = dataclasses.field(repr=False)
    trials: tuple[Trial, ...]
    accuracy: float | None

    def to_json(self) -> dict[str, Any]:
        """The record, without the tree, as plain JSON values."""
        best = next((i for i, trial in enumerate(self.trials) if trial is self.best), None)
        fields = {"status": self.status, "message": self.message, "accuracy": self.accuracy, "best": best}
        return fields | {"trials": [trial.to_json() for trial in self.trials]}

    def table(self, title: str = "Search (bits per weight)") -> Table:
        """A row for each trial, with the message as caption. Columns of budgets and divergences appear if there are
        any."""
        rows = [_cells(trial, trial is self.best) for trial in self.trials]
        columns = [name for name in _COLUMNS if name not in _OPTIONAL or any(row[name] for row in rows)]
        table = new_table(title, columns)
        for row, trial in zip(rows, self.trials, strict=True):
            add_row(table, [row[name] for name in columns], "bold" if trial is self.best else None)
        table.caption = Text(self.message)
        return table

    def draw(self, ax: Any, kind: str) -> None:
        """Draws the error, accuracy or divergence of each trial against its effective bits, and marks the best one."""
        name, figure = _PICTURES[kind]
        for label, marker, trials in (
            ("within the limits", "o", [trial for trial in self.trials if trial.ok]),
            ("over a limit", "x", [trial for trial in self.trials if not trial.ok]),
            ("best", "*", [self.best] if self.best else []),
        ):
            points = [(trial.metrics.total.effective_bits, figure(trial)) for trial in trials]
            points = [point for point in points if point[1] is not None]
            if points:
                ax.scatter(*zip(*points, strict=True), s=200 if marker == "*" else 50, marker=marker, label=label)
        ax.set_xlabel("effective bits per weight")
        ax.set_ylabel(name)
        if ax.collections:
            ax.legend()


_PICTURES: dict[str, tuple[str, Callable[[Trial], float | None]]] = {
    "error": ("RMSE of the weights", lambda trial: trial.metrics.total.rmse),
    "accuracy": ("accuracy", lambda trial: trial.accuracy),
    "kl": ("KL divergence of the answers, nats", lambda trial: trial.kl),
}
_COLUMNS = (
    "block",
    "budget",
    "accuracy",
    "drop",
    "KL",
    "agreement",
    "rmse",
    "effective",
    "packed",
    "seconds",
    "verdict",
)
_OPTIONAL = ("budget", "KL", "agreement")


def _cells(trial: Trial, best: bool) -> dict[str, str]:
    total = trial.metrics.total
    return {
        "block": str(trial.codec.block_size),
        "budget": "" if trial.bits is None else f"{trial.bits:.3f}",
        "accuracy": "" if trial.accuracy is None else f"{trial.accuracy:.2%}",
        "drop": "" if trial.drop is None else f"{trial.drop:.2f}",
        "KL": "" if trial.kl is None else f"{trial.kl:.5f}",
        "agreement": "" if trial.agreement is None else f"{trial.agreement:.2%}",
        "rmse": f"{total.rmse:.5f}",
        "effective": f"{total.effective_bits:.3f}",
        "packed": f"{trial.metrics.bytes_after:,}",
        "seconds": f"{trial.seconds:.2f}",
        "verdict": trial.violation or ("best" if best else "holds"),
    }


def status_of(trials: Sequence[Trial], failure: str, complete: bool) -> SearchStatus:
    if failure:
        return SearchStatus.EVALUATE_FAILED
    if complete:
        return SearchStatus.COMPLETE
    return SearchStatus.STOPPED if any(trial.ok for trial in trials) else SearchStatus.NONE_WITHIN_LIMITS


def message_of(status: SearchStatus, best: Trial | None, trials: Sequence[Trial], failure: str, by_bits: bool) -> str:
    words = _BITS if by_bits else _SIZES
    if status is SearchStatus.EVALUATE_FAILED:
        kept = f"{_found(best)}; the {words.rest} are unknown" if best else "No configuration is known to hold"
        return f"{failure}. {kept}. Fix `evaluate` and rerun."
    if best is None:
        first = max(trials, key=lambda trial: trial.bits or 0)
        return f"{_capital(first.name)}, {words.first}, already breaks the limit ({first.violation}). {words.nothing}"
    if status is SearchStatus.COMPLETE:
        return f"{_found(best)}, {words.last}"
    broken = _nearest_broken(trials)
    limit = f"{broken.name} breaks the limit ({broken.violation})"
    return f"{_found(best)}; {limit}. Use the tree found, or raise the limit."


@dataclasses.dataclass(frozen=True)
class _Words:
    """The wording of one kind of search."""

    first: str
    last: str
    rest: str
    nothing: str


_SIZES = _Words(
    first="the first tried",
    last="the largest tried. Try larger block sizes, or fewer bits or a higher threshold in the codec.",
    rest="larger sizes",
    nothing=(
        "Try smaller block sizes, more bits or a lower threshold in the codec, leave sensitive leaves dense by a rule, "
        "or raise the limit."
    ),
)
_BITS = _Words(
    first="the largest allowed",
    last="the smallest allowed. Use the tree found, or allow fewer bits.",
    rest="smaller budgets that were not tried",
    nothing="Allow more bits, leave sensitive leaves dense by a rule, or raise the limit.",
)


def _found(best: Trial) -> str:
    return f"{_capital(best.name)} holds at {best.metrics.total.effective_bits:.2f} bits"


def _nearest_broken(trials: Sequence[Trial]) -> Trial:
    """The violating trial nearest to those within the limits: the last block size, or the largest budget."""
    return max((trial for trial in reversed(trials) if trial.violation), key=lambda trial: trial.bits or 0)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
