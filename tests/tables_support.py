"""What the tests of tables share."""

import functools
import io
import re

import numpy as np
from rich import box
from rich.console import Console

from btc_jax import Policy, Rule, Uniform, btc_metrics, btc_plan, btc_quantize, btc_search

LONG = "encoder/layers_11/self_attention/query/kernel"


POLICY = Policy(Uniform(64), rules=(Rule("head/*", None),))


@functools.cache
def tree():
    rng = np.random.default_rng(0)
    kernel = (0.1 * rng.standard_normal((64, 64))).astype(np.float32)
    encoder = {"encoder": {"layers_11": {"self_attention": {"query": {"kernel": kernel}}}}}
    return encoder | {"head": {"kernel": -kernel}, "bias": np.zeros(7, np.float32), "steps": np.arange(3)}


@functools.cache
def metrics():
    return btc_metrics(tree(), btc_quantize(tree(), policy=POLICY), policy=POLICY)


def render(table, width=140):
    table.box, table.show_edge = box.HEAVY_HEAD, True  # a frame, to separate cells
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def rows(text):
    """The rows of a table that is wide enough to avoid folding."""
    lines = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line] for line in lines]


def records():
    search = btc_search(tree(), policy=POLICY, block_sizes=(32, 64), max_rmse=None, progress=False)
    return {"metrics": metrics(), "plan": btc_plan(tree(), policy=POLICY), "search": search}
