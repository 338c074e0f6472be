"""The options of the command line that say how leaves are packed: what each means, and which go together."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

if TYPE_CHECKING:
    import btc_jax.allocate

OWN = {"uniform": ("low_bits", "high_bits", "threshold", "header_dtype"), "multilevel": ("width", "effort")}
"""Options that only one codec has."""


def _option(metavar: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, **more)


@dataclasses.dataclass(frozen=True)
class How:
    """How leaves are packed. `None` is what was not given."""

    bits: Annotated[float | None, _option("X", "Effective bits per weight of the packed leaves, at most.")] = None
    size: Annotated[str | None, _option("SIZE", "Or bytes of all that is written, at most: 25MB, 2GiB, ...")] = None
    rmse: Annotated[float | None, _option("X", "Or the error of the packed weights, at most.")] = None
    sqnr: Annotated[float | None, _option("DB", "Or their signal to noise in dB, at least.")] = None
    codec: Annotated[
        str | None,
        _option(
            "uniform|multilevel",
            "uniform: the paper's, of two widths; the default without a target. multilevel: widths 0 to 8 where they "
            "pay; the default with one of the targets above; without, 4.5 bits.",
        ),
    ] = None
    block_size: Annotated[int | None, _option("N", "Weights per block [64; multilevel: 32].", min=2, max=2**20)] = None
    low_bits: Annotated[int | None, _option("N", "uniform: bits per weight of a smooth block, 1 to 7 [4].")] = None
    high_bits: Annotated[int | None, _option("N", "uniform: bits of any other block, up to 8 [8].")] = None
    threshold: Annotated[
        str | None,
        _option(
            "X",
            "uniform: standard deviation from which a block is not smooth; 'inf' for never, 'auto' to suit a target "
            "[0.05].",
        ),
    ] = None
    header_dtype: Annotated[
        str | None, _option("float16|float32", "uniform: what the extremes of blocks are stored in [float16].")
    ] = None
    width: Annotated[
        str | None,
        _option("N|leaf", "multilevel: one width, 0 to 8 bits, for all blocks; or the one for each leaf that suits."),
    ] = None
    effort: Annotated[
        str | None, _option("fast|exhaustive", "multilevel: how much is tried for each block [fast].")
    ] = None
    sensitivity: Annotated[
        str | None,
        _option(
            "FILE|shape|equal",
            "How much errors of each leaf move the answers: a file of what btc_sensitivity returned, written by "
            "btc_jax.save; shape: estimated from shapes and scales; equal: the least error of the weights [shape; "
            "with --rmse and --sqnr: equal].",
        ),
    ] = None
    rule: Annotated[
        list[str] | None,
        _option(
            "PATTERN=dense|packed|BLOCKSIZE|weight:X|stack:N",
            "Leave leaves dense, pack them whatever they are, give them another block size, count their error X times, "
            "or pack the layers along axis N one by one. PATTERN is a glob over the whole path, or a regular "
            "expression after 're:'. May be repeated; the first that matches a leaf decides.",
        ),
    ] = None
    min_size: Annotated[
        int | None,
        _option("N", "Fewest weights of a leaf that is packed without a rule [as few as make it smaller].", min=0),
    ] = None

    @property
    def target(self) -> "btc_jax.allocate.Target | None":
        from btc_jax.allocate import sharing_of

        return sharing_of(**self._targets).target

    @property
    def goal(self) -> dict[str, Any]:
        """As the library's functions take it."""
        word = self.sensitivity
        known = word if word is None or word in ("shape", "equal") else _sensitivities(Path(word))
        return {**self._targets, "sensitivity": known}

    @property
    def _targets(self) -> dict[str, Any]:
        return {"bits": self.bits, "size": self.size, "rmse": self.rmse, "sqnr_db": self.sqnr}

    def policy_and_bytes(self, source: Path) -> tuple["btc_jax.Policy", int]:
        """The policy that the options stand for, and the bytes of the leaves of the source."""
        from btc_jax import Policy
        from btc_jax.compare import dense_nbytes
        from btc_jax.sources import open_source

        codec = self._codec()
        self._refuse_what_changes_nothing(codec)
        rules = tuple(_rule(text, codec) for text in self.rule or ())
        with open_source(source) as opened:
            total = sum(dense_nbytes(leaf.shape, leaf.dtype.name) for leaf in opened.leaves)
        return Policy(codec, rules, min_size=self.min_size), total

    def _codec(self) -> "btc_jax.Codec":
        from btc_jax.codecs import CODECS

        name = self.codec or ("multilevel" if self.target else "uniform")
        if name not in OWN:
            raise ValueError(f"--codec {name!r} is unknown; it can be {' or '.join(OWN)}")
        for other, options in OWN.items():
            strange = next((option for option in options if getattr(self, option) is not None), None)
            if other != name and strange:
                raise ValueError(self._of_another(_dashed(strange), other))
        given = {option: getattr(self, option) for option in ("block_size", *OWN[name])}
        given = {option: _PARSED.get(option, _as_it_is)(value) for option, value in given.items() if value is not None}
        return CODECS[name](**given)

    def _of_another(self, option: str, codec: str) -> str:
        if self.codec:
            return f"{option} is an option of --codec {codec}, not of {self.codec}; leave it out, or change the codec"
        if codec == "uniform":
            return f"{option} is an option of --codec uniform, and a target means multilevel; add --codec uniform"
        return f"{option} is an option of --codec multilevel; add that, or a target such as --bits 4.5"

    def _refuse_what_changes_nothing(self, codec: "btc_jax.Codec") -> None:
        """Widths that can change and a target for them: one without the other is a mistake."""
        if self.target and not codec.rate_controlled:
            name = "sqnr" if self.target.kind == "sqnr_db" else self.target.kind
            of_uniform = "add --threshold auto, or leave out --codec uniform"
            remedy = f"leave out --width {self.width}, or use --width leaf" if self.width else of_uniform
            raise ValueError(f"--{name} is a target, and no width of these blocks can change for it; {remedy}")
        weighing = [f"--rule {text!r}" for text in self.rule or () if "=weight:" in text]
        useless = ["--sensitivity"] * (self.sensitivity is not None) + weighing
        if useless and not codec.rate_controlled:
            raise ValueError(f"{useless[0]} is for a target; add one, such as --bits 4.5")


