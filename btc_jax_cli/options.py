"""The options that say how leaves are packed, in groups that several commands share."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btc_jax_cli.fields import Field, codec_fields

if TYPE_CHECKING:
    import btc_jax
    import btc_jax.allocate

_CODECS = codec_fields()


def option(metavar: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, **more)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What bits are allocated for. `None` is what was not given."""

    bits: Annotated[float | None, option("X", "Effective bits per weight of the packed leaves, at most.")] = None
    size: Annotated[str | None, option("SIZE", "Or bytes of everything that is written, at most: 25MB, 2GiB.")] = None
    rmse: Annotated[float | None, option("X", "Or the error of the packed weights, at most.")] = None
    sqnr: Annotated[float | None, option("DB", "Or their signal-to-noise ratio in dB, at least.")] = None
    sensitivity: Annotated[
        str | None,
        option(
            "FILE|shape|equal",
            "How much errors of each leaf move the answers: a file of what btc_sensitivity returned, written by "
            "btc_jax.save; shape: estimated from shapes and scales; equal: the least error of the weights [shape; "
            "with --rmse and --sqnr: equal].",
        ),
    ] = None

    @property
    def target(self) -> "btc_jax.allocate.Target | None":
        from btc_jax.allocate import sharing_of

        return sharing_of(**self._values).target

    @property
    def goal(self) -> dict[str, Any]:
        """As the library's functions take it."""
        return {**self._values, "sensitivity": sensitivities(self.sensitivity)}

    @property
    def _values(self) -> dict[str, Any]:
        return {"bits": self.bits, "size": self.size, "rmse": self.rmse, "sqnr_db": self.sqnr}


@dataclasses.dataclass(frozen=True)
class Choices:
    """The codec, and the leaves that it packs. `None` is what was not given."""

    codec: Annotated[
        str | None,
        option(
            "|".join(_CODECS),
            "uniform: the paper's, of two widths; the default without a target. multilevel: widths 0 to 8 where they "
            "pay; the default with a target; without, 4.5 bits.",
            autocompletion=lambda: list(_CODECS),
        ),
    ] = None
    rule: Annotated[
        list[str] | None,
        option(
            "PATTERN=dense|packed|BLOCKSIZE|weight:X|stack:N",
            "Leave leaves dense, pack them whatever they are, give them another block size, count their error X times, "
            "or pack the layers along axis N one by one. PATTERN is a glob over the whole path, or a regular "
            "expression after 're:'. May be repeated; the first that matches a leaf decides.",
        ),
    ] = None
    rules: Annotated[
        Path | None, option("FILE", "A TOML file of rules, which come after those of --rule: see docs/policy.md.")
    ] = None
    min_size: Annotated[
        int | None,
        option("N", "Fewest weights of a leaf that is packed without a rule [as few as make it smaller].", min=0),
    ] = None
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """The fields of codecs that were given, as texts."""

    def policy(self, target: "btc_jax.allocate.Target | None", sensitivity: str | None = None) -> "btc_jax.Policy":
        """The policy that the options stand for.

        Raises:
            ValueError: if options do not go together, or have values that they cannot have.
        """
        from btc_jax import Policy
        from btc_jax.policy import load_rules

        codec = self._codec(target is not None)
        self._refuse_what_changes_nothing(codec, target, sensitivity)
        rules = [_rule(text, codec) for text in self.rule or ()]
        return Policy(codec, (*rules, *(load_rules(self.rules) if self.rules else ())), min_size=self.min_size)

    def _codec(self, with_target: bool) -> "btc_jax.codecs.Codec":
        from btc_jax.codecs import CODECS

        name = self.codec or ("multilevel" if with_target else "uniform")
        if name not in _CODECS:
            raise ValueError(f"--codec {name!r} is unknown; it can be {' or '.join(_CODECS)}")
        if strange := next((given for given in self.fields if given not in _CODECS[name]), None):
            others = [codec for codec, fields in _CODECS.items() if strange in fields]
            raise ValueError(self._of_another(_dashed(strange), others[0], name))
        return CODECS[name](**{given: _CODECS[name][given].parsed(text) for given, text in self.fields.items()})

    def _of_another(self, strange: str, other: str, codec: str) -> str:
        if self.codec:
            return f"{strange} is an option of --codec {other}, not of {codec}; leave it out, or change the codec"
        if codec == "uniform":
            return f"{strange} is an option of --codec {other}; add that, or a target such as --bits 4.5"
        return f"{strange} is an option of --codec {other}, and a target means {codec}; add --codec {other}"

    def _refuse_what_changes_nothing(
        self, codec: "btc_jax.codecs.Codec", target: "btc_jax.allocate.Target | None", sensitivity: str | None
    ) -> None:
        """Widths that can change and a target for them: one without the other is a mistake."""
        if target and not codec.rate_controlled:
            name, width = target.kind.removesuffix("_db"), self.fields.get("width")
            of_others = f"leave out {' and '.join(map(_dashed, self.fields))}" if self.fields else "leave out --codec"
            remedy = "add --threshold auto, or leave out --codec uniform" if codec.id == "uniform" else of_others
            remedy = f"leave out --width {width}, or use --width leaf" if width else remedy
            raise ValueError(f"--{name} is a target, and no width of these blocks can change for it; {remedy}")
        weighing = [f"--rule {text!r}" for text in self.rule or () if "=weight:" in text]
        useless = ["--sensitivity"] * (sensitivity is not None) + weighing
        if useless and not codec.rate_controlled:
            raise ValueError(f"{useless[0]} is for a target; add one, such as --bits 4.5")


