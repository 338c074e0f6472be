"""Invalid trees in a manifest."""

from pathlib import Path
from typing import Any

from tests.hostile.forge import checkpoint, consistent, header_of, honest, text

FILE = "m.safetensors"


def _tree(folder: Path, tree: Any) -> Path:
    return consistent(folder, lambda fields: fields.update(tree=tree))


def tree_without_a_leaf(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1]])


def tree_with_a_leaf_twice(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1, 2, 2]])


def tree_with_a_leaf_that_is_not(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1, 2, 3]])


def tree_in_another_order(folder: Path) -> Path:
    return _tree(folder, ["list", [1, 0, 2]])


def tree_with_a_negative_leaf(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1, 2, -1]])


def tree_with_true(folder: Path) -> Path:
    return _tree(folder, ["list", [0, True, 2]])


def tree_of_unknown_kind(folder: Path) -> Path:
    return _tree(folder, ["os.system", "true", [], [0, 1, 2]])


def tree_with_a_key_twice(folder: Path) -> Path:
    return _tree(folder, ["dict", ["a", "b", "a"], [0, 1, 2]])


def tree_with_a_key_of_no_kind(folder: Path) -> Path:
    return _tree(folder, ["dict", ["a", "b", None], [0, 1, 2]])


def tree_with_too_few_keys(folder: Path) -> Path:
    return _tree(folder, ["dict", ["a", "b"], [0, 1, 2]])


def tuple_named_as_a_program(folder: Path) -> Path:
    return _tree(folder, ["namedtuple", "A", ["a=print(1)", "b", "c"], [0, 1, 2]])


def tuple_of_a_keyword(folder: Path) -> Path:
    return _tree(folder, ["namedtuple", "class", ["a", "b", "c"], [0, 1, 2]])


def tuples_of_many_kinds(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1, 2, *(["namedtuple", f"A{i}", [], []] for i in range(50_000))]])


def tuple_of_many_fields(folder: Path) -> Path:
    fields = [f"f{i}" for i in range(150_000)]
    return _tree(folder, ["namedtuple", "A", fields, [0, 1, 2, *[None] * 149_997]])


def variable_of_two(folder: Path) -> Path:
    return _tree(folder, ["list", [["variable", "Param", 0, {}, 1], 1, 2]])


def _inside(folder: Path, *node: Any) -> Path:
    """The first leaf inside a node of this kind."""
    return _tree(folder, ["list", [list(node), 1, 2]])


def variable_of_no_class(folder: Path) -> Path:
    return _inside(folder, "variable", "os.system", 0)


def variable_of_a_function(folder: Path) -> Path:
    return _inside(folder, "variable", "state", 0)


def variable_that_is_a_reference(folder: Path) -> Path:
    return _inside(folder, "variable", "Param", 0, {"ref": True})


def variable_of_hijax(folder: Path) -> Path:
    return _inside(folder, "variable", "Param", 0, {"hijax": True})


def metadata_of_unknown_form(folder: Path) -> Path:
    return _inside(folder, "variable", "Param", 0, {"tag": {"os.system": "true"}})


def metadata_of_two_forms(folder: Path) -> Path:
    return _inside(folder, "variable", "Param", 0, {"tag": {"list": [], "spec": []}})


def metadata_no_object(folder: Path) -> Path:
    return _inside(folder, "variable", "Param", 0, ["tag"])


def box_of_no_class(folder: Path) -> Path:
    return _inside(folder, "box", "AxisMetadata", 0, [])


def box_without_names(folder: Path) -> Path:
    return _inside(folder, "box", "Partitioned", 0)


def box_of_a_text(folder: Path) -> Path:
    return _inside(folder, "box", "Partitioned", 0, "ab")


def paths_too_many(folder: Path) -> Path:
    return _tree(folder, ["paths", 4, 0])


def paths_too_few(folder: Path) -> Path:
    return _tree(folder, ["paths", 2, 0])


def paths_of_none(folder: Path) -> Path:
    return _tree(folder, ["list", [["paths", 0, 0], 0, 1, 2]])


def paths_below_zero(folder: Path) -> Path:
    return _tree(folder, ["paths", 3, -1])


def paths_true(folder: Path) -> Path:
    return _tree(folder, ["list", [["paths", True, 0], 1, 2]])


def paths_after_their_end(folder: Path) -> Path:
    return _tree(folder, ["paths", 3, 1])


def paths_far_after_their_end(folder: Path) -> Path:
    return _tree(folder, ["paths", 3, 10**30])


def paths_that_conflict(folder: Path) -> Path:
    def change(fields):
        fields["leaves"] = [fields["leaves"][1], ["a/b", *fields["leaves"][2][1:]]]
        fields["formats"] = fields["formats"][1:]
        for leaf in fields["leaves"]:
            leaf[1] -= 1
        fields["tree"] = ["paths", 2, 0]

    return consistent(folder, change)


def node_of_nothing(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1, 2, []]])


def node_of_text(folder: Path) -> Path:
    return _tree(folder, ["list", [0, 1, 2, "w"]])


def _deep(folder: Path, depth: int) -> Path:
    fields, data = honest()
    deep = '["list",[' * depth + "0,1,2" + "]]" * depth
    signed = text(fields | {"tree": "TREE"}).replace('"TREE"', deep)
    return checkpoint(folder / FILE, fields, data, header_of(fields, signed))


def deep_tree(folder: Path) -> Path:
    return _deep(folder, 205)


def deeper_tree(folder: Path) -> Path:
    return _deep(folder, 470)


def deepest_tree(folder: Path) -> Path:
    return _deep(folder, 100_000)
