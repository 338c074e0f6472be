"""Reproduce the tables and figures of the paper's section 3 with the files available, and list what could not be run.

Run `python -m examples.paper`; `--help` lists the options. It needs `pip install btc_jax[examples]`. Finished rows are
kept in the output folder: after an interrupt, the same command resumes.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.paper.run import evaluate
from examples.paper.show.figures import draw_all
from examples.paper.show.report import print_all, write_all
from examples.paper.subjects import Options

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal; elsewhere, a line for each tenth of the work."""
    console = Console(stderr=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, said = bar.add_task("reading files", total=None), set[int]()

        def show(name: str, number: int, total: int) -> None:
            bar.update(task, description=name, completed=number, total=total)
            tenth = 10 * number // total
            if not console.is_terminal and tenth not in said:
                said.add(tenth)
                console.print(f"{number} of {total} rows; now {name}")

        yield show


def run(options: Options) -> None:
    """Compute, draw, write and print everything; errors in files are raised."""
    start = time.perf_counter()
    with progress() as show:
        results, store = evaluate(options, show)
    figures = draw_all(options.output, results)
    paths = write_all(options.output, results, figures)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    print_all(console, results)
    seconds = time.perf_counter() - start
    kept = f"{len(store.computed)} rows computed, {len(store.reused)} kept from before"
    console.print(f"\n{kept}, {len(figures)} figures, {seconds:.0f} s. In {', '.join(map(str, paths))}", soft_wrap=True)


@app.command()
def main(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for rows, tables and figures.")] = Path("out"),
    weights: Annotated[list[Path] | None, typer.Option(help="Folder with weights or data; may be repeated.")] = None,
    cifar10: Annotated[Path | None, typer.Option(help="CIFAR-10's test images: folder, batch or .npz.")] = None,
    cifar100: Annotated[Path | None, typer.Option(help="CIFAR-100's test images.")] = None,
    imagenet: Annotated[Path | None, typer.Option(help="Folder of ImageNet's validation images.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Rows for one more MLP, with a header.")] = None,
    target: Annotated[str, typer.Option(help="Column of the CSV file that holds the classes.")] = "",
    images: Annotated[
        int, typer.Option(min=0, help="Compare answers on this many JPEG images; of ImageNet, use this many in total.")
    ] = 0,
    download: Annotated[bool, typer.Option("--download", help="Download missing weights.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A trial: the smallest networks on 64 images.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the MLPs.")] = 0,
) -> None:
    """Reproduce the tables and figures of the paper with the files available, and list what could not be run."""
    if bool(csv) != bool(target):
        raise typer.BadParameter("--csv and --target go together")
    options = Options(
        output, tuple(weights or ()), cifar10, cifar100, imagenet, csv, target, images, seed, download, quick
    )
    try:
        run(options)
    except KeyboardInterrupt:
        typer.echo("paper: interrupted; the same command resumes where it stopped", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"paper: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
