"""Progress of long work, on stderr if that is a terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")


def tracked(items: Sequence[T], description: str, show: bool) -> Iterator[T]:
    """Yields `items`, with a bar that goes away when it is done."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield from items
        return
    from rich.progress import track

    yield from track(items, description, console=console, transient=True)


@contextmanager
def progress(title: str, total: int | None, before: str = "") -> Iterator[Callable[[str, int], None]]:
    """A bar with throughput on a terminal; yields what is to be called after each leaf.

    Args:
        total: bytes of all leaves; `None` if unknown, 0 for no bar.
        before: what is done before the first leaf.
    """
    from rich import progress as rich

    console = Console(stderr=True)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(20), rich.DownloadColumn())
    times = (rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    silent = not console.is_terminal or total == 0
    with rich.Progress(*columns, *times, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(before or title, total=None if before else total)

        def on_leaf(_: str, size: int) -> None:
            bar.update(task, description=title, total=total, advance=size)

        yield on_leaf
