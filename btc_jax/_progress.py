"""Progress of long work, on the terminal's error stream; nothing where it is no terminal."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(items: Sequence[T], description: str, show: bool) -> Iterator[T]:
    """Yields `items`, with a bar that goes away when it is done."""
    console = Console(stderr=True)
    silent = not (show and console.is_terminal)
    yield from track(items, description, console=console, transient=True, disable=silent)
