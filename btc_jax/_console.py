"""What a command line shows: results on stdout, progress on stderr, and any error as one line there."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import singledispatch
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from typer.core import TyperGroup

from btc_jax._errors import ArgumentError, ConflictingArgumentsError, LeafError
from btc_jax.checkpoint.errors import BTCNotCompressedError
from btc_jax.compare import Difference
from btc_jax.metrics import jsonable
from btc_jax.policy import NotFloatingError, NothingPackedError
from btc_jax.report import codec_cell
from btc_jax.stream.plan import CompressedSourceError

_ClickException: Any = typer.BadParameter.__mro__[2]  # of click, or of typer, which has its own since 0.2x
_OPTIONS = {"sqnr_db": "sqnr"}
"""Options that have another name than their argument."""


class OneLineErrors(TyperGroup):
    """All errors at one place: one line that says what to do, and the exit code."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            with self.make_context("btc", args) as context:
                code = self.invoke(context)
            sys.stdout.flush()
        except typer.Exit as done:
            code = done.exit_code
        except KeyboardInterrupt:
            again = "resumes where it stopped" if "quantize" in args[:1] else "starts it again"
            code = _fail(f"interrupted; the same command {again}", 130)
        except BrokenPipeError:
            code = _nobody_reads()
        except _ClickException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "btc"
            code = _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
        except (ValueError, OSError, TypeError, KeyError, ImportError) as error:
            code = _fail(_sentence(error), 2)
        sys.exit(code or 0)


@contextmanager
def progress(title: str, total: int | None, before: str = "") -> Iterator[Callable[[str, int], None]]:
    """A bar with throughput on a terminal; yields what is to be called after each leaf.

    Args:
        total: bytes of all leaves; `None` if nothing is known but that it takes a while, 0 if it does not.
        before: what is done before the first leaf.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    silent = not console.is_terminal or total == 0
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(before or title, total=None if before else total)

        def on_leaf(_: str, size: int) -> None:
            bar.update(task, description=title, total=total, advance=size)

        yield on_leaf


def show(as_json: bool, document: Any, *shown: str | Callable[[], Table]) -> None:
    """The document as JSON, or lines and tables, which are made only then. A pipe gets lines as long as they come."""
    if as_json:
        return typer.echo(json.dumps(jsonable(document), allow_nan=False))
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if narrow else 10_000)
    for item in shown:
        if isinstance(item, str):
            typer.echo(plain(item))
            continue
        with console.capture() as captured:
            console.print(item())
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def inspect_row(leaf: dict[str, Any]) -> dict[str, str]:
    """A row of the table of `btc inspect`."""
    codec, error, bits = leaf["codec"], leaf["error"], leaf["effective_bits"]
    stored = codec_cell(codec, str(leaf["order"])) if isinstance(codec, dict) else leaf["kind"]
    match leaf["origin"]:
        case [str(what), _]:
            stored = f"bytes of {what}"
    row = {"leaf": leaf["path"], "shape": " x ".join(map(str, leaf["shape"])) or "scalar", "dtype": leaf["dtype"]}
    row |= {"codec": stored, "bits": bits and f"{bits:.3f}", "bytes": f"{leaf['bytes']:,}"}
    if isinstance(error, dict):
        row["SQNR dB"] = _figure(error.get("sqnr_db"), ".2f")
    return {name: plain(str(value or "")) for name, value in row.items()}


def diff_row(leaf: Difference) -> dict[str, str]:
    """A row of the table of `btc diff`."""
    figures = {
        "rmse": leaf.rmse,
        "rel. rmse": leaf.relative_rmse,
        "SQNR dB": leaf.sqnr_db,
        "largest": leaf.largest_error,
    }
    formats = {"rel. rmse": ".2%", "SQNR dB": ".2f"}
    cells = {
        name: "" if leaf.rmse is None else _figure(figure, formats.get(name, ".3g")) for name, figure in figures.items()
    }
    return {"leaf": plain(leaf.path), **cells, "reason": plain(leaf.note)}


def _figure(value: Any, how: str) -> str:
    return format(value, how) if isinstance(value, int | float) else "inf"


def _fail(message: str, code: int) -> int:
    typer.echo(f"btc: {plain(message)}", err=True)
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist; check the path"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return at_a_prompt(error) or type(error).__name__


@singledispatch
def at_a_prompt(error: Exception) -> str:
    """What an error says to somebody who has commands and options, not functions and arguments."""
    return str(error)


def _option(argument: str) -> str:
    return f"--{_OPTIONS.get(argument, argument).replace('_', '-')}"


def _dense(path: str) -> str:
    """The option that leaves just this leaf dense, quoted for a shell."""
    pattern = f"re:{re.escape(path)}" if any(letter in path for letter in "*?[") else path
    return "--rule '" + pattern.replace("'", "'\"'\"'") + "=dense'"


@at_a_prompt.register
def _(error: KeyError) -> str:
    return str(error.args[0]) if error.args else ""


@at_a_prompt.register
def _(error: ArgumentError) -> str:
    return f"{_option(error.name)} {error.problem}"


@at_a_prompt.register
def _(error: ConflictingArgumentsError) -> str:
    return f"{' and '.join(f'{_option(name)} {value}' for name, value in error.given.items())} {error.problem}"


@at_a_prompt.register
def _(error: LeafError) -> str:
    return f"{error}; {_dense(error.path)} leaves it dense"


@at_a_prompt.register
def _(error: NotFloatingError) -> str:
    return f"{error.problem}; narrow the pattern, or put {_dense(error.path)} before it"


@at_a_prompt.register
def _(error: NothingPackedError) -> str:
    small, rule = error.reason == "too small", f"--rule '{error.pattern}=packed' packs such a leaf all the same"
    way = "--min-size 0 packs small leaves as well" if small else rule if error.pattern else "name another file"
    return f"{error.problem}; {way}; `btc plan` shows each reason"


@at_a_prompt.register
def _(error: BTCNotCompressedError) -> str:
    return f"{error.problem}; `btc quantize` makes one"


@at_a_prompt.register
def _(error: CompressedSourceError) -> str:
    return f"{error.problem}; `btc restore` makes it dense again"


def plain(text: str) -> str:
    """One line without control characters: names in a file are its author's, and a terminal obeys what it is sent."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _nobody_reads() -> int:
    """The reader of a pipe left, as `head` does: not an error, and nothing is left to flush."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