def takes_how(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command with an argument `how` becomes one with the options of `How` in its place, as typer wants them."""
    fields = {field.name: field for field in dataclasses.fields(How)}

    def expanded(**given: Any) -> Any:
        return command(how=How(**{name: given.pop(name) for name in fields}), **given)

    signature = inspect.signature(command)
    own = {name: parameter for name, parameter in signature.parameters.items() if name != "how"}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for name, field in fields.items()
    ]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
    needed = [parameter for parameter in keywords if parameter.default is inspect.Parameter.empty]
    parameters = [*needed, *options, *(parameter for parameter in keywords if parameter not in needed)]
    expanded.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    return expanded


def shard_bytes(text: str) -> int:
    """The argument of `--max-shard-bytes`."""
    from btc_jax.allocate import nbytes_of

    return int(nbytes_of(text, "max_shard_bytes"))


def _rule(text: str, codec: "btc_jax.Codec") -> "btc_jax.Rule":
    from btc_jax import Rule

    pattern, _, how = text.rpartition("=")
    if pattern and how == "dense":
        return Rule(pattern, None)
    if pattern and how == "packed":
        return Rule(pattern)
    if pattern and how.isdecimal() and len(how) < 7:
        return Rule(pattern, dataclasses.replace(codec, block_size=int(how)))  # pyright: ignore
    if pattern and how.startswith("weight:"):
        return Rule(pattern, weight=_number(f"--rule {text!r}: weight", how.removeprefix("weight:")))
    if pattern and how.startswith("stack:") and all(axis.isdecimal() for axis in how[6:].split(",")):
        return Rule(pattern, stack=tuple(map(int, how[6:].split(","))))
    wanted = "dense, packed, BLOCKSIZE, weight:X or stack:N"
    raise ValueError(f"--rule {text!r} is not PATTERN={wanted}, such as '*/head/*=dense'")


def _sensitivities(file: Path) -> dict[str, Any]:
    """The numbers of a file by path."""
    from btc_jax.compare import open_any

    if not file.exists():
        raise ValueError(f"--sensitivity {str(file)!r} is no file, nor 'shape' or 'equal'")
    with open_any(file) as opened:
        return {path: opened.read(path) for path in opened.leaves}


def _as_it_is(value: Any) -> Any:
    return value


def _threshold(text: str) -> float | str:
    return text if text == "auto" else _number("--threshold", text, ", 'inf' or 'auto'")


def _width(text: str) -> int | str:
    if text not in ("leaf", *map(str, range(9))):
        raise ValueError(f"--width {text!r} is not 'leaf', nor a width of 0 to 8 bits")
    return text if text == "leaf" else int(text)


def _effort(text: str) -> str:
    from btc_jax.codecs.multilevel import Effort

    if text not in (known := get_args(Effort)):
        raise ValueError(f"--effort {text!r} is unknown; it can be {' or '.join(known)}")
    return text


_PARSED: dict[str, Callable[[str], Any]] = {"threshold": _threshold, "width": _width, "effort": _effort}


def _number(what: str, text: str, others: str = "") -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} {text!r} is not a number{others}") from None


def _dashed(option: str) -> str:
    return f"--{option.replace('_', '-')}"
