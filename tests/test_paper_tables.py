"""Tables of numbers that the evaluation reads."""

import io

import numpy as np
import pytest

from examples.paper.data import load_cifar
from examples.paper.tabular import BUNDLED, bundled, load_csv, load_npz
from tests.paper_data_support import IMAGES as IMAGES
from tests.paper_data_support import RNG as RNG
from tests.paper_data_support import write as write

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", list(BUNDLED))
def test_bundled_tables_are_split_and_standardized(name):
    table = bundled(name)
    assert abs(table.train.inputs.mean()) < 1e-4
    assert table.train.inputs.dtype == np.float32
    assert set(table.test.labels.tolist()) == set(range(table.classes))
    assert len(table.train) == pytest.approx(2 * len(table.test), abs=2)


def csv_file(tmp_path, text):
    return write(tmp_path / "rows.csv", text.encode())


def test_csv(tmp_path):
    lines = "".join(
        f"{i},{'red' if i % 2 else 'blue'},{'?' if i == 4 else i * i},{'yes' if i > 5 else 'no'}\n" for i in range(12)
    )
    table = load_csv(csv_file(tmp_path, "\ufeffx, colour ,square,class\n" + lines), "class")
    assert (table.name, table.classes, table.train.inputs.shape, len(table.test)) == ("rows", 2, (8, 4), 4)
    assert np.isfinite(table.train.inputs).all()
    assert np.abs(table.train.inputs.mean(0)).max() < 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("a,b\n", "has no rows"),
        ("a,b\n1,2\n3\n", "line 3: 1 fields; the header has 2"),
        ("a,b\n1,2\n", "has no column 'y', but a, b"),
        ("y\n1\n2\n", "has no column besides 'y'"),
        ("a,y\n1,0\n2,0\n3,0\n", "needs two classes or more, and 3 rows"),
        ("a,y\n" + "".join(f"{i},{i}\n" for i in range(9)), "needs two classes or more, and 3 rows"),
    ],
)
def test_wrong_csv_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_csv(csv_file(tmp_path, text), "y")


def test_missing_csv_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a CSV file"):
        load_csv(tmp_path / "none.csv", "y")


def test_tables_of_npz_files(tmp_path):
    x, y = RNG.standard_normal((6, 3)), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "t.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    table = load_npz("T", tmp_path / "t.npz")
    assert (table.classes, len(table.train), len(table.test), table.train.inputs.dtype) == (3, 6, 3, np.float32)
    np.savez(tmp_path / "u.npz", x_train=x, y_train=y, x_test=x[:3, :2], y_test=y[:3])
    with pytest.raises(ValueError, match=r"do not fit together"):
        load_npz("T", tmp_path / "u.npz")
    np.savez(tmp_path / "v.npz", x_train=x, y_train=y[:5], x_test=x[:3], y_test=y[:3])
    with pytest.raises(ValueError, match=r"6 examples have labels"):
        load_npz("T", tmp_path / "v.npz")


def test_plain_bytes_are_no_npz(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    with pytest.raises(ValueError, match=r"not an .npz file of plain arrays"):
        load_cifar(write(tmp_path / "only.npz", buffer.getvalue()), "cifar10")
