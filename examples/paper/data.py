"""Labelled examples to evaluate a network on: CIFAR in all its file layouts; `imagenet` and `tabular` have the others.

CIFAR files come in three layouts: Python batches (pickles), binary batches, and `.npz` with `images` and `labels`. Each
can be given by its own path, its folder, or the folder above.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper.pickles import load_pickle

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
PIXELS = 3 * 32 * 32

_FOLDERS = {
    "cifar10": (".", "cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": (".", "cifar-100-python", "cifar-100-binary"),
}
_FILES = {"cifar10": ("test_batch", "test_batch.bin", "test.npz"), "cifar100": ("test", "test.bin", "test.npz")}


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Examples and the correct class of each.

    Attributes:
        name: the name of the set in tables, with the number of examples.
        inputs: examples along the first axis: uint8 images, float rows, or an object that returns them for an
            index array.
        labels: integers.
        classes: number of classes.
    """

    name: str
    inputs: Any
    labels: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Labelled":
        """The first `count` examples, or all of them if there are fewer."""
        if count >= len(self):
            return self
        return Labelled(f"{count:,} of {self.name}", self.inputs[np.arange(count)], self.labels[:count], self.classes)

    def digest(self) -> str:
        """A checksum of all examples, or the one that their source provides."""
        own = getattr(self.inputs, "digest", None)
        inputs = own() if own else hashlib.sha256(np.ascontiguousarray(self.inputs).tobytes()).hexdigest()
        return hashlib.sha256(inputs.encode() + np.ascontiguousarray(self.labels).tobytes()).hexdigest()


def load_cifar(path: Path, dataset: str) -> Labelled:
    """The test images of CIFAR-10 or CIFAR-100, in any layout.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the layout is unknown, the file is damaged, or the classes do not fit.
    """
    return _checked(_read(_test_file(path, dataset), dataset), dataset, path)


def local_cifar10(folder: Path, jpeg_images: int = 0) -> tuple[Labelled, Labelled] | None:
    """The first 932 exact images, if a folder has them, to measure accuracy on and to compare answers on.

    With `jpeg_images`, answers are compared on that many of the JPEG versions instead.
    """
    exact, jpeg = folder / "cifar10_test_932.npz", folder / "cifar10_test_jpeg.npz"
    if not exact.is_file():
        return None
    known = load_cifar(exact, "cifar10")
    known = dataclasses.replace(known, name=f"first {len(known)} CIFAR-10 test images")
    if not jpeg_images or not jpeg.is_file():
        return known, known
    compared = load_cifar(jpeg, "cifar10")
    compared = dataclasses.replace(compared, name=f"{len(compared):,} CIFAR-10 test images as JPEG")
    return known, compared.first(jpeg_images)


def _test_file(path: Path, dataset: str) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder or file of {dataset}'s test images")
    candidates = [path / folder / name for folder in _FOLDERS[dataset] for name in _FILES[dataset]]
    for file in candidates:
        if file.is_file():
            return file
    names = ", ".join(_FILES[dataset])
    raise ValueError(f"{path} has no test images of {dataset}: looked for {names} there and in {_FOLDERS[dataset][1:]}")


def _read(file: Path, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    if file.suffix == ".npz":
        return _read_npz(file)
    return _read_binary(file, dataset) if file.suffix == ".bin" else _read_python(file, dataset)


def _read_npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_arrays(file, ("images", "labels"))
    return images, labels


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an `.npz` file by name, never objects.

    Raises:
        ValueError: if the file is damaged or lacks one of them.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            if missing := [name for name in names if name not in arrays]:
                raise ValueError(f"it has no array {missing[0]!r}, but {sorted(arrays)}")
            return [arrays[name] for name in names]
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{file}: not an .npz file of plain arrays ({error})") from error
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise ValueError(f"{file}: not an .npz file of plain arrays ({error})") from error


def _read_binary(file: Path, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label (CIFAR-100: a coarse and a fine one) and 3,072 pixels, plane by plane."""
    labels = 2 if dataset == "cifar100" else 1
    data = np.fromfile(file, np.uint8)
    if not data.size or data.size % (labels + PIXELS):
        raise ValueError(
            f"{file}: {data.size:,} bytes are not a multiple of the record size {labels + PIXELS:,}; "
            f"it is truncated, or not {dataset}"
        )
    records = data.reshape(-1, labels + PIXELS)
    return _from_planes(records[:, labels:]), records[:, labels - 1]


def _read_python(file: Path, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    batch, key = load_pickle(file), b"fine_labels" if dataset == "cifar100" else b"labels"
    if not isinstance(batch, dict) or b"data" not in batch:
        raise ValueError(f"{file}: not a CIFAR batch (a dict with data and labels)")
    if key not in batch:
        other = "cifar100" if b"fine_labels" in batch else "cifar10"
        raise ValueError(f"{file}: it has no {key.decode()}; is it {other} (--{other})?")
    data = np.asarray(batch[b"data"])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise ValueError(f"{file}: data is {data.dtype}{list(data.shape)}; uint8[n, {PIXELS}] is required")
    return _from_planes(data), np.asarray(batch[key])


def _from_planes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _checked(pair: tuple[np.ndarray, np.ndarray], dataset: str, path: Path) -> Labelled:
    images, labels = pair
    classes = CLASSES[dataset]
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images):
        raise ValueError(f"{path}: images are {images.dtype}{list(images.shape)}; uint8[n, 32, 32, 3] is required")
    check_labels(labels, len(images), classes, f"{path}: {dataset}")
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[dataset]
    return Labelled(f"{len(images):,} {title} test images", images, labels.astype(np.int32), classes)


def check_labels(labels: np.ndarray, examples: int, classes: int, where: str) -> None:
    """Raise `ValueError` if the labels do not fit the examples or the classes."""
    if labels.shape != (examples,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where}: {examples} examples have labels {labels.dtype}{list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{where} has {classes} classes, but labels run from {labels.min()} to {labels.max()}")
