"""The paper's figures 1 to 6, and two for claims in its text, drawn from results as PNG and SVG."""

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from examples.paper.show import networks, sweeps
from examples.paper.show.style import SETTINGS
from examples.paper.store import write_whole

FIGURES = networks.FIGURES | sweeps.FIGURES


def draw_all(folder: Path, results: dict[str, Any]) -> list[str]:
    """Draw every figure for which there are results; return their names, without `.png` and `.svg`."""
    drawn = []
    with matplotlib.rc_context(SETTINGS):
        for name, draw in FIGURES.items():
            figure = draw(results)
            if figure is not None:
                save(figure, folder / name)
                drawn.append(name)
    return sorted(drawn)


def save(figure: Figure, path: Path) -> None:
    """Write both formats, each atomically."""
    for suffix, options in ((".png", {"dpi": 130}), (".svg", {"metadata": {"Date": None}})):
        with io.BytesIO() as file:
            figure.savefig(file, format=suffix[1:], **options)  # pyright: ignore[reportArgumentType]
            write_whole(path.with_suffix(suffix), file.getvalue())
