"""The whole evaluation as a list of jobs, each of which is a stored row; see `store`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from examples.paper import averages, costs, experiments
from examples.paper.exams import Exam
from examples.paper.methods import METHODS
from examples.paper.rows import measure
from examples.paper.store import Store
from examples.paper.subjects import Options, Subject, subjects

Row = dict[str, Any]
Results = dict[str, Any]
SWEPT = 50_000_000
"""Networks with at most this many multiply-adds per image are run at every threshold, which takes seconds."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A value to compute once: its section in the results, its name, and what it depends on."""

    section: str
    name: str
    depends: Row
    compute: Callable[[], Any]


def evaluate(options: Options, show: Callable[[str, int, int], None]) -> tuple[Results, Store]:
    """All results that the files available allow.

    Args:
        options: what was asked for.
        show: called before each job with its name, its number from 0, and the total number.
    """
    store = Store(options.output / "rows")
    found, missing = subjects(options, store)
    results: Results = {"missing": missing, "rows": []}
    total = sum(len(METHODS) + len(EXTRAS[subject.kind]) for subject in found) + len(ALONE)
    for number, (subject, job) in enumerate(_jobs(found, show, total)):
        show(job.name, number, total)
        value = store.row(job.name, job.depends, job.compute)
        if job.section == "rows":
            results["rows"].append(subject | value)
        else:
            results.setdefault(job.section, {})[subject.get("name", "all")] = value
    results["networks"] = {subject.what["name"]: subject.what for subject in found}
    return results, store


def _jobs(found: list[Subject], show: Callable[[str, int, int], None], total: int) -> Iterator[tuple[Row, Job]]:
    """Jobs subject by subject; each exam is created when its turn comes, and released afterwards."""
    done = 0
    for subject in found:
        show(f"preparing {subject.what['title']}", done, total)
        for job in subject_jobs(subject, subject.exam()):
            yield subject.what, job
            done += 1
    for name, compute in ALONE.items():
        yield {}, Job(name, name, {}, compute)


def subject_jobs(subject: Subject, exam: Exam) -> Iterator[Job]:
    """A row for each quantizer, and the experiments for this kind of subject."""
    depends, title = exam.digests(), subject.what["name"]
    for method in METHODS:
        yield Job("rows", f"{title} {method}", depends, functools.partial(measure, method, exam))
    for name, compute in EXTRAS[subject.kind].items():
        yield Job(name, f"{title} {name}", depends, functools.partial(compute, subject, exam))


def _thresholds(subject: Subject, exam: Exam) -> list[Row]:
    """Run only MLPs and small networks with the paper's weights; for others, measure bits and error."""
    small = (
        subject.what["own_weights"] and subject.what["multiply_adds"] <= SWEPT if subject.kind == "network" else True
    )
    answers = exam.known is not None and small
    return experiments.thresholds(exam, answers)


def _wide(subject: Subject, exam: Exam) -> list[Row]:
    return experiments.wide_blocks(exam)


def _block_sizes(subject: Subject, exam: Exam) -> list[Row]:
    return experiments.block_sizes(exam)


EXTRAS: dict[str, dict[str, Callable[[Subject, Exam], Any]]] = {
    "network": {
        "averages": lambda subject, exam: averages.layers_by_block(exam),
        "wide": _wide,
        "histogram": lambda subject, exam: experiments.histogram(exam),
        "thresholds": _thresholds,
    },
    "mlp": {"wide": _wide},
    "studied mlp": {"wide": _wide, "block_sizes": _block_sizes},
    "shown mlp": {
        "wide": _wide,
        "block_sizes": _block_sizes,
        "configurations": lambda subject, exam: experiments.configurations(exam),
        "thresholds": _thresholds,
    },
}
ALONE: dict[str, Callable[[], Any]] = {"complexity": costs.complexity, "storage": costs.storage_breakdown}