def takes_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with arguments that are groups of options becomes one with the options themselves, as typer wants them.

    `Choices` also has an option for each field of a codec.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [
        parameter for parameter in signature.parameters.values() if not dataclasses.is_dataclass(parameter.annotation)
    ]
    groups = {name: p.annotation for name, p in signature.parameters.items() if dataclasses.is_dataclass(p.annotation)}
    options = {name: _options_of(group) for name, group in groups.items()}

    def expanded(**given: Any) -> Any:
        made = {name: _made(groups[name], {o.name: given.pop(o.name) for o in options[name]}) for name in groups}
        return command(**made, **given)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    needed = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    rest = [parameter for parameter in parameters if parameter not in needed]
    parameters = [*needed, *(one for group in options.values() for one in group), *rest]
    expanded.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    return expanded


def _options_of(group: Any) -> list[inspect.Parameter]:
    found = [_parameter(f.name, f.type, f.default) for f in dataclasses.fields(group) if f.name != "fields"]
    if group is not Choices:
        return found
    names = dict.fromkeys(name for fields in _CODECS.values() for name in fields)
    return [found[0], *(_parameter(name, _annotation(name), None) for name in names), *found[1:]]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(name: str) -> Any:
    """The option for a field of one or several codecs."""
    owners = {codec: fields[name] for codec, fields in _CODECS.items() if name in fields}
    words = [kind for field in owners.values() for kind in field.kinds if isinstance(kind, str)]
    text = " ".join(_text(codec, field) for codec, field in owners.items())
    first = next(iter(owners.values()))
    return Annotated[str | None, option(first.metavar, text, autocompletion=lambda: words)]


def _text(codec: str, field: Field) -> str:
    default = "" if field.default is None else f" [{field.default}]"
    return f"{codec}: {field.text}{default}."


def _made(group: Any, values: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(group)}
    of_codecs = {name: value for name, value in values.items() if name not in names and value is not None}
    own = {name: value for name, value in values.items() if name in names}
    return group(**own, fields=of_codecs) if group is Choices else group(**own)


def nbytes(text: str, name: str) -> int:
    """The bytes that a size such as `500MB` stands for."""
    from btc_jax.allocate import nbytes_of

    return int(nbytes_of(text, name))


def sensitivities(word: str | None) -> Any:
    """`--sensitivity` as the library takes it: a word, or the numbers of a file by path."""
    from btc_jax.compare import open_any

    if word in (None, "shape", "equal"):
        return word
    if not Path(word).exists():
        raise ValueError(f"--sensitivity {word!r} is neither a file nor 'shape' or 'equal'")
    with open_any(word) as opened:
        return {path: opened.read(path) for path in opened.leaves}


def _rule(text: str, codec: "btc_jax.codecs.Codec") -> "btc_jax.Rule":
    from btc_jax import Rule

    pattern, _, what = text.rpartition("=")
    if pattern and what == "dense":
        return Rule(pattern, None)
    if pattern and what == "packed":
        return Rule(pattern)
    if pattern and what.isdecimal() and len(what) < 7:
        return Rule(pattern, dataclasses.replace(codec, block_size=int(what)))  # pyright: ignore
    if pattern and what.startswith("weight:"):
        return Rule(pattern, weight=_number(f"--rule {text!r}: weight", what.removeprefix("weight:")))
    if pattern and what.startswith("stack:") and all(axis.isdecimal() for axis in what[6:].split(",")):
        return Rule(pattern, stack=tuple(map(int, what[6:].split(","))))
    wanted = "dense, packed, BLOCKSIZE, weight:X or stack:N"
    raise ValueError(f"--rule {text!r} is not PATTERN={wanted}, such as '*/head/*=dense'")


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} {text!r} is not a number") from None


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
