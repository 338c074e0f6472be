"""What a command line shows: results on stdout, progress on stderr, and any error as one line there."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import rich.table

    import btc_jax.compare

_ClickException: Any = typer.BadParameter.__mro__[2]  # of click, or of typer, which has its own since 0.2x


class OneLineErrors(TyperGroup):
    """All errors at one place: one line that says what to do, and the exit code."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        first = args[0]  # parsing consumes the list
        self._main_shell_completion({}, "btc")  # ends the process if a shell asks for completions
        try:
            with self.make_context("btc", args) as context:
                code = self.invoke(context)
            sys.stdout.flush()
        except typer.Exit as done:
            code = done.exit_code
        except KeyboardInterrupt:
            again = "resumes where it stopped" if first == "quantize" else "starts it again"
            code = _fail(f"interrupted; the same command {again}", 130)
        except BrokenPipeError:
            code = _nobody_reads()
        except _ClickException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "btc"
            command = f"btc {first}" if command == "btc" and first in self.commands else command
            message = error.format_message().rstrip(".")
            code = _fail(f"{message}{' See' if message.endswith('?') else '; see'} {command} --help", 2)
        except (ValueError, OSError, TypeError, KeyError, ImportError) as error:
            code = _fail(_sentence(error), 2)
        sys.exit(code or 0)


def show(as_json: bool, document: Any, *shown: str | Callable[[], "rich.table.Table"]) -> None:
    """The document as JSON, or lines and tables, which are made only then. A pipe gets lines as long as they come."""
    if as_json:
        from btc_jax.metrics import jsonable

        return typer.echo(json.dumps(jsonable(document), allow_nan=False))
    from rich.console import Console

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
    from btc_jax.tables import codec_cell

    codec, error, bits = leaf["codec"], leaf["error"], leaf["effective_bits"]
    stored = codec_cell(codec, str(leaf["order"])) if isinstance(codec, dict) else leaf["kind"]
    match leaf["origin"]:
        case [str(what), _]:
            stored = f"bytes of {what}"
    row = {"leaf": leaf["path"], "shape": " x ".join(map(str, leaf["shape"])) or "scalar", "dtype": leaf["dtype"]}
    row |= {"codec": stored, "bits": bits and f"{bits:.3f}", "bytes": f"{leaf['bytes']:,}"}
    if isinstance(error, dict):
        row["SQNR dB"] = _figure(error.get("sqnr_db"), ".2f")
    return {name: str(value or "") for name, value in row.items()}


def diff_row(leaf: "btc_jax.compare.Difference") -> dict[str, str]:
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
    return {"leaf": leaf.path, **cells, "reason": leaf.note}


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
    from btc_jax_cli.errors import at_a_prompt

    return at_a_prompt(error) or type(error).__name__


def plain(text: str) -> str:
    """One line without control characters: names in a file are its author's, and a terminal obeys what it is sent."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _nobody_reads() -> int:
    """The reader of a pipe left, as `head` does: not an error, and nothing is left to flush."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
