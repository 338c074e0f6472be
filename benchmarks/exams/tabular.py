"""The paper's MLP on tabular data, trained when it is needed."""

import functools
import tempfile
from pathlib import Path

from benchmarks.exams import Exam, as_jax, file_of
from examples.paper.mlp import mlp_exam
from examples.paper.store import Store
from examples.paper.tabular import FILES, load_npz

ROWS = 4000


def exam(name: str, data: Path) -> Exam:
    table = load_npz(name, file_of(name, FILES[name], data))
    made = mlp_exam(table, Store(Path(tempfile.gettempdir()) / "btc_jax_mlps"))
    rows, labels = table.test.inputs[:ROWS], table.test.labels[:ROWS]
    return Exam(f"mlp-{name.lower()}", as_jax(made.params), made.apply, rows, labels)


EXAMS = {f"mlp-{name.lower()}": functools.partial(exam, name) for name in FILES}
