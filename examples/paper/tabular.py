"""Tabular data for the MLP: `.npz` files, the small sets bundled with scikit-learn, and any CSV file."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from examples.paper.data import Labelled, check_labels, read_arrays

FILES = {"Adult": "tabular_adult.npz", "Letter": "tabular_letter.npz", "Satimage": "tabular_satimage.npz"}
BUNDLED: dict[str, Callable[..., Any]] = {
    "Breast cancer": datasets.load_breast_cancer,
    "Wine": datasets.load_wine,
    "Digits": datasets.load_digits,
}
_MISSING = {"", "?", "na", "nan", "null"}


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A data set, standardized and split into training rows and held-out rows."""

    name: str
    train: Labelled
    test: Labelled

    @property
    def classes(self) -> int:
        return self.train.classes


def bundled(name: str, seed: int = 0) -> Table:
    """One of scikit-learn's sets, a third of it held out."""
    rows, labels = BUNDLED[name](return_X_y=True)
    return _split(name, np.asarray(rows, np.float32), np.asarray(labels), seed)


def load_npz(name: str, file: Path) -> Table:
    """`x_train`, `y_train`, `x_test`, `y_test` of a file, already standardized."""
    x_train, y_train, x_test, y_test = read_arrays(file, ("x_train", "y_train", "x_test", "y_test"))
    classes = int(max(y_train.max(), y_test.max())) + 1
    for rows, labels in ((x_train, y_train), (x_test, y_test)):
        if rows.ndim != 2 or rows.shape[1:] != x_train.shape[1:]:
            raise ValueError(f"{file}: rows of shapes {x_train.shape} and {x_test.shape} do not fit together")
        check_labels(labels, len(rows), classes, str(file))
    return _table(name, x_train.astype(np.float32), y_train, x_test.astype(np.float32), y_test, classes)


def load_csv(file: Path, target: str, seed: int = 0) -> Table:
    """A CSV file with a header: numbers are standardized, other columns one-hot, and `target` holds the classes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no such column, ragged lines, or fewer than two classes.
    """
    columns = _columns(file)
    if target not in columns:
        raise ValueError(f"{file} has no column {target!r}, but {', '.join(columns)}; name one with --target")
    classes, labels = np.unique(columns.pop(target), return_inverse=True)
    if not columns:
        raise ValueError(f"{file} has no column besides {target!r}")
    if len(classes) < 2 or np.bincount(labels).min() < 3:
        raise ValueError(f"{file}: column {target!r} needs two classes or more, and 3 rows or more of each")
    return _split(file.stem, np.concatenate([_numbers(c) for c in columns.values()], axis=1), labels, seed)


def _columns(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a CSV file with a header")
    with file.open(newline="", encoding="utf-8-sig") as text:
        header, *lines = csv.reader(text) if file.stat().st_size else [[]]
    lines = [line for line in lines if line]
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ValueError(f"{file}, line {number}: {len(line)} fields; the header has {len(header)}")
    if not lines:
        raise ValueError(f"{file} has no rows; a header and rows below it are required")
    columns = [[field.strip() for field in column] for column in zip(*lines, strict=True)]
    return dict(zip(map(str.strip, header), columns, strict=True))


def _numbers(column: list[str]) -> np.ndarray:
    """A column of numbers, with missing ones at the mean; or a one-hot column for each string."""
    present = [field for field in column if field.lower() not in _MISSING]
    try:
        values = np.array([float(field) for field in present], np.float32)
    except ValueError:
        encoder: Any = OneHotEncoder(sparse_output=False)
        return encoder.fit_transform(np.array(column, object)[:, None]).astype(np.float32)
    filled = np.full(len(column), values.mean() if values.size else 0.0, np.float32)
    filled[[field.lower() not in _MISSING for field in column]] = values
    return filled[:, None]


def _split(name: str, rows: np.ndarray, labels: np.ndarray, seed: int) -> Table:
    parts = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=seed)
    learned, held_out = (np.asarray(part) for part in parts)
    scaler: Any = StandardScaler().fit(rows[learned])
    x_train, x_test = (scaler.transform(rows[part]).astype(np.float32) for part in (learned, held_out))
    return _table(name, x_train, labels[learned], x_test, labels[held_out], int(labels.max()) + 1)


def _table(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, classes: int) -> Table:
    train = Labelled(f"{len(y_train):,} {name} training rows", x_train, np.asarray(y_train, np.int32), classes)
    test = Labelled(f"{len(y_test):,} {name} test rows", x_test, np.asarray(y_test, np.int32), classes)
    return Table(name, train, test)
