"""A report: the figures, and the page that shows them."""

import os
from pathlib import Path

from btc_jax.checkpoint.files import whole_file
from btc_jax.report.page import page_of
from btc_jax.report.records import Figures


class Report(Figures):
    """What quantization saved and cost. `print` shows the metrics as a table, `save` writes the page.

    Attributes:
        before, after: names of the original and of the packed tree.
        metrics: every leaf, sorted by path with the numbers in it as numbers, and the totals.
        details: more of each packed leaf, by path.
        baselines: other quantizers on the same leaves.
        versions: of the library and of JAX, by name.
    """

    def html(self) -> str:
        """The page: self-contained, for light and dark screens of any width."""
        return page_of(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page; an existing file is replaced only once the new one is whole.

        Raises:
            OSError: if the file cannot be written.
        """
        text = self.html()
        with whole_file(Path(path)) as file:
            file.write(text.encode())
        return Path(path)
