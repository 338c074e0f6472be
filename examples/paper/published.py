"""The paper's own figures, from `published.toml`, and checks of them that need no network."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@cache
def published() -> dict[str, Any]:
    """All tables and claims, as in the file."""
    with Path(__file__).with_name("published.toml").open("rb") as file:
        return tomllib.load(file)


def table(number: int) -> list[Row]:
    """The rows of one of the paper's tables, by column name."""
    data = published()[f"table{number}"]
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def title(number: int) -> str:
    """The paper's title of the table."""
    return f"Table {number}. {published()[f'table{number}']['title']}"


def claims() -> dict[str, Any]:
    """The claims in the paper's text."""
    return published()["claims"]


def row_of(dataset: str, model: str) -> Row | None:
    """The paper's row for a network, or `None` if it has none."""
    numbers = {"cifar10": 2, "cifar100": 3, "imagenet": 6}
    return next((row for row in table(numbers[dataset]) if row["model"] == model), None)


def uniform_column() -> list[Row]:
    """The uniform quantizer's bits next to the mean of 8 and BTC's bits: they are equal in all rows but one."""
    return [
        {"table": number, "model": row["model"], "uniform": row["uniform_bits"], "mean": (row["btc_bits"] + 8) / 2}
        for number in (2, 3)
        for row in table(number)
    ]


def beyond_the_limit(max_rmse: float = 3e-3) -> list[Row]:
    """Rows of Tables 2 and 3 whose error exceeds the limit at which the paper's own search stops."""
    return [{"table": n} | row for n in (2, 3) for row in table(n) if row["rmse"] > max_rmse]
