"""The command itself, and the arguments and options that several of its subcommands have."""

from pathlib import Path
from typing import Annotated

import typer

from btc_jax_cli.console import OneLineErrors

EXIT = "Exit codes: {}, 2 wrong usage, file or pattern, 130 interrupted."
DONE = EXIT.format("0 done")

app = typer.Typer(
    cls=OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT.format("0 done, 1 `verify` found damage, `diff` a difference, or `search` nothing"),
)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A .safetensors file, a folder of them with its index, an .npz, a Flax .msgpack, or an Orbax folder.",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A compressed checkpoint.")]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="The file to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace TARGET if it exists.")]


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"btc {version('btc_jax')}")
        raise typer.Exit
    return asked


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Show the version and exit.")] = False,
):
    """Makes the weights of a trained model 4 to 8 times smaller: no data, no training.

    \b
    btc plan model.safetensors                          what would be done
    btc quantize model.safetensors small.safetensors    do it, perhaps --bits 4.5
    btc inspect small.safetensors                       what is in it
    btc verify small.safetensors                        is it undamaged?
    btc diff model.safetensors small.safetensors        what it cost in accuracy
    btc report model.safetensors small.safetensors      the same as a page
    btc dequantize small.safetensors plain.safetensors  back to plain safetensors
    """


def check_target(source: Path, target: Path, force: bool) -> None:
    """Refuses a target that cannot be, or must not be, written, before any work is done.

    Raises:
        ValueError: if it exists and is not to be replaced, is not a file, or is the source or in it.
    """
    from btc_jax.checkpoint.write import index_of

    real, origin = target.resolve(), source.resolve()
    if origin in (real, index_of(real), *real.parents):
        raise ValueError(f"{target} would be written over or into {source}; name another file")
    if real.exists() and not real.is_file():
        raise ValueError(f"{target} is not a regular file; name a file")
    if not real.parent.is_dir():
        raise ValueError(f"{target} cannot be written: there is no folder {target.parent}; make it first")
    if not force and (real.exists() or index_of(real).exists()):
        raise ValueError(f"{target} exists; add --force to replace it, or name another file")
