"""Lies of manifests that are rightly signed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.forge import checkpoint, consistent, crc, header_of, honest, leaf, manifest, packed, text, write

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


def unknown_codec(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(id="../../evil"))


def codec_with_unknown_field(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(rounds=3))


def codec_of_huge_blocks(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(block_size=2**62))


def codec_of_blocks_beyond_numbers(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(block_size=10**400))


def codec_threshold_nan(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(threshold="nan"))


def codec_threshold_as_text(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(threshold="0.05"))


def codec_without_wide(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(threshold=0.0))


def codec_of_other_bits(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(low_bits=3))


def codec_bits_true(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["codec"].update(low_bits=True))


def unknown_order(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].update(order="sideways"))


def unknown_kind(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].update(kind="pickle"))


def _path(folder: Path, path: Any) -> Path:
    array = np.ones((1, 2), np.float32)
    record = leaf("a", array) | {"path": path, "tensors": [[path, "F32", [1, 2], crc(array.tobytes())]]}
    return checkpoint(folder / FILE, manifest(record, tree=["dict", "", ["a"], [0]]), {path: array.tobytes()})


def path_that_climbs(folder: Path) -> Path:
    return _path(folder, "../../x")


def path_that_climbs_inside(folder: Path) -> Path:
    return _path(folder, "a/../../../x")


def path_from_the_root(folder: Path) -> Path:
    return _path(folder, "/etc/passwd")


def path_with_nul(folder: Path) -> Path:
    return _path(folder, "a\0b")


def path_of_the_metadata(folder: Path) -> Path:
    array = np.ones((1, 2), np.float32)
    fields = manifest(leaf("__metadata__", array))
    return write(folder / FILE, text(header_of(fields)).encode(), array.tobytes())


def tensor_of_another_leaf(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][1].update(path="b"))


def two_leaves_of_one_path(folder: Path) -> Path:
    record = {"path": "a", "kind": "python", "shape": [], "dtype": "int", "tensors": [], "value": "1"}
    return checkpoint(folder / FILE, manifest(record, record, tree=["list", "", [], [0, 1]]), {})


def two_tensors_of_one_name(folder: Path) -> Path:
    array = np.ones((1, 2), np.float32)
    record = leaf("a", array)
    fields = manifest(record, record, tree=["list", "", [], [0, 1]])
    return write(folder / FILE, text(header_of(fields)).encode(), 2 * array.tobytes())


def _shape(folder: Path, shape: Any, stored: Any = None) -> Path:
    def change(fields):
        fields["leaves"][1]["shape"] = shape
        fields["leaves"][1]["tensors"][0][2] = shape if stored is None else stored

    return consistent(folder, change)


def shape_that_overflows(folder: Path) -> Path:
    return _shape(folder, [2**32, 2**32, 6])


def shape_that_wraps_to_what_is_there(folder: Path) -> Path:
    return _shape(folder, [2**62, 4, 6])


def shape_that_overflows_and_is_empty(folder: Path) -> Path:
    array = np.ones((0,), np.float32)
    record = leaf("a", array, shape=[0, 2**40, 2**40], tensors=[["a", "F32", [0, 2**40, 2**40], "00000000"]])
    return checkpoint(folder / FILE, manifest(record), {"a": b""})


def shape_of_too_many_axes(folder: Path) -> Path:
    return _shape(folder, [1] * 100 + [6])


def shape_of_another_size(folder: Path) -> Path:
    return _shape(folder, [2, 4], [2, 3])


def shape_negative(folder: Path) -> Path:
    return _shape(folder, [-2, -3])


def shape_of_fractions(folder: Path) -> Path:
    return _shape(folder, [2, 3], [2.0, 3])


def shape_true(folder: Path) -> Path:
    return _shape(folder, [True, 6])


def packed_shape_too_large(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].update(shape=[2**40]))


def packed_shape_too_small(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0].update(shape=[4]))


def _packed(folder: Path, wide: tuple[int, ...], change: Callable[[Any, Any], None]) -> Path:
    record, data = packed(wide=wide)
    tensors = {tensor[0]: tensor for tensor in record["tensors"]}
    change(tensors, data)
    for name, tensor in tensors.items():
        tensor[3] = crc(data[name])
    return checkpoint(folder / FILE, manifest(record), data)


def widths_that_ask_for_more_rows(folder: Path) -> Path:
    return _packed(folder, (1, 0), lambda tensors, data: data.update({"w#wide": b"\x03"}))


def widths_that_ask_for_fewer_rows(folder: Path) -> Path:
    return _packed(folder, (1, 0), lambda tensors, data: data.update({"w#wide": b"\x00"}))


def plane_of_wider_words(folder: Path) -> Path:
    def change(tensors, data):
        tensors["w#plane0"][1:3] = ["U32", [2, 1]]
        data["w#plane0"] = bytes(8)

    return _packed(folder, (1, 0), change)


def plane_of_signed_words(folder: Path) -> Path:
    return _packed(folder, (1, 0), lambda tensors, _: tensors["w#plane0"].__setitem__(1, "F16"))


def plane_transposed(folder: Path) -> Path:
    return _packed(folder, (1, 0), lambda tensors, _: tensors["w#plane0"].__setitem__(2, [1, 2]))


def header_of_other_floats(folder: Path) -> Path:
    return _packed(folder, (1, 0), lambda tensors, _: tensors["w#minimum"].__setitem__(1, "BF16"))


def header_that_begins_with_zero(folder: Path) -> Path:
    return _packed(folder, (1, 0), lambda tensors, data: data.update({"w#minimum": bytes(4)}))


def plane_missing(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["tensors"].pop(1))


def header_missing(folder: Path) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][0]["tensors"].pop(-1))


def plane_too_many(folder: Path) -> Path:
    record, data = packed()
    record["tensors"].append(["w#plane2", "U8", [1], crc(b"\1")])
    return checkpoint(folder / FILE, manifest(record), data | {"w#plane2": b"\1"})


def _dtype(folder: Path, dtype: Any, leaf: int = 1) -> Path:
    return consistent(folder, lambda fields: fields["leaves"][leaf].update(dtype=dtype))


def dtype_of_objects(folder: Path) -> Path:
    return _dtype(folder, "object")


def dtype_as_a_program(folder: Path) -> Path:
    return _dtype(folder, "f4,((1,")


def dtype_of_text(folder: Path) -> Path:
    return _dtype(folder, "S4")


def dtype_of_half_a_character(folder: Path) -> Path:
    return _dtype(folder, "\ud800")


def dtype_of_other_numbers(folder: Path) -> Path:
    return _dtype(folder, "int32")


def dtype_by_another_name(folder: Path) -> Path:
    return _dtype(folder, "single")


def packed_dtype_of_integers(folder: Path) -> Path:
    return _dtype(folder, "int32", leaf=0)


def dense_in_two_tensors(folder: Path) -> Path:
    array = np.ones((2,), np.float32)
    record = leaf("a", array)
    record["tensors"].append(["a#b", "F32", [2], crc(array.tobytes())])
    return checkpoint(folder / FILE, manifest(record), {"a": array.tobytes(), "a#b": array.tobytes()})


def bools_of_other_bytes(folder: Path) -> Path:
    record = leaf("a", np.ones(2), dtype="bool", tensors=[["a", "BOOL", [2], crc(b"\x01\x07")]])
    return checkpoint(folder / FILE, manifest(record), {"a": b"\x01\x07"})


def _key(folder: Path, **changes: Any) -> Path:
    data = bytes(range(8))
    fields = {"path": "k", "kind": "key", "shape": [], "dtype": "key<fry>", "tensors": [["k", "U32", [2], crc(data)]]}
    return checkpoint(folder / FILE, manifest(fields | {"impl": "fry"} | changes), {"k": data})


def key_of_unknown_kind(folder: Path) -> Path:
    return _key(folder, impl="os.system")


def key_of_no_kind(folder: Path) -> Path:
    return _key(folder, impl=None)


def key_of_another_size(folder: Path) -> Path:
    return _key(folder, tensors=[["k", "U32", [1, 2], crc(bytes(range(8)))]])


def key_of_floats(folder: Path) -> Path:
    return _key(folder, tensors=[["k", "F32", [2], crc(bytes(range(8)))]])


def key_of_another_dtype(folder: Path) -> Path:
    return _key(folder, dtype="key<rbg>")


def _python(folder: Path, dtype: str, value: Any) -> Path:
    record = {"path": "a", "kind": "python", "shape": [], "dtype": dtype, "tensors": [], "value": value}
    return checkpoint(folder / FILE, manifest(record), {})


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
    def change(fields):
        fields["leaves"][1] |= {"kind": "python", "shape": [], "dtype": "int", "value": "1"}

    return consistent(folder, change)


def _tree(folder: Path, tree: Any) -> Path:
    return consistent(folder, lambda fields: fields.update(tree=tree))


def tree_without_a_leaf(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [0]])


def tree_with_a_leaf_twice(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [0, 1, 1]])


def tree_with_a_leaf_that_is_not(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [0, 1, 2]])


def tree_in_another_order(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [1, 0]])


def tree_with_a_negative_leaf(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [0, -1]])


def tree_with_true(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [0, True]])


def tree_of_unknown_kind(folder: Path) -> Path:
    return _tree(folder, ["os.system", "true", [], [0, 1]])


def tree_with_a_key_twice(folder: Path) -> Path:
    return _tree(folder, ["dict", "", ["a", "a"], [0, 1]])


def tree_with_a_key_of_no_kind(folder: Path) -> Path:
    return _tree(folder, ["dict", "", ["a", None], [0, 1]])


def tree_with_too_few_keys(folder: Path) -> Path:
    return _tree(folder, ["dict", "", ["a"], [0, 1]])


def tuple_named_as_a_program(folder: Path) -> Path:
    return _tree(folder, ["namedtuple", "A", ["a=print(1)", "b"], [0, 1]])


def tuple_of_a_keyword(folder: Path) -> Path:
    return _tree(folder, ["namedtuple", "class", ["a", "b"], [0, 1]])


def tuples_of_many_kinds(folder: Path) -> Path:
    return _tree(folder, ["list", "", [], [0, 1, *(["namedtuple", f"A{i}", [], []] for i in range(50_000))]])


def tuple_of_many_fields(folder: Path) -> Path:
    fields = [f"f{i}" for i in range(150_000)]
    return _tree(folder, ["namedtuple", "A", fields, [0, 1, *[None] * 149_998]])


def variable_of_two(folder: Path) -> Path:
    return _tree(folder, ["variable", "Param", ["value", "more"], [0, 1]])


def infinite_number(folder: Path) -> Path:
    fields, data = honest()
    signed = text(fields).replace('"tree":', '"tree":[1e999],"more":')
    header = header_of(fields, signed)
    return checkpoint(folder / FILE, fields, data, header)


def infinite_detail(folder: Path) -> Path:
    fields, data = honest()
    signed = text(fields).replace('"order":', '"more":1e999,"order":')
    return checkpoint(folder / FILE, fields, data, header_of(fields, signed))


def manifest_with_a_key_twice(folder: Path) -> Path:
    fields, data = honest()
    return checkpoint(folder / FILE, fields, data, header_of(fields, text(fields).replace("{", '{"version":1,', 1)))


def _deep(folder: Path, depth: int) -> Path:
    fields, data = honest()
    deep = '["list","",[],[' * depth + "0,1" + "]]" * depth
    signed = text(fields | {"tree": "TREE"}).replace('"TREE"', deep)
    return checkpoint(folder / FILE, fields, data, header_of(fields, signed))


def deep_tree(folder: Path) -> Path:
    return _deep(folder, 205)


def deeper_tree(folder: Path) -> Path:
    return _deep(folder, 470)


def deepest_tree(folder: Path) -> Path:
    return _deep(folder, 100_000)


def deep_version(folder: Path) -> Path:
    fields, data = honest()
    signed = text(fields).replace('"version":1', '"version":' + "[" * 900 + "]" * 900)
    return checkpoint(folder / FILE, fields, data, header_of(fields, signed))


def many_leaves_of_other_codecs(folder: Path) -> Path:
    """Each would take a while, if a codec had to be compiled to know what it stores."""
    records, payload = [], {}
    for i in range(3000):
        path, data = f"w{i}", np.full(1, -1, np.float16).tobytes()
        tensors = [[f"{path}#{name}", "F16", [1], crc(data)] for name in ("maximum", "minimum")]
        codec = {"id": "uniform", "block_size": 8 + i, "low_bits": 4, "high_bits": 8, "threshold": "inf"}
        record = {"path": path, "kind": "packed", "shape": [8 + i], "dtype": "float32", "tensors": tensors}
        records.append(record | {"codec": codec, "order": "stored"})
        payload |= {tensor[0]: data for tensor in tensors}
    return checkpoint(folder / FILE, manifest(*records), payload)


MANIFESTS = (
    *(newer_version, version_true, version_fraction, version_endless, version_missing, more_fields, unknown_codec),
    *(codec_with_unknown_field, codec_of_huge_blocks, codec_of_blocks_beyond_numbers, codec_threshold_nan),
    *(codec_threshold_as_text, codec_without_wide, codec_of_other_bits, codec_bits_true, unknown_order, unknown_kind),
    *(path_that_climbs, path_that_climbs_inside, path_from_the_root, path_with_nul, path_of_the_metadata),
    *(tensor_of_another_leaf, two_leaves_of_one_path, two_tensors_of_one_name, shape_that_overflows),
    *(shape_that_wraps_to_what_is_there, shape_that_overflows_and_is_empty, shape_of_too_many_axes),
    *(shape_of_another_size, shape_negative, shape_of_fractions, shape_true, packed_shape_too_large),
    *(packed_shape_too_small, widths_that_ask_for_more_rows, widths_that_ask_for_fewer_rows, plane_of_wider_words),
    *(plane_of_signed_words, plane_transposed, header_of_other_floats, header_that_begins_with_zero, plane_missing),
    *(header_missing, plane_too_many, dtype_of_objects, dtype_as_a_program, dtype_of_text, dtype_of_half_a_character),
    *(dtype_of_other_numbers, dtype_by_another_name, packed_dtype_of_integers, dense_in_two_tensors),
    *(bools_of_other_bytes, key_of_unknown_kind, key_of_no_kind, key_of_another_size, key_of_floats),
    *(key_of_another_dtype, python_of_endless_digits, python_of_endless_text, python_of_another_kind),
    *(python_that_is_no_bool, python_that_is_no_number, python_value_no_text, python_with_a_tensor),
    *(tree_without_a_leaf, tree_with_a_leaf_twice, tree_with_a_leaf_that_is_not, tree_in_another_order),
    *(tree_with_a_negative_leaf, tree_with_true, tree_of_unknown_kind, tree_with_a_key_twice),
    *(tree_with_a_key_of_no_kind, tree_with_too_few_keys, tuple_named_as_a_program, tuple_of_a_keyword),
    *(tuples_of_many_kinds, tuple_of_many_fields, variable_of_two, infinite_number, infinite_detail),
    *(manifest_with_a_key_twice, deep_tree, deeper_tree, deepest_tree, deep_version, many_leaves_of_other_codecs),
)
