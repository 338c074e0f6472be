"""Invalid manifests with valid checksums."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.forge import (
    checkpoint,
    consistent,
    dense,
    dense_format,
    header_of,
    honest,
    manifest,
    text,
    with_manifest,
    write,
)

FILE = "m.safetensors"


def newer_version(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields.update(version=2))


def version_true(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields.update(version=True))


def version_fraction(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields.update(version=1.0))


def version_endless(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields.update(version=10**4000))


def version_missing(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields.pop("version"))


def more_fields(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields.update(more=1))


def unknown_order(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][0].update(order="sideways"))


def unknown_kind(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][1].update(kind="pickle"))


def format_that_is_not_there(folder: Path) -> Path:
    return with_manifest(folder, lambda fields: fields["leaves"][1].__setitem__(1, 3))


def format_below_zero(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][1].__setitem__(1, -2))


def format_true(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][1].__setitem__(1, True))


def format_of_no_leaf(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"].append(dense_format("int8")))


def format_twice(folder: Path) -> Path:
    def change(fields):
        fields["formats"].append(dense_format())
        fields["leaves"][1][1] = 3

    return consistent(folder, change)


def formats_in_another_order(folder: Path) -> Path:
    def change(fields):
        fields["formats"].reverse()
        for leaf in fields["leaves"]:
            leaf[1] = 2 - leaf[1]

    return consistent(folder, change)


def format_with_more_fields(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][1].update(more=1))


def formats_no_list(folder: Path) -> Path:
    return with_formats(folder, {"0": dense_format()})


def with_formats(folder: Path, formats: Any) -> Path:
    fields, data = honest()
    header = header_of(fields, fields | {"formats": formats})
    return checkpoint(folder / FILE, fields, data, header)


def leaf_too_long(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][1].extend([["F4", [1]], 1]))


def leaf_too_short(folder: Path) -> Path:
    fields, data = honest()
    changed = fields | {"leaves": [fields["leaves"][0][:4], *fields["leaves"][1:]]}
    return checkpoint(folder / FILE, fields, data, header_of(fields, changed))


def leaf_no_list(folder: Path) -> Path:
    fields, data = honest()
    return checkpoint(folder / FILE, fields, data, header_of(fields, fields | {"leaves": ["w", "a", "b"]}))


def errors_of_text(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].append([0.1, "0.1", 0.1]))


def errors_below_zero(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].append([0.1, -0.1, 0.1]))


def errors_too_few(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].append([0.1, 0.1]))


def origin_of_no_shape(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][1].append(["F4", -1]))


def origin_of_long_text(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][1].append(["F4" * 1000, [1]]))


def _path(folder: Path, path: Any) -> Path:
    array = np.ones((1, 2), np.float32)
    fields = manifest([dense_format()], [dense(path, array)], ["dict", ["a"], [0]])
    return checkpoint(folder / FILE, fields, {path: array.tobytes()})


def path_that_climbs(folder: Path) -> Path:
    return _path(folder, "../../x")


def path_that_climbs_inside(folder: Path) -> Path:
    return _path(folder, "a/../../../x")


def path_from_the_root(folder: Path) -> Path:
    return _path(folder, "/etc/passwd")


def path_with_nul(folder: Path) -> Path:
    return _path(folder, "a\0b")


def path_of_half_a_character(folder: Path) -> Path:
    return _path(folder, "\ud800")


def path_of_the_metadata(folder: Path) -> Path:
    array = np.ones((1, 2), np.float32)
    fields = manifest([dense_format()], [dense("__metadata__", array)])
    return write(folder / FILE, text(header_of(fields)).encode(), array.tobytes())


def path_no_text(folder: Path) -> Path:
    array = np.ones((1, 2), np.float32)
    fields = manifest([dense_format()], [dense("1", array)])
    changed = fields | {"leaves": [[1, *fields["leaves"][0][1:]]]}
    return checkpoint(folder / FILE, fields, {"1": array.tobytes()}, header_of(fields, changed))
