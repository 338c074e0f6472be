"""ImageNet's validation images from a folder, decoded on demand and preprocessed as in torchvision.

Either one folder for each class (`n01440764/*.JPEG`; the sorted names give the numbers), or all images in one folder
alongside a text file of labels: `NAME NUMBER` lines, numbers from 0 in the same order.
"""

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from examples.paper.data import CLASSES, Labelled, check_labels

RESIZE, CROP = 256, 224
_SUFFIXES = {".jpeg", ".jpg", ".png"}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files that behave like an array `[n, 224, 224, 3]`: indexing reads and crops them."""

    paths: tuple[Path, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), CROP, CROP, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Any) -> Any:
        chosen = np.arange(len(self))[rows]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
            return np.stack(list(pool.map(lambda row: read_image(self.paths[row]), np.atleast_1d(chosen))))

    def digest(self) -> str:
        """A checksum of names, sizes and times: reading 6 GB would take longer than many rows."""
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr(states).encode()).hexdigest()


def read_image(path: Path) -> np.ndarray:
    """Resize the shorter side to 256, crop the central 224 x 224, and convert to RGB.

    Raises:
        ValueError: if the file is not an image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_cropped(image.convert("RGB")))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); get the file again") from error


def _cropped(image: Image.Image) -> Image.Image:
    """torchvision's Resize(256) and CenterCrop(224): the longer side rounded down, the corner rounded half to even."""
    width, height = image.size
    scale = (RESIZE, int(RESIZE * height / width)) if width <= height else (int(RESIZE * width / height), RESIZE)
    resized = image.resize(scale, Image.Resampling.BILINEAR)
    left, top = (round((side - CROP) / 2) for side in resized.size)
    return resized.crop((left, top, left + CROP, top + CROP))


def load_imagenet(folder: Path, images: int = 0, classes: int = CLASSES["imagenet"]) -> Labelled:
    """The images of a folder; with `images`, only that many, spread evenly over it.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the layout is unknown, or the classes do not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of ImageNet's validation images")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and any(map(_is_image, path.iterdir())))
    paths, labels = _by_folder(folder, folders, classes) if folders else _by_list(folder)
    check_labels(labels, len(paths), classes, str(folder))
    name = f"{len(paths):,} ImageNet validation images"
    if 0 < images < len(paths):
        rows = np.linspace(0, len(paths) - 1, images).round().astype(int)
        paths, labels, name = [paths[row] for row in rows], labels[rows], f"{images:,} of {name}"
    return Labelled(name, ImageFiles(tuple(paths)), labels, classes)


def _by_folder(folder: Path, folders: list[Path], classes: int) -> tuple[list[Path], np.ndarray]:
    if len(folders) != classes:
        raise ValueError(f"{folder} has {len(folders)} class folders; {classes} are needed, one for each class")
    files = [sorted(filter(_is_image, one.iterdir())) for one in folders]
    labels = np.repeat(np.arange(classes), [len(one) for one in files])
    return [path for one in files for path in one], labels.astype(np.int32)


def _by_list(folder: Path) -> tuple[list[Path], np.ndarray]:
    paths, lists = sorted(filter(_is_image, folder.iterdir())), sorted(folder.glob("*.txt"))
    if not paths:
        raise ValueError(f"{folder} has neither images nor class folders with images")
    if len(lists) != 1:
        raise ValueError(f"{folder} has images, and {len(lists)} text files; one with lines 'NAME NUMBER' is needed")
    numbers = _labels(lists[0])
    if missing := [path.name for path in paths if path.name not in numbers]:
        raise ValueError(f"{lists[0]} has no label for {missing[0]} ({len(missing)} such images)")
    return paths, np.array([numbers[path.name] for path in paths], np.int32)


def _labels(file: Path) -> dict[str, int]:
    """Numbers by file name. A bare list of ILSVRC's own numbers is refused, because their order differs from that of
    the names."""
    labels: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not (words := line.split()):
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError(f"{file}, line {number}: {line[:40]!r} is not 'NAME NUMBER'")
        labels[Path(words[0]).name] = int(words[1])
    return labels


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES
