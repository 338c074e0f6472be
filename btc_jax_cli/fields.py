"""The fields of the library's codecs, read from their source: importing them would import JAX, which takes a second."""

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of a codec.

    Attributes:
        name: the field.
        kinds: `int`, `float`, or the text itself, for each kind of value that it takes.
        default: its default, or `None`.
        text: what the docstring of the codec says of it.
    """

    name: str
    kinds: tuple[type | str, ...]
    default: Any
    text: str

    @property
    def metavar(self) -> str:
        """What stands for a value: `N|leaf`."""
        return "|".join({int: "N", float: "X"}[kind] if isinstance(kind, type) else kind for kind in self.kinds)

    def parsed(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            ValueError: if it is none that the field takes.
        """
        if text in self.kinds:
            return text
        for kind in self.kinds:
            try:
                return kind(text) if isinstance(kind, type) else _fail()
            except ValueError:
                continue
        words = [{int: "a whole number", float: "a number"}.get(kind, repr(kind)) for kind in self.kinds]
        raise ValueError(f"--{self.name.replace('_', '-')} {text!r} is not {' or '.join(words)}")


def _fail() -> Any:
    raise ValueError


@functools.cache
def codec_fields() -> dict[str, dict[str, Field]]:
    """The fields of each codec, by its id and by their names."""
    spec = importlib.util.find_spec("btc_jax")  # finds a package without importing it
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "codecs"
    found: dict[str, dict[str, Field]] = {}
    for file in sorted(folder.glob("*.py"), reverse=True):  # the paper's codec first
        module = ast.parse(file.read_text(encoding="utf-8"))
        for node in module.body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Codec" for base in node.bases):
                codec = _id_of(node)
                found[codec] = _fields(node, _aliases(module))
    return found


def _id_of(codec: ast.ClassDef) -> str:
    return next(ast.literal_eval(value) for name, _, value in _assigned(codec) if name == "id" and value)


def _fields(codec: ast.ClassDef, aliases: dict[str, ast.expr]) -> dict[str, Field]:
    texts, found = _texts(ast.get_docstring(codec) or ""), {}
    for name, annotation, value in _assigned(codec):
        if name != "id":
            default = None if value is None else ast.literal_eval(value)
            found[name] = Field(name, tuple(_kinds(annotation, aliases)), default, texts[name])
    return found


def _assigned(codec: ast.ClassDef) -> list[tuple[str, ast.expr, ast.expr | None]]:
    return [(ast.unparse(n.target), n.annotation, n.value) for n in codec.body if isinstance(n, ast.AnnAssign)]


def _aliases(module: ast.Module) -> dict[str, ast.expr]:
    return {ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)}


def _kinds(annotation: ast.expr, aliases: dict[str, ast.expr]) -> list[type | str]:
    """The kinds of values of an annotation, such as `int | Literal["leaf"] | None`."""
    match annotation:
        case ast.BinOp(left, ast.BitOr(), right):
            return [*_kinds(left, aliases), *_kinds(right, aliases)]
        case ast.Subscript(ast.Name("Literal"), values):
            elements = values.elts if isinstance(values, ast.Tuple) else [values]
            return [ast.literal_eval(element) for element in elements]
        case ast.Name("int"):
            return [int]
        case ast.Name("float"):
            return [float]
        case ast.Name(name) if name in aliases:
            return _kinds(aliases[name], aliases)
        case ast.Constant(None):
            return []
    raise TypeError(f"a field of a codec is annotated {ast.unparse(annotation)}, which no option can be")


def _texts(docstring: str) -> dict[str, str]:
    """What the section `Args:` says of each argument, in words for a prompt."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE)
    return {name: re.sub(r"[`\"]", "", " ".join(text.split())).rstrip(".") for name, text in entries}
