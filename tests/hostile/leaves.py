"""Invalid leaves in manifests with valid checksums."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.forge import (
    checkpoint,
    consistent,
    crc,
    dense,
    dense_format,
    header_of,
    honest,
    manifest,
    packed_format,
    text,
    with_manifest,
    write,
)

FILE = "m.safetensors"


def two_leaves_of_one_path(folder: Path) -> Path:
    fields = manifest([{"kind": "python", "dtype": "int"}], [["a", 0, "1"], ["a", 0, "1"]], ["list", [0, 1]])
    return checkpoint(folder / FILE, fields, {})


def two_tensors_of_one_name(folder: Path) -> Path:
    array = np.ones((1, 2), np.float32)
    fields = manifest([dense_format()], [dense("a", array), dense("a", array)], ["list", [0, 1]])
    return write(folder / FILE, text(header_of(fields)).encode(), 2 * array.tobytes())


def _tied(folder: Path, *record: Any) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][2].__setitem__(slice(2, None), record))


def tied_to_nothing(folder: Path) -> Path:
    return _tied(folder, [2, 3], "c")


def tied_to_itself(folder: Path) -> Path:
    return _tied(folder, [2, 3], "b")


def tied_to_another_shape(folder: Path) -> Path:
    return _tied(folder, [3, 2], "a")


def tied_to_another_leaf(folder: Path) -> Path:
    return _tied(folder, [2, 3], "w")


def tied_to_a_number(folder: Path) -> Path:
    return _tied(folder, [2, 3], 1)


def tied_above(folder: Path) -> Path:
    return _tied(folder, [2, 3], "../a")


def tied_to_another_dtype(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][2].update(dtype="int32"))


def tied_to_a_later_leaf(folder: Path) -> Path:
    def change(fields):
        fields["formats"].reverse()
        fields["leaves"] = [["b", 0, [2, 3], "a"], [*fields["leaves"][1][:1], 1, *fields["leaves"][1][2:]]]
        fields["leaves"].append([*honest()[0]["leaves"][0][:1], 2, *honest()[0]["leaves"][0][2:]])

    return consistent(folder, change)


def tied_to_a_tied_leaf(folder: Path) -> Path:
    def change(fields):
        fields["leaves"].append(["c", 2, [2, 3], "b"])
        fields["tree"] = ["list", [0, 1, 2, 3]]

    return consistent(folder, change)


def _shape(folder: Path, shape: Any, stored: Any = None) -> Path:
    fields, data = honest()
    changed = honest()[0]
    changed["leaves"][1][2] = changed["leaves"][2][2] = shape
    if stored is None:
        return checkpoint(folder / FILE, changed, data)
    return checkpoint(folder / FILE, fields, data, header_of(fields, changed))


def shape_that_overflows(folder: Path) -> Path:
    return _shape(folder, [2**32, 2**32, 6])


def shape_that_wraps_to_what_is_there(folder: Path) -> Path:
    return _shape(folder, [2**62, 4, 6])


def shape_that_overflows_and_is_empty(folder: Path) -> Path:
    fields = manifest([dense_format()], [["a", 0, [0, 2**40, 2**40], "00000000"]])
    return checkpoint(folder / FILE, fields, {"a": b""})


def shape_of_too_many_axes(folder: Path) -> Path:
    return _shape(folder, [1] * 100 + [6])


def shape_of_another_size(folder: Path) -> Path:
    return _shape(folder, [2, 4], [2, 3])


def shape_negative(folder: Path) -> Path:
    return _shape(folder, [-2, -3])


def shape_of_fractions(folder: Path) -> Path:
    return _shape(folder, [2.0, 3], [2, 3])


def shape_true(folder: Path) -> Path:
    return _shape(folder, [True, 6])


def bytes_below_zero(folder: Path) -> Path:
    fields, data = honest()
    changed = honest()[0]
    changed["leaves"][0][4] = -1
    return checkpoint(folder / FILE, fields, data, header_of(fields, changed))


def _dtype(folder: Path, dtype: Any, number: int = 1) -> Path:
    return consistent(folder, lambda fields: fields["formats"][number].update(dtype=dtype))


def dtype_of_objects(folder: Path) -> Path:
    return _dtype(folder, "object")


def dtype_as_a_program(folder: Path) -> Path:
    return _dtype(folder, "f4,((1,")


def dtype_of_text(folder: Path) -> Path:
    return _dtype(folder, "S4")


def dtype_of_half_a_character(folder: Path) -> Path:
    return _dtype(folder, "\ud800")


def dtype_of_other_numbers(folder: Path) -> Path:
    return with_manifest(folder, lambda fields: fields["formats"][1].update(dtype="int32"))


def dtype_by_another_name(folder: Path) -> Path:
    return _dtype(folder, "single")


def packed_dtype_of_integers(folder: Path) -> Path:
    return _dtype(folder, "int32", number=0)


def bools_of_other_bytes(folder: Path) -> Path:
    fields = manifest([dense_format("bool")], [["a", 0, [2], crc(b"\x01\x07")]])
    return checkpoint(folder / FILE, fields, {"a": b"\x01\x07"})


def _key(folder: Path, words: Any = (2,), **changes: Any) -> Path:
    data = bytes(range(8))
    how = {"kind": "key", "dtype": "key<fry>", "impl": "fry", "words": list(words)} | changes
    return checkpoint(folder / FILE, manifest([how], [["k", 0, [], crc(data)]]), {"k": data})


def key_of_unknown_kind(folder: Path) -> Path:
    return _key(folder, impl="os.system")


def key_of_no_kind(folder: Path) -> Path:
    return _key(folder, impl=None)


def key_of_another_size(folder: Path) -> Path:
    return _key(folder, words=[1, 2])


def key_of_fractions(folder: Path) -> Path:
    return _key(folder, words=[2.0])


def key_of_another_dtype(folder: Path) -> Path:
    return _key(folder, dtype="key<rbg>")


def _python(folder: Path, dtype: str, value: Any) -> Path:
    fields = manifest([{"kind": "python", "dtype": dtype}], [["a", 0, value]])
    return checkpoint(folder / FILE, fields, {})


def python_of_endless_digits(folder: Path) -> Path:
    return _python(folder, "int", "9" * 60_000)


def python_of_endless_text(folder: Path) -> Path:
    return _python(folder, "str", "9" * 100_000)


def python_of_another_kind(folder: Path) -> Path:
    return _python(folder, "eval", "print(1)")


def python_that_is_no_bool(folder: Path) -> Path:
    return _python(folder, "bool", "yes")


def python_that_is_no_number(folder: Path) -> Path:
    return _python(folder, "int", " 1_0 ")


def python_value_no_text(folder: Path) -> Path:
    return _python(folder, "int", 1)


def python_with_a_tensor(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["formats"][1].update(kind="python"))


def infinite_number(folder: Path) -> Path:
    fields, data = honest()
    signed = text(fields).replace('"tree":', '"tree":[1e999],"more":')
    header = header_of(fields, signed)
    return checkpoint(folder / FILE, fields, data, header)


def infinite_detail(folder: Path) -> Path:
    fields, data = honest()
    signed = text(fields).replace('"widths":[4,', '"widths":[1e999,')
    return checkpoint(folder / FILE, fields, data, header_of(fields, signed))


def manifest_with_a_key_twice(folder: Path) -> Path:
    fields, data = honest()
    return checkpoint(folder / FILE, fields, data, header_of(fields, text(fields).replace("{", '{"version":1,', 1)))


def deep_version(folder: Path) -> Path:
    fields, data = honest()
    signed = text(fields).replace('"version":1', '"version":' + "[" * 900 + "]" * 900)
    return checkpoint(folder / FILE, fields, data, header_of(fields, signed))


def leaves_of_all_sizes(folder: Path) -> Path:
    """As many leaves as the reader accepts, with everything that a record can have, and one too many."""
    return _many(folder, 2**17 + 1)


def last_of_many_leaves(folder: Path) -> Path:
    """100,000 leaves, only the last of them invalid."""
    return _many(folder, 100_000, last="../w")


def _many(folder: Path, count: int, last: str = "w") -> Path:
    names = [f"model.layers.{i // 192}.mlp.experts.{i % 192}.gate_proj.weight" for i in range(count - 1)]
    record = [0, [64, 64, 3, 3], "00000000", 0, [0.01234, 0.1234, 0.3456]]
    records = [[name, *record] for name in (*names, last)]
    fields = manifest([packed_format()], records)
    return checkpoint(folder / FILE, fields, dict.fromkeys((record[0] for record in records), b""))


def paths_of_many_dicts(folder: Path) -> Path:
    """Paths that imply many more dicts than there are leaves."""
    records = [[f"{i}/" + "a/" * 150 + "w", 0, "1"] for i in range(30_000)]
    return checkpoint(folder / FILE, manifest([{"kind": "python", "dtype": "int"}], records), {})
